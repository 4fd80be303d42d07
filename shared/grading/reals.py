r"""Sets of real numbers: intervals, unions, inequalities in one variable, finite sets.

The end points of both sets cut the line into points and gaps. Two sets are equal when they hold the
same of these; union, intersection and complement need no more than that.

    x < 3 or x > 5   ==   (-\infty, 3) \cup (5, \infty)   ==   R \setminus [3, 5]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from shared.grading import scalars, tree
from shared.grading.caps import UnreadableError
from shared.grading.tree import Node
from shared.grading.values import UndefinedError, exact
from shared.grading.verdict import Decision, Stage, Value, different, equal, undecided

_FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
    "!=": operator.ne,
}  # fmt: skip
_SETS = frozenset({"bracket", "set", "union", "meet", "without", "all", "either", "both", "list",
                   "rel", "chain"})  # fmt: skip


def compare(a: Node, b: Node) -> Decision | None:
    """None where one of the two is not read as a set of real numbers."""
    try:
        if any(map(_backwards, (a, b))):
            return None
        names = [_variable(side) for side in (a, b)]
        line = _Line()
        for side in (a, b):
            line.collect(_solved(side))
    except (UnreadableError, UndefinedError):
        return None
    if None not in names and names[0] != names[1]:
        return different(Stage.STRUCTURE, "conditions on different variables")
    if not line.sort():
        return undecided(Stage.STRUCTURE, "end points that cannot be compared")
    left, right = _solved(a), _solved(b)
    for place in range(2 * len(line.points) + 1):
        if line.holds(left, place) != line.holds(right, place):
            return different(Stage.STRUCTURE, "sets with different numbers in them")
    return equal(line.stage)


def is_condition(node: Node) -> bool:
    """An inequality, or several."""
    if node.kind in ("either", "both", "list", "chain"):
        return any(is_condition(arg) for arg in node.args)
    return node.kind == "rel" and node.name in ("<", ">", "<=", ">=", "!=")


def _backwards(node: Node) -> bool:
    """(5, 2): a pair, or a mistake, but no interval."""
    if node.kind != "bracket":
        return False
    low, high = (scalars.order(end) for end in node.args)
    return low is None or high is None or low > high


def _variable(node: Node) -> str | None:
    """The one variable that the conditions are on. Raises UnreadableError for several."""
    names = tree.symbols(node)
    if len(names) > 1 or (names and node.kind in ("bracket", "set", "union", "all")):
        raise UnreadableError("conditions on several variables")
    return next(iter(names), None)


def _solved(node: Node) -> Node:
    """Every condition as "variable relation constant"."""
    if node.kind not in _SETS:
        raise UnreadableError(f"a {node.kind} is no set")
    if node.kind == "list" and not is_condition(node):
        return Node("set", "", node.args)
    if node.kind == "list" and _exclusive(node):
        return _solved(Node("either", "", node.args))
    if node.kind in ("either", "both", "list", "chain", "union", "meet", "without"):
        kind = "both" if node.kind in ("list", "chain", "meet") else node.kind
        kind = "either" if kind == "union" else kind
        return Node(kind, "", tuple(_solved(arg) for arg in node.args))
    if node.kind == "all" and node.name != "R":
        raise UnreadableError("not the real numbers")
    if node.kind != "rel":
        return node
    left, right = node.args
    if left.kind == "fn" and left.name == "abs" and not tree.symbols(right):
        return _distance(node.name, left.args[0], right)
    if node.name == "in":
        if left.kind != "sym":
            raise UnreadableError("membership of an expression")
        return _solved(right)
    if left.kind != "sym" and right.kind == "sym":
        left, right, node = right, left, tree.rel(_FLIP.get(node.name, "?"), right, left)
    if left.kind == "sym" and not tree.symbols(right) and node.name in _FLIP:
        return node
    return _linear(node)


def _distance(sign: str, inside: Node, size: Node) -> Node:
    """|x - 1| < 2 is -2 < x - 1 < 2."""
    low, high = tree.rel(_FLIP.get(sign, "?"), inside, tree.neg(size)), tree.rel(sign, inside, size)
    if sign not in ("<", "<=", ">", ">="):
        raise UnreadableError("a distance that is no bound")
    kind = "both" if sign[0] == "<" else "either"
    return _solved(Node(kind, "", (low, high)))


def _exclusive(node: Node) -> bool:
    """x < 1, x > 2: with a comma, but it can only mean "or"."""
    try:
        solved = [_solved(arg) for arg in node.args]
    except UnreadableError:
        return False
    if len(solved) != 2 or any(part.kind != "rel" for part in solved):
        return False
    below, above = sorted(solved, key=lambda part: part.name[0])
    ends = [scalars.order(part.args[1]) for part in (below, above)]
    if (below.name[0], above.name[0]) != ("<", ">") or ends[0] is None or ends[1] is None:
        return False
    return ends[0] < ends[1]


def _linear(node: Node) -> Node:
    """2x - 1 < 5  ->  x < 3."""
    names = tree.symbols(node)
    if len(names) != 1 or node.name not in _FLIP:
        raise UnreadableError("no condition on one variable")
    name = tree.sym(next(iter(names)))
    difference = tree.sub(*node.args)
    at = [exact(tree.replace(difference, name, tree.num(n))) for n in (0, 1, 2, 3, 7, -5)]
    values = [value for value in at if value is not None]
    if len(values) < len(at):
        raise UnreadableError("a condition that is not linear")
    slope = values[1] - values[0]
    straight = all(v == values[0] + slope * n for v, n in zip(values, (0, 1, 2, 3, 7, -5)))  # noqa: B905
    if slope == 0 or not straight:
        raise UnreadableError("a condition that is not linear")
    sign = node.name if slope > 0 else _FLIP[node.name]
    return tree.rel(sign, name, tree.num(Fraction(-values[0] / slope)))


@dataclass
class _Line:
    """Place 2k is the gap before point k, place 2k + 1 the point itself."""

    points: list[list[Node]] = field(default_factory=list)  # equal nodes are one point
    found: list[Node] = field(default_factory=list)
    places: dict[Node, float] = field(default_factory=dict)
    stage: Stage = Stage.STRUCTURE

    def collect(self, node: Node) -> None:
        match node.kind:
            case "bracket" | "set":
                ends = node.args
            case "rel":
                ends = node.args[1:]
            case "all":
                ends = ()
            case _:
                for arg in node.args:
                    self.collect(arg)
                return
        for end in ends:
            if not tree.is_scalar(end) or tree.symbols(end):
                raise UnreadableError("an end point that is no number")
            self.found.append(end)

    def sort(self) -> bool:
        """False where the order of two end points is not certain."""
        keyed = []
        for node in dict.fromkeys(self.found):
            value = scalars.order(node)
            if value is None:
                return False
            keyed.append((value, node))
        keyed.sort(key=lambda pair: pair[0])
        last: float | None = None
        for value, node in keyed:
            if math.isinf(value):
                self.places[node] = value
                continue
            if last is not None and math.isclose(value, last, rel_tol=1e-9, abs_tol=1e-12):
                same = scalars.compare(self.points[-1][0], node)
                if same.value is Value.UNDECIDED or (not same.equal and value == last):
                    return False
                if same.equal:
                    self.stage = same.at(self.stage).stage
                    self.points[-1].append(node)
                    continue
            self.points.append([node])
            last = value
        for place, nodes in enumerate(self.points):
            for node in nodes:
                self.places[node] = 2 * place + 1
        return True

    def holds(self, node: Node, place: int) -> bool:
        match node.kind:
            case "all":
                return True
            case "set":
                return any(self.places[arg] == place for arg in node.args)
            case "bracket":
                low, high = (self.places[arg] for arg in node.args)
                shape = node.name
                return (place > low or (place == low and shape[0] == "[")) and (
                    place < high or (place == high and shape[1] == "]")
                )
            case "either":
                return any(self.holds(arg, place) for arg in node.args)
            case "both":
                return all(self.holds(arg, place) for arg in node.args)
            case "without":
                return self.holds(node.args[0], place) and not self.holds(node.args[1], place)
            case "rel":
                end = self.places[node.args[1]]
                return _HOLDS[node.name](place, end)
        raise AssertionError(node.kind)
