"""What a scalar is worth: exactly, as a Fraction, or at a point, to any number of digits.

Nothing here can be made to run long: sizes are estimated before they are computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from mpmath import mp

from shared.grading.caps import (
    MAX_BITS,
    MAX_EXPONENT,
    MAX_FACTORIAL,
    MAX_TERMS,
    TooMuchError,
    UnreadableError,
)
from shared.grading.tree import Node, replace

_MOST_LOST = 3000  # digits
_EXP_LIMIT = 10**6  # of the argument of exp, cosh, ...
LOG_BASE = "log base"  # the variable that stands for the base of a bare \log


class UndefinedError(ValueError):
    """No value here: a pole, 0/0, an infinity."""


class ComplexError(ValueError):
    """No real value here: the root or the logarithm of something negative."""


# ---- exact --------------------------------------------------------------------------------------


def exact(node: Node) -> Fraction | None:
    """The value of what is rational by arithmetic alone; None otherwise.

    Raises TooMuchError for what is too big, UndefinedError for a division by zero.
    """
    match node.kind:
        case "num":
            assert isinstance(node.value, Fraction)
            return node.value
        case "add" | "mul":
            values = [exact(arg) for arg in node.args]
            total = Fraction(node.kind == "mul")
            for value in values:
                if value is None:
                    return None
                total = _bounded(total + value if node.kind == "add" else total * value)
            return total
        case "pow":
            base, exponent = exact(node.args[0]), exact(node.args[1])
            if base is None or exponent is None:
                return None
            if exponent.denominator != 1:
                return _root(base, exponent)
            return _power(base, exponent.numerator)
        case "root":
            radicand, degree = exact(node.args[0]), exact(node.args[1])
            if radicand is None or degree is None or degree == 0:
                return None
            return _root(radicand, 1 / degree)
        case "percent":
            value = exact(node.args[0])
            return None if value is None else value / 100
        case "based":
            return Fraction(based(node))
        case "ratio" if len(node.args) == 2:
            a, b = exact(node.args[0]), exact(node.args[1])
            if a is None or b is None:
                return None
            return a * _power(b, -1)
        case "fn" if node.name in ("sum", "prod"):
            if any(exact(end) is None for end in node.args[1:3]):
                return None
            terms = list(written_out(node))
            return exact(Node("add" if node.name == "sum" else "mul", "", tuple(terms)))
        case "fn":
            return _exact_function(node)
    return None


def written_out(node: Node) -> Iterator[Node]:
    """The terms of a sum or product whose bounds are whole numbers; raises UndefinedError."""
    name, *ends, term = node.args
    low, high = (exact(end) for end in ends)
    if low is None or high is None or low.denominator != 1 or high.denominator != 1:
        raise UndefinedError("bounds that are no whole numbers")
    if high - low > MAX_TERMS:
        raise TooMuchError(f"a {node.name} of more than {MAX_TERMS} terms")
    for value in range(int(low), int(high) + 1):
        yield replace(term, name, Node("num", Fraction(value)))


def based(node: Node) -> int:
    """The value of "base:digits". Raises UnreadableError where a digit is not of that base."""
    base, digits = node.name.split(":")
    if "." in digits or not 2 <= int(base) <= 36:
        raise UnreadableError("a numeral with a point, or of an unusual base")
    try:
        return int(digits, int(base))
    except ValueError as error:
        raise UnreadableError(f"{digits[:20]} is no numeral of base {base}") from error


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise TooMuchError(f"an exact number of more than {MAX_BITS} bits")
    return value


def _power(base: Fraction, exponent: int) -> Fraction:
    if base == 0 and exponent < 0:
        raise UndefinedError("a division by zero")
    size = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if abs(exponent) > MAX_EXPONENT and abs(base) not in (0, 1):
        raise TooMuchError(f"an exponent above {MAX_EXPONENT}")
    if size * abs(exponent) > MAX_BITS:
        raise TooMuchError(f"an exact number of more than {MAX_BITS} bits")
    return base**exponent if abs(base) != 1 else (base if exponent % 2 else Fraction(1))


def _root(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base ** exponent where that is rational, over the reals."""
    degree = exponent.denominator
    if not 1 < degree <= 64 or (base < 0 and degree % 2 == 0):
        return None
    parts = [_integer_root(abs(n), degree) for n in (base.numerator, base.denominator)]
    if None in parts:
        return None
    top, bottom = parts
    assert top is not None
    assert bottom is not None
    return _power(Fraction(top, bottom) * (-1 if base < 0 else 1), exponent.numerator)


def _integer_root(n: int, degree: int) -> int | None:
    if n < 2:
        return n
    guess = 1 << -(-n.bit_length() // degree)
    while True:
        following = ((degree - 1) * guess + n // guess ** (degree - 1)) // degree
        if following >= guess:
            return guess if guess**degree == n else None
        guess = following


def _exact_function(node: Node) -> Fraction | None:
    args = [exact(arg) for arg in node.args]
    if any(arg is None for arg in args):
        return None
    values = [arg for arg in args if arg is not None]
    whole = [v.numerator for v in values if v.denominator == 1]
    integers = len(whole) == len(values)
    match node.name:
        case "abs":
            return abs(values[0])
        case "floor":
            return Fraction(math.floor(values[0]))
        case "ceil":
            return Fraction(math.ceil(values[0]))
        case "sgn":
            return Fraction((values[0] > 0) - (values[0] < 0))
        case "max" | "min":
            return max(values) if node.name == "max" else min(values)
        case "gcd" | "lcm" if integers:
            return Fraction(math.gcd(*whole) if node.name == "gcd" else math.lcm(*whole))
        case "factorial" if integers:
            if whole[0] < 0:
                raise UndefinedError("the factorial of a negative number")
            if whole[0] > MAX_FACTORIAL:
                raise TooMuchError(f"a factorial above {MAX_FACTORIAL}")
            return Fraction(math.factorial(whole[0]))
        case "binom" if integers and len(whole) == 2:
            n, k = whole
            if n < 0 or k < 0:
                return None
            if n > MAX_FACTORIAL:
                raise TooMuchError(f"a binomial above {MAX_FACTORIAL}")
            return Fraction(math.comb(n, k))
    return None


# ---- at a point ---------------------------------------------------------------------------------

Number = Any  # an mpmath mpf or mpc


def at(node: Node, point: Mapping[str, Fraction], digits: int, *, real: bool) -> Number:
    """The value of a scalar where its symbols have the values of `point`, to about `digits` digits.

    `real`: odd roots of negative numbers are real, and what is not real raises ComplexError; else
    principal values. Raises UndefinedError, TooMuchError; UnreadableError for what is no scalar.
    """
    lost = 0
    while True:
        with mp.workdps(digits + lost + 15):
            evaluation = _Evaluation(point, real)
            try:
                found = evaluation.value(node)
            except (ZeroDivisionError, OverflowError) as error:
                raise UndefinedError("no value") from error
            if not mp.isfinite(found):
                raise UndefinedError("not finite")
        if evaluation.largest <= max(lost, 10):
            return found
        lost = evaluation.largest + 5  # so many digits may cancel: \\cosh^2 x - \\sinh^2 x
        if lost > _MOST_LOST:
            raise UndefinedError("terms too large to be subtracted")


class _Evaluation:
    def __init__(self, point: Mapping[str, Fraction], real: bool) -> None:
        self.point, self.real = point, real
        self.known: dict[Node, Number] = {}
        self.largest = 0  # decimal digits before the point of the largest term of a sum

    def value(self, node: Node) -> Number:
        if node not in self.known:
            self.known[node] = self.compute(node)
        return self.known[node]

    def compute(self, node: Node) -> Number:
        match node.kind:
            case "num" | "sym":
                value = node.value if node.kind == "num" else self.point[node.name]
                assert isinstance(value, Fraction)
                return mp.mpf(value.numerator) / value.denominator
            case "const":
                return self.constant(node.name)
            case "add":
                parts = [self.value(arg) for arg in node.args]
                size = max(map(mp.mag, parts), default=0)
                if mp.isfinite(size):
                    self.largest = max(self.largest, int(size * 0.302))
                return mp.fsum(parts)
            case "mul":
                return mp.fprod(self.value(arg) for arg in node.args)
            case "pow":
                return self.power(node.args[0], node.args[1])
            case "root":
                degree = exact(node.args[1])
                if degree is None or degree == 0:
                    return self.general_power(
                        self.value(node.args[0]), 1 / self.value(node.args[1])
                    )
                return self.rational_power(self.value(node.args[0]), 1 / degree)
            case "deg":
                return self.value(node.args[0]) * mp.pi / 180
            case "percent":
                return self.value(node.args[0]) / 100
            case "based":
                return mp.mpf(based(node))
            case "ratio" if len(node.args) == 2:
                return self.value(node.args[0]) / self.value(node.args[1])
            case "fn" if node.name in ("sum", "prod"):
                ends = (node.args[0], *(self._inserted(end) for end in node.args[1:3]))
                terms = written_out(Node("fn", node.name, (*ends, node.args[3])))
                total = mp.fsum if node.name == "sum" else mp.fprod
                return total([self.value(term) for term in terms])
            case "fn":
                return self.function(node.name, [self.value(arg) for arg in node.args])
            case "app":
                return self.unknown(node.name, [self.value(arg) for arg in node.args])
        raise UnreadableError(f"a {node.kind} inside of an expression")

    def _inserted(self, node: Node) -> Node:
        if node.kind == "sym":
            return Node("num", self.point[node.name])
        return Node(node.kind, node.value, tuple(map(self._inserted, node.args)))

    def constant(self, name: str) -> Number:
        if name == "inf":
            raise UndefinedError("infinity inside of an expression")
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[name]

    def power(self, base: Node, exponent: Node) -> Number:
        rational = exact(exponent)
        if base.kind == "const" and base.name == "e":
            return self.exp(self.value(exponent))
        value = self.value(base)
        if rational is None:
            return self.general_power(value, self.value(exponent))
        if rational.denominator == 1:
            if abs(rational) > MAX_EXPONENT:
                raise TooMuchError(f"an exponent above {MAX_EXPONENT}")
            return value ** int(rational)
        return self.rational_power(value, rational)

    def rational_power(self, value: Number, exponent: Fraction) -> Number:
        if abs(exponent) > MAX_EXPONENT or exponent.denominator > MAX_EXPONENT:
            raise TooMuchError(f"an exponent above {MAX_EXPONENT}")
        if value == 0:
            return value ** (1 if exponent > 0 else -1)
        if isinstance(value, mp.mpf) and value < 0:
            if exponent.denominator % 2 and self.real:
                sign = -1 if exponent.numerator % 2 else 1
                return sign * self.rational_power(-value, exponent)
            if self.real:
                raise ComplexError("an even root of a negative number")
        return value ** (mp.mpf(exponent.numerator) / exponent.denominator)

    def general_power(self, base: Number, exponent: Number) -> Number:
        if base == 0:
            if mp.re(exponent) > 0:
                return mp.mpf(0)
            raise UndefinedError("a power of zero")
        if self.real and base < 0:
            if exponent == mp.nint(exponent) and abs(exponent) < MAX_EXPONENT:
                return base ** int(exponent)
            raise ComplexError("a power of a negative number")
        return self.exp(exponent * mp.log(base))

    def exp(self, x: Number) -> Number:
        if abs(x) > _EXP_LIMIT:
            raise UndefinedError("an exponential beyond measure")
        return mp.exp(x)

    def function(self, name: str, args: list[Number]) -> Number:
        x = args[0] if args else mp.mpf(0)
        if name in ("max", "min"):
            if not args or not all(isinstance(arg, mp.mpf) for arg in args):
                raise UndefinedError(f"the {name} of what is not real")
            return max(args) if name == "max" else min(args)
        if name == "binom" and len(args) == 2:
            if max(map(abs, args)) > MAX_FACTORIAL:
                raise TooMuchError(f"a binomial above {MAX_FACTORIAL}")
            return _or_undefined(mp.binomial, *args)
        if len(args) != 1:
            raise UnreadableError(f"{name} of {len(args)} arguments")
        if name in _SIMPLE:
            if abs(x) > 10**30:
                raise UndefinedError("an angle beyond measure")
            return _SIMPLE[name](x)
        if name in ("ln", "log"):
            return self.logarithm(name, x)
        if name in ("sinh", "cosh", "tanh", "coth", "sech", "csch"):
            if abs(x) > _EXP_LIMIT:
                raise UndefinedError("an exponential beyond measure")
            return getattr(mp, name)(x)
        if name in _INVERSE:
            found = getattr(mp, _INVERSE[name])(x)
            if self.real and isinstance(found, mp.mpc):
                raise ComplexError(f"{name} outside of its domain")
            return found
        if name == "factorial":
            if abs(x) > MAX_FACTORIAL:
                raise TooMuchError(f"a factorial above {MAX_FACTORIAL}")
            return _or_undefined(mp.factorial, x)
        if name in ("floor", "ceil"):
            if isinstance(x, mp.mpc):
                raise UndefinedError(f"the {name} of what is not real")
            near = mp.nint(x)
            if abs(x - near) < mp.mpf(10) ** (-mp.dps // 2):  # a whole number, but for rounding
                return near
            return mp.floor(x) if name == "floor" else mp.ceil(x)
        raise UnreadableError(f"the function {name}")

    def logarithm(self, name: str, x: Number) -> Number:
        if x == 0:
            raise UndefinedError("the logarithm of zero")
        if self.real and x < 0:
            raise ComplexError("the logarithm of a negative number")
        if name == "ln":
            return mp.log(x)
        base = self.point[LOG_BASE]
        return mp.log(x) if base == 0 else mp.log(x) / mp.log(mp.mpf(base.numerator))

    def unknown(self, name: str, args: list[Number]) -> Number:
        """Any function: equal arguments give equal values, others never do."""
        told = name + "|" + "|".join(mp.nstr(arg, 25) for arg in args)
        digest = hashlib.sha256(told.encode()).digest()
        return 1 + mp.mpf(int.from_bytes(digest[:8], "big")) / (1 << 64)


def _or_undefined(function: Callable[..., Number], *args: Number) -> Number:
    try:
        return function(*args)
    except ValueError as error:  # a pole of the gamma function
        raise UndefinedError(str(error)) from error


_SIMPLE: dict[str, Callable[[Number], Number]] = {
    **{name: getattr(mp, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    "abs": abs,
    "sgn": mp.sign,
    "conj": mp.conj,
    "Re": mp.re,
    "Im": mp.im,
}
_INVERSE = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec",
    "arccsc": "acsc", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
}  # fmt: skip
