"""Matrices of nodes: made of rows, and their determinants."""

from __future__ import annotations

from shared.grading import tree
from shared.grading.caps import UnreadableError
from shared.grading.tree import Node


def matrix(rows: list[list[Node]]) -> Node:
    if not rows or len({len(row) for row in rows}) != 1:
        raise UnreadableError("a matrix with ragged rows")
    shape = f"{len(rows)} x {len(rows[0])}"
    return Node("matrix", shape, tuple(cell for row in rows for cell in row))


def from_rows(items: tuple[Node, ...]) -> Node:
    """[[1, 2], [3, 4]] -> a matrix; [1, 2, 3] -> a tuple."""
    rows = [item for item in items if item.kind in ("bracket", "tuple")]
    if len(rows) == len(items) and len({len(row.args) for row in rows}) == 1:
        return matrix([list(row.args) for row in rows])
    return Node("tuple", "", items)


def determinant(node: Node) -> Node:
    """By the first row. Raises UnreadableError for what is no small square matrix."""
    side = next((n for n in range(1, 5) if node.name == f"{n} x {n}"), 0)
    if node.kind != "matrix" or not side:
        raise UnreadableError("the determinant of what is no square matrix, or of a large one")
    return _minors([list(node.args[i * side : (i + 1) * side]) for i in range(side)])


def _minors(rows: list[list[Node]]) -> Node:
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for column, head in enumerate(rows[0]):
        rest = [row[:column] + row[column + 1 :] for row in rows[1:]]
        term = tree.mul(head, _minors(rest))
        terms.append(tree.neg(term) if column % 2 else term)
    return tree.add(*terms)
