"""Answers with names: "x = 3" and "3", "f(x) = 2x" and "f(n) = 2n", "a = 1, b = 2"."""

from __future__ import annotations

from shared.grading import reals, tree
from shared.grading.tree import Node
from shared.grading.verdict import Compare, Decision, Stage, different

ITEMS = frozenset({"list", "either", "both", "set"})
_HERE = Stage.STRUCTURE


def assignment(node: Node) -> tuple[Node, Node] | None:
    """("x", value) of "x = value" or "value = x", where the value does not use the name."""
    if node.kind != "rel" or node.name not in ("=", "in"):
        return None
    left, right = node.args
    for name, value in ((left, right), (right, left)):
        if _is_name(name, value) and all(part != name for part in value):
            if node.name == "in" and name is not left:
                return None
            return name, value
    return None


def _is_name(node: Node, value: Node) -> bool:
    """x, f(x), or a length AB."""
    if node.kind == "mul":
        parts = [arg.args[0] if arg.kind == "pow" else arg for arg in node.args]
        names = [part.name if part.kind == "sym" else "" for part in parts]
        if all(len(name) > 1 and name[0] == "d" for name in names):
            return True  # dy/dx
        lengths = all(name.isupper() or name.startswith("angle ") or name == "m" for name in names)
        return lengths and not tree.symbols(value)
    if node.kind == "add":  # m + n = 12: the sum is what was asked for
        return all(arg.kind == "sym" for arg in node.args) and not tree.symbols(value)
    return node.kind in ("sym", "app")


def names(a: Node, b: Node, compare: Compare) -> Decision | None:
    mine, gold = assignment(a), assignment(b)
    if mine is None and gold is None:
        return None
    if mine is not None and gold is not None:
        return _two_names(a, b, mine, gold, compare)
    value, other = (mine[1], b) if mine else (gold[1], a) if gold else (a, b)
    if other.kind in ("rel", "chain") or reals.is_condition(other):
        return None
    if other.kind in ("list", "either") and any(assignment(arg) for arg in other.args):
        return None
    return compare(value, other)


def _two_names(
    a: Node, b: Node, mine: tuple[Node, Node], gold: tuple[Node, Node], compare: Compare
) -> Decision | None:
    (left, x), (right, y) = mine, gold
    if left == right:
        found = compare(x, y)
        return found if not tree.symbols(x) or found.equal else None
    if {left.kind, right.kind} - {"sym", "app"}:
        return None
    if left.kind == right.kind == "app":
        if left.name == right.name and len(left.args) == len(right.args):
            for old, new in zip(left.args, right.args, strict=True):
                if old.kind != "sym" or new.kind != "sym" or new in x or old in y:
                    return None
                x = tree.replace(x, old, new)
            return compare(x, y)
    elif left.kind != right.kind:
        return compare(x, y)  # y = 2x and f(x) = 2x
    if tree.symbols(x) | tree.symbols(y):
        return None
    return different(_HERE, "values of different names")


def system(node: Node) -> dict[Node, Node] | None:
    """a = 1, b = 2."""
    pairs = [assignment(arg) for arg in node.args] if node.kind in ITEMS else []
    found = {pair[0]: pair[1] for pair in pairs if pair is not None}
    return found if len(found) == len(node.args) >= 2 else None


def common_name(node: Node) -> Node:
    """x = 1 or x = 2  ->  1 or 2;  x = 1, 2  ->  1, 2."""
    if node.kind not in ITEMS or not node.args:
        return node
    pairs = [assignment(arg) for arg in node.args]
    names = {_unnumbered(pair[0]) for pair in pairs if pair is not None}
    if len(names) != 1 or pairs[0] is None:
        return node
    if any(p is None and not tree.is_scalar(n) for p, n in zip(pairs, node.args, strict=True)):
        return node
    values = (p[1] if p else n for p, n in zip(pairs, node.args, strict=True))
    return Node(node.kind, "", tuple(values))


def _unnumbered(name: Node) -> Node:
    """x_1, x_2: solutions for one x."""
    stem, _, index = name.name.partition("_")
    return tree.sym(stem) if name.kind == "sym" and index.isdigit() else name
