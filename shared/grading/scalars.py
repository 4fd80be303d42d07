r"""Are two scalars equal? Exactly, by a symbolic zero test, then at random points.

At a point the difference is computed with n and with 2n digits. A difference that is there stays as
it is; one that comes from rounding shrinks by n orders of magnitude. So 1/2^99 is not 1/2^98, and
no absolute tolerance is needed anywhere. A rounded decimal is not the number that it came from:
0.333 is not 1/3, 3.14 is not \pi.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import Enum
from fractions import Fraction

from mpmath import mp

from shared.grading import symbolic, tree
from shared.grading.caps import MAX_SYMBOLS, TooMuchError, UnreadableError
from shared.grading.tree import Node
from shared.grading.values import LOG_BASE, ComplexError, UndefinedError, at, exact
from shared.grading.verdict import Decision, Stage, different, equal, undecided

DIGITS = 40
MOST_DIGITS = 1300  # for constants: they are compared once, so thoroughly
POINTS = 8  # that must agree
TRIES = 32
_STEPS = frozenset({"floor", "ceil", "gcd", "lcm"})
_WHOLE_NAMES = frozenset("jklmnpqKMN")  # what \\lfloor n/2 \\rfloor is about; x may be any number
_COUNTS = frozenset({"sum", "prod", "factorial", "binom"})
# Where coordinates lie, in turn: what holds for small numbers alone is seen at large ones.
_RANGES = ((0, 2), (-2, 0), (0, 9), (-9, 9), (-1000, 1000), (0, 5), (-(10**6), 10**6), (-5, 5))
_WHOLE_RANGES = ((1, 12), (1, 40), (-30, 0), (40, 2000), (1, 100), (2000, 10**6), (-2000, 2000))


class Sign(Enum):
    ZERO = 0
    NONZERO = 1
    UNKNOWN = 2


def compare(a: Node, b: Node) -> Decision:
    """Both are scalars. Raises TooMuchError, UnreadableError."""
    if a == b:
        return equal(Stage.STRUCTURE)
    for infinite, other in ((a, b), (b, a)):
        if (sign := infinity(infinite)) is not None:
            same = sign == infinity(other)
            return equal(Stage.STRUCTURE) if same else different(Stage.STRUCTURE, "infinite")
    poles = [_is_pole(side) for side in (a, b)]
    if any(poles):
        if all(poles):
            return undecided(Stage.RATIONAL, "neither has a value")
        return different(Stage.RATIONAL, "one has no value")
    left, right = exact(a), exact(b)
    if left is not None and right is not None:
        if left == right:
            return equal(Stage.RATIONAL)
        return different(Stage.RATIONAL, "unequal numbers")
    logs = [any(n.kind == "fn" and n.name == "log" for n in side) for side in (a, b)]
    if not any(logs):
        return _compare(a, b, None)
    found = _compare(a, b, None)
    if found.equal:
        return found
    tries = [_compare(a, b, Fraction(base)) for base in (10, 0)]
    if any(tried.equal for tried in tries):
        if not all(logs) and not any(n.kind == "fn" and n.name == "ln" for n in tree.add(a, b)):
            return next(tried for tried in tries if tried.equal)
        return undecided(Stage.NUMERIC, r"equal for one base of \log only")
    return found


def _is_pole(node: Node) -> bool:
    """1/0 and what is made of it."""
    try:
        exact(node)
    except UndefinedError:
        return True
    return any(map(_is_pole, node.args))


def infinity(node: Node) -> int | None:
    r"""1 or -1 for \infty and -\infty; None for what is finite."""
    if node == tree.INF:
        return 1
    return -1 if node == tree.neg(tree.INF) else None


def _compare(a: Node, b: Node, log_base: Fraction | None) -> Decision:
    difference = tree.sub(a, b)
    if log_base is None:
        zero = symbolic.is_zero(difference)
        if zero is not None:
            return equal(Stage.SYMBOLIC) if zero else different(Stage.SYMBOLIC, "unequal")
    return at_points(a, b, log_base)


def at_points(a: Node, b: Node, log_base: Fraction | None = None) -> Decision:
    """The numeric stage alone."""
    stage = Stage.NUMERIC
    both = tree.add(a, b)
    names = sorted(tree.symbols(both) - tree.bound(both))
    if len(names) > MAX_SYMBOLS:
        raise TooMuchError(f"more than {MAX_SYMBOLS} variables")
    real = tree.IMAGINARY not in both
    bare_log = any(n.kind == "fn" and n.name == "log" for n in both)
    constant = not names and not (bare_log and log_base is None)
    for reals in (True, False) if real else (False,):
        agreed = outside = 0
        for point in points(names, both):
            if bare_log:
                base = random.Random(len(point)).randrange(100, 10_000)
                point = point | {LOG_BASE: Fraction(base) if log_base is None else log_base}
            try:
                sign = difference_at(a, b, point, reals, MOST_DIGITS if constant else 4 * DIGITS)
            except ComplexError:
                outside += _defined(a, point) != _defined(b, point)
                continue
            except UndefinedError:
                continue
            if sign is Sign.NONZERO:
                return different(stage, _how(a, b, point, reals) if constant else "unequal")
            agreed += sign is Sign.ZERO
            if agreed >= POINTS or constant:
                break
        if agreed and (constant or agreed >= POINTS // 2):
            if outside and _has_abs(a) != _has_abs(b):
                return undecided(stage, "equal only where both are defined")
            return equal(stage)
    return undecided(stage, "no point was found where both have a value")


def points(names: list[str], node: Node) -> Iterator[dict[str, Fraction]]:
    """Points to compare at, always the same ones: whole where `node` has a function of whole
    numbers, small where it would grow too fast."""
    if not names:
        yield {}
        return
    functions = {n.name for n in node if n.kind == "fn"}
    draw = random.Random(20_240_607)
    for trial in range(TRIES):
        point = {}
        for name in names:
            if functions & _COUNTS:
                point[name] = Fraction(draw.randrange(1, 12 + trial))
            elif functions & _STEPS and name in _WHOLE_NAMES:
                low, high = _WHOLE_RANGES[trial % len(_WHOLE_RANGES)]
                point[name] = Fraction(draw.randrange(low, high))
            else:
                low, high = _RANGES[trial % len(_RANGES)]
                point[name] = Fraction(2 * draw.randrange(low * 1009, high * 1009) + 1, 2018)
        yield point


def difference_at(
    a: Node, b: Node, point: dict[str, Fraction], real: bool, most: int = 4 * DIGITS
) -> Sign:
    """Whether a - b is zero at a point. Raises as `at`."""
    digits = DIGITS
    left, right = (at(side, point, digits, real=real) for side in (a, b))
    while digits < most:
        digits *= 2
        finer_left, finer_right = (at(side, point, digits, real=real) for side in (a, b))
        with mp.workdps(digits + 15):
            coarse, fine = left - right, finer_left - finer_right
            if abs(coarse - fine) < abs(fine) * mp.mpf(10) ** -8:
                return Sign.ZERO if fine == 0 else Sign.NONZERO
        left, right = finer_left, finer_right
    with mp.workdps(digits + 15):
        size = max(abs(left), abs(right), mp.mpf(10) ** (-digits // 3))
        small = abs(left - right) < size * mp.mpf(10) ** (-digits * 4 // 5)
    return Sign.ZERO if small else Sign.UNKNOWN


def _has_abs(node: Node) -> bool:
    """ln|x| and ln x differ in more than what goes without saying; ln xy and ln x + ln y do not."""
    return any(n.kind == "fn" and n.name == "abs" for n in node)


def _defined(node: Node, point: dict[str, Fraction]) -> bool:
    try:
        at(node, point, DIGITS, real=True)
    except (ComplexError, UndefinedError):
        return False
    return True


def _how(a: Node, b: Node, point: dict[str, Fraction], real: bool) -> str:
    left, right = (at(side, point, DIGITS, real=real) for side in (a, b))
    with mp.workdps(DIGITS):
        off = abs(left - right) / max(abs(left), abs(right))
        return f"unequal, by {mp.nstr(off, 2)} of the larger"


def is_constant(node: Node) -> bool:
    return not tree.symbols(node)


def order(node: Node) -> float | None:
    """An approximate real value, to sort by; None where there is none."""
    sign = infinity(node)
    if sign is not None:
        return sign * float("inf")
    try:
        found = at(node, {LOG_BASE: Fraction(10)}, 20, real=tree.IMAGINARY not in node)
        return float(found) if isinstance(found, mp.mpf) else None
    except (ComplexError, UndefinedError, UnreadableError, KeyError, OverflowError):
        return None
