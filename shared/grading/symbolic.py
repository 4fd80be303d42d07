"""The symbolic zero test: the difference of two scalars, built from sympy's constructors.

No text ever reaches sympy: names of symbols are numbered, so even they are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import sympy

from shared.grading.tree import ONE, Node, add, mul, power, symbols
from shared.grading.values import based

_MAX_NODES = 400
_MAX_TERMS = 3000  # when everything is multiplied out
_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    **{
        name: getattr(sympy, name)
        for name in "sin cos tan cot sec csc sinh cosh tanh coth sech csch binomial".split()
        if hasattr(sympy, name)
    },
    **{"arc" + name: getattr(sympy, "a" + name) for name in "sin cos tan cot sec csc".split()},
    **{"arc" + name: getattr(sympy, "a" + name) for name in "sinh cosh tanh".split()},
    "abs": sympy.Abs,
    "ln": sympy.log,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "factorial": sympy.factorial,
    "binom": sympy.binomial,
    "max": sympy.Max,
    "min": sympy.Min,
}


class UnfitError(ValueError):
    """Too big, or of a kind that this stage does not take."""


def is_zero(node: Node) -> bool | None:
    """Whether a scalar is zero wherever it is defined: True and False are proofs, None is neither.

    False is only said of rational functions with rational coefficients.
    """
    if sum(1 for _ in node) > _MAX_NODES or _terms(node) > _MAX_TERMS:
        return None
    names = {name: sympy.Symbol(f"x{n}") for n, name in enumerate(sorted(symbols(node)))}
    try:
        built = _build(node, names)
        if built.is_rational_function(*names.values()) and not built.atoms(sympy.Function):
            top = sympy.expand(sympy.numer(sympy.together(built)))
            if top.is_zero is not None and not top.free_symbols:
                return bool(top.is_zero)
            if top.is_polynomial(*names.values()) and not _irrational(top):
                return False
        elif sympy.expand(built) == 0:
            return True
    except (UnfitError, ArithmeticError, ValueError, TypeError, RecursionError):
        return None
    return None


def _terms(node: Node) -> int:
    """At least as many terms as `node` has when it is multiplied out."""
    most = _MAX_TERMS + 1
    match node.kind:
        case "add":
            return min(most, sum(map(_terms, node.args)))
        case "mul":
            return min(most, math.prod(map(_terms, node.args)))
        case "pow":
            terms, exponent = _terms(node.args[0]), node.args[1].value
            if terms == 1 or not isinstance(exponent, Fraction):
                return terms
            power = math.ceil(abs(exponent))
            return min(most, math.comb(terms + power - 1, power)) if power < most else most
    return max([1, *map(_terms, node.args)])


def numerator(node: Node) -> Node | None:
    """What remains of a rational function multiplied by its denominator; None for others."""
    parts = _split(node)
    return None if parts is None else parts[0]


def _split(node: Node) -> tuple[Node, Node] | None:
    match node.kind:
        case "num" | "sym" | "const" | "root" | "fn" | "app":
            return node, ONE
        case "mul":
            split = [_split(arg) for arg in node.args]
            if None in split:
                return None
            done = [part for part in split if part is not None]
            return mul(*(a for a, _ in done)), mul(*(b for _, b in done))
        case "add":
            split = [_split(arg) for arg in node.args]
            if None in split:
                return None
            done = [part for part in split if part is not None]
            bottoms = list(dict.fromkeys(b for _, b in done if b != ONE))
            terms = [mul(a, *(c for c in bottoms if c != b)) for a, b in done]
            return add(*terms), mul(ONE, *bottoms)
        case "pow":
            exponent = node.args[1].value
            inner = _split(node.args[0])
            if inner is None or not isinstance(exponent, Fraction) or exponent.denominator != 1:
                return node, ONE
            top, bottom = inner if exponent > 0 else inner[::-1]
            size = Node("num", abs(exponent))
            return power(top, size), power(bottom, size) if bottom != ONE else ONE
    return None


def _irrational(expression: sympy.Expr) -> bool:
    return any(
        isinstance(part, sympy.NumberSymbol)
        or part is sympy.I
        or (part.is_Pow and not part.exp.is_Integer)
        for part in sympy.preorder_traversal(expression)
    )


def _build(node: Node, names: dict[str, sympy.Symbol]) -> sympy.Expr:
    match node.kind:
        case "num":
            assert isinstance(node.value, Fraction)
            return sympy.Rational(node.value.numerator, node.value.denominator)
        case "sym":
            return names[node.name]
        case "const" if node.name in ("pi", "e", "i"):
            return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[node.name]
        case "add":
            return sympy.Add(*(_build(arg, names) for arg in node.args))
        case "mul":
            return sympy.Mul(*(_build(arg, names) for arg in node.args))
        case "pow":
            base, exponent = (_build(arg, names) for arg in node.args)
            _check_power(base, exponent)
            return sympy.Pow(base, exponent)
        case "root":
            base, degree = (_build(arg, names) for arg in node.args)
            if degree != 2 and not base.is_nonnegative:
                raise UnfitError("an odd root of what may be negative")
            return sympy.Pow(base, 1 / degree)
        case "deg":
            return _build(node.args[0], names) * sympy.pi / 180
        case "percent":
            return _build(node.args[0], names) / 100
        case "based":
            return sympy.Integer(based(node))
        case "fn" if node.name in _FUNCTIONS:
            args = [_build(arg, names) for arg in node.args]
            if node.name in ("factorial", "binom") and any(
                arg.is_number and not abs(arg) <= 1000 for arg in args
            ):
                raise UnfitError("a big factorial")
            return _FUNCTIONS[node.name](*args)
    raise UnfitError(node.kind)


def _check_power(base: sympy.Expr, exponent: sympy.Expr) -> None:
    if exponent.is_number:
        if base.is_number and exponent.is_Rational:
            size = 64 if not base.is_Rational else max(abs(base.p), base.q).bit_length()
            if size * abs(exponent.p) > 20_000 or exponent.q > 100:
                raise UnfitError("a big power")
        elif not exponent.is_Rational:
            if base.is_number and not base.is_Symbol and base != sympy.E and exponent.is_integer:
                raise UnfitError("a power that is not written out")
        elif abs(exponent.p) > 10_000:
            raise UnfitError("a big power")
        if base.is_Rational and not base.is_Integer and exponent.q > 1:
            return
        if base.is_Integer and exponent.is_Rational and exponent.q > 1 and abs(base) > 10**15:
            raise UnfitError("a root of a number that would have to be factored")
