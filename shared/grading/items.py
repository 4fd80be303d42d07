"""Answers of several parts: tuples, matrices, intervals, lists, sets, both signs of a term."""

from __future__ import annotations

from shared.grading import reals, tree
from shared.grading.caps import MAX_ITEMS, TooMuchError
from shared.grading.naming import ITEMS, assignment, common_name, system
from shared.grading.tree import Node
from shared.grading.verdict import (
    Compare,
    Decision,
    Stage,
    Value,
    different,
    equal,
    every,
    undecided,
)

_HERE = Stage.STRUCTURE


def signs(a: Node, b: Node, compare: Compare) -> Decision | None:
    r"""\pm stands for two answers."""
    if not any(n.kind == "pm" for side in (a, b) for n in side):
        return None
    return compare(_expanded(a), _expanded(b))


def _expanded(node: Node) -> Node:
    if not any(n.kind == "pm" for n in node):
        return node
    if node.kind in ITEMS:
        parts = [part for arg in node.args for part in _both_signs(arg)]
        if len(parts) > MAX_ITEMS:
            raise TooMuchError(f"more than {MAX_ITEMS} items")
        return Node(node.kind, "", tuple(parts))
    return Node("list", "", tuple(_both_signs(node)))


def _both_signs(node: Node) -> list[Node]:
    """All signs of one expression go together, \\mp against them."""
    if not any(n.kind == "pm" for n in node):
        return [node]

    def with_sign(sign: str) -> Node:
        return tree.mapped(
            node, "pm", lambda pm: pm.args[0] if pm.name[0] == sign else tree.neg(pm.args[0])
        )

    return [with_sign("+"), with_sign("-")]


def shapes(a: Node, b: Node, compare: Compare) -> Decision | None:
    """Tuples, vectors and matrices: by components."""
    shapes = [tree.components(side) for side in (a, b)]
    if None in shapes or (a.kind == b.kind == "bracket" and not a.name == b.name == "()"):
        return None
    mine, gold = (shape for shape in shapes if shape is not None)
    if a.kind == b.kind == "matrix" and a.name != b.name:
        return different(_HERE, "matrices of different shapes")
    if len(mine) != len(gold):
        return different(_HERE, f"{len(mine)} components and {len(gold)}")
    if a.kind != b.kind and "matrix" in (a.kind, b.kind):
        matrix = a if a.kind == "matrix" else b
        if not matrix.name.endswith("x 1") and not matrix.name.startswith("1 x"):
            return different(_HERE, "a matrix and a tuple")
    return every(compare(x, y) for x, y in zip(mine, gold, strict=True))


def intervals(a: Node, b: Node, compare: Compare) -> Decision | None:
    """Two intervals whose ends may hold variables."""
    if not (a.kind == b.kind == "bracket"):
        return None
    found = reals.compare(a, b)
    if found is not None:
        return found
    if a.name != b.name:
        return different(_HERE, "open and closed ends")
    return every(compare(x, y) for x, y in zip(a.args, b.args, strict=True))


def collections(a: Node, b: Node, compare: Compare) -> Decision | None:
    systems = [system(side) for side in (a, b)]
    if (systems[0] is None) != (systems[1] is None):
        named, other = (a, b) if systems[1] is None else (b, a)
        solutions = common_name(named)  # x_1 = 1, x_2 = 2
        if solutions != named and other.kind in ITEMS:
            return _multisets(solutions, common_name(other), compare)
    if systems[0] is not None or systems[1] is not None:
        return _systems(a, b, systems[0], systems[1], compare)
    if any(reals.is_condition(side) for side in (a, b)):
        return None
    a, b = (common_name(side) for side in (a, b))
    if a.kind in ITEMS and b.kind in ITEMS:
        return _multisets(a, b, compare)
    for items, other in ((a, b), (b, a)):
        if items.kind in ("list", "either") and tree.components(other) is not None:
            if len(items.args) != len(other.args):
                return different(_HERE, "a list and a tuple of another length")
            found = every(compare(x, y) for x, y in zip(items.args, other.args, strict=True))
            if found.equal:
                return undecided(_HERE, "a list without the brackets of a tuple")
            return different(found.stage, "a list and a tuple")
        if items.kind == "set" and len(items.args) == 1 and tree.is_scalar(other):
            return compare(items.args[0], other)
        if items.kind in ITEMS and tree.is_scalar(other):
            if items.args and all(compare(item, other).equal for item in items.args):
                return undecided(_HERE, "the same answer, several times")
            return different(_HERE, "several answers and one")
    return None


def _systems(
    a: Node,
    b: Node,
    mine: dict[Node, Node] | None,
    gold: dict[Node, Node] | None,
    compare: Compare,
) -> Decision | None:
    if mine is not None and gold is not None:
        if set(mine) == set(gold):
            return every(compare(mine[name], gold[name]) for name in mine)
        if all(n.kind == "sym" for n in (*mine, *gold)):
            return different(_HERE, "values of different names")
        return _multisets(a, b, compare)
    values = tuple((mine or gold or {}).values())
    other = b if mine is not None else a
    if other.kind in ITEMS and any(assignment(arg) for arg in other.args):
        return different(_HERE, "values of different names")
    components = tree.components(other) or (
        other.args if other.kind in ("list", "either") else None
    )
    if components is None or len(components) != len(values):
        return different(_HERE, "named values and something else")
    return every(compare(x, y) for x, y in zip(values, components, strict=True))


def _multisets(a: Node, b: Node, compare: Compare) -> Decision:
    """Order does not matter; how often something is said matters only outside of braces."""
    mine, gold = list(a.args), list(b.args)
    if "set" in (a.kind, b.kind):
        mine, gold = _distinct(mine, compare), _distinct(gold, compare)
    if len(mine) != len(gold):
        if mine and gold and len(_distinct(mine, compare)) == len(_distinct(gold, compare)):
            found = _matched(_distinct(mine, compare), _distinct(gold, compare), compare)
            if found.equal:
                return undecided(_HERE, "equal but for what is said twice")
        return different(_HERE, f"{len(mine)} answers and {len(gold)}")
    texts = all(node.kind == "text" for node in (*mine, *gold))
    found = _matched(mine, gold, compare)
    if found.equal and texts and not every(map(compare, mine, gold)).equal:
        return undecided(_HERE, "the same words in another order")
    return found


def _matched(mine: list[Node], gold: list[Node], compare: Compare) -> Decision:
    stage, doubt, left = _HERE, "", list(gold)
    for item in mine:
        for place, other in enumerate(left):
            found = compare(item, other)
            if found.equal:
                stage = found.at(stage).stage
                del left[place]
                break
            if found.value is Value.UNDECIDED:
                doubt = found.reason
        else:
            if doubt:
                return undecided(_HERE, doubt)
            return different(_HERE, "one answer has no partner")
    return equal(stage)


def _distinct(nodes: list[Node], compare: Compare) -> list[Node]:
    kept: list[Node] = []
    for node in nodes:
        if not any(compare(node, other).equal for other in kept):
            kept.append(node)
    return kept
