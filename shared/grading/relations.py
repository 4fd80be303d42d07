"""Equations and inequalities that are no plain sets: equal where one is a multiple of the other."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from shared.grading import scalars, symbolic, tree
from shared.grading.tree import Node
from shared.grading.values import LOG_BASE, ComplexError, UndefinedError, at
from shared.grading.verdict import Compare, Decision, Stage, different, equal, every, undecided

_HERE = Stage.STRUCTURE


def relations(a: Node, b: Node, compare: Compare) -> Decision | None:
    links = [_links(side) for side in (a, b)]
    if not all(links):
        return None
    if len(links[0]) != len(links[1]):
        return undecided(_HERE, "another number of relations")
    if len(links[0]) == 1:
        return _proportional(links[0][0], links[1][0], compare)
    left = list(links[1])
    for link in links[0]:
        found = [_proportional(link, other, compare) for other in left]
        place = next((i for i, one in enumerate(found) if one.equal), None)
        if place is None:
            return every(found)
        del left[place]
    return equal(Stage.SYMBOLIC)


def _links(node: Node) -> list[Node]:
    """Every relation with "<", "<=", "=" or "!=" only."""
    parts = node.args if node.kind in ("chain", "list", "both") else (node,)
    found = []
    for part in parts:
        if part.kind != "rel" or not all(map(tree.is_scalar, part.args)):
            return []
        swapped = {">": "<", ">=": "<="}.get(part.name)
        found.append(tree.rel(swapped, *part.args[::-1]) if swapped else part)
    return found


def _proportional(a: Node, b: Node, compare: Compare) -> Decision:
    """l - r of one is that of the other, times a constant (a positive one for inequalities)."""
    if a.name != b.name:
        return different(_HERE, "different relations")
    if not tree.symbols(a) or not tree.symbols(b):
        return every(compare(x, y) for x, y in zip(a.args, b.args, strict=True))
    mine, gold = tree.sub(*a.args), tree.sub(*b.args)
    if a.name in ("=", "!="):
        mine, gold = symbolic.numerator(mine) or mine, symbolic.numerator(gold) or gold
    for point in _points(mine, gold):
        left, right = _inserted(mine, point), _inserted(gold, point)
        signs = [_sign(side) for side in (left, right)]
        if 0 in signs or None in signs:
            if signs[0] != signs[1]:
                return different(Stage.NUMERIC, "one holds where the other does not")
            continue
        if a.name in ("<", "<=") and signs[0] != signs[1]:
            return different(Stage.NUMERIC, "one holds where the other does not")
        found = scalars.compare(tree.mul(mine, right), tree.mul(gold, left))
        return found.at(Stage.SYMBOLIC) if found.equal else found
    return undecided(Stage.NUMERIC, "no point to compare at")


def _points(a: Node, b: Node) -> Iterator[dict[str, Fraction]]:
    both = tree.add(a, b)
    yield from scalars.points(sorted(tree.symbols(both)), both)


def _inserted(node: Node, point: dict[str, Fraction]) -> Node:
    return tree.mapped(node, "sym", lambda n: tree.num(point[n.name]))


def _sign(node: Node) -> int | None:
    try:
        value = at(node, {LOG_BASE: Fraction(10)}, 40, real=True)
    except (ComplexError, UndefinedError):
        return None
    return 0 if abs(value) < 1e-30 else 1 if value > 0 else -1
