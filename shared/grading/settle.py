r"""An answer without what it says twice, or only to be polite, before anything is compared.

x = 1/2 = 0.5      ->  x = 1/2          2/3 \approx 0.67   ->  2/3
x = k\pi, k \in Z  ->  x = k\pi (k marked as whole)      (x, y) = (1, 2)  ->  x = 1, y = 2
"""

from __future__ import annotations

import math

from shared.grading import families, reals, scalars, tree
from shared.grading.caps import UnreadableError
from shared.grading.tree import Node
from shared.grading.verdict import Compare

_VECTORS = frozenset({"matrix", "tuple", "bracket"})


def settled(node: Node, compare: Compare) -> Node:
    r"""Without what adds nothing: "= 0.56 = 56%", "\approx 0.67", "k \\in Z" beside a family.

    Raises UnreadableError where an answer contradicts itself.
    """
    if node.kind == "rel" and node.name == "~":
        left, right = node.args
        if left.kind in ("sym", "app"):
            return tree.rel("=", left, right)
        _check_about(left, right)
        return left
    if node.kind == "rel" and node.name == "=" and _is_vector_equation(node):
        pairs = zip(node.args[0].args, node.args[1].args, strict=True)
        return Node("list", "", tuple(tree.rel("=", name, value) for name, value in pairs))
    if node.kind == "rel" and node.name == "in" and node.args[1].kind == "set":
        choices = (tree.rel("=", node.args[0], value) for value in node.args[1].args)
        return Node("either", "", tuple(choices)) if len(node.args[1].args) > 1 else node
    if node.kind == "mul" and sum(arg.kind in _VECTORS for arg in node.args) == 1:
        return _scaled(node)
    if node.kind == "rel" and node.name == "in" and node.args[0].kind in ("tuple", "bracket"):
        return node.args[0] if node.args[1].kind == "all" else node
    if node.kind == "chain" and all(link.name in "=~" for link in node.args):
        return _one_of_chain(node, compare)
    if node.kind == "rel" and node.name == "=" and not tree.symbols(node):
        return _one_of_chain(Node("chain", "", (node,)), compare)
    if node.kind in ("list", "both"):
        kept = tuple(arg for arg in node.args if not _is_integrality(arg))
        if kept and len(kept) < len(node.args):
            whole = frozenset[str]().union(*map(tree.symbols, set(node.args) - set(kept)))
            kept = tuple(families.marked(arg, whole) for arg in kept)
            return settled(kept[0] if len(kept) == 1 else Node(node.kind, "", kept), compare)
    if node.kind == "both" and not reals.is_condition(node):
        return Node("list", "", node.args)
    return node


def _scaled(node: Node) -> Node:
    """A number times a matrix or a vector."""
    vector = next(arg for arg in node.args if arg.kind in _VECTORS)
    factors = [arg for arg in node.args if arg is not vector]
    if not all(map(tree.is_scalar, factors)) or (
        vector.value not in ("", "()") and "x" not in vector.name
    ):
        return node
    return Node(vector.kind, vector.value, tuple(tree.mul(*factors, x) for x in vector.args))


def _is_vector_equation(node: Node) -> bool:
    """(x, y) = (1, 2)."""
    sides = [tree.components(side) for side in node.args]
    if sides[0] is None or sides[1] is None or len(sides[0]) != len(sides[1]):
        return False
    return all(part.kind == "sym" for part in sides[0])


def _one_of_chain(node: Node, compare: Compare) -> Node:
    """x = 1/2 = 0.5 -> x = 1/2: the parts must agree."""
    terms = [node.args[0].args[0]]
    for link in node.args:
        if link.name == "~" and terms[-1].kind not in ("sym", "app"):
            _check_about(terms[-1], link.args[1])
            break
        terms.append(link.args[1])
    name = terms[0] if terms[0].kind in ("sym", "app") else None
    values = [term for term in terms if term is not name]
    if name is None and any(tree.symbols(term) for term in terms):
        return node
    if not values:
        return node
    for other in values[1:]:
        if not compare(values[0], other).equal:
            raise UnreadableError("an answer that says two different things")
    last = values[-1] if tree.symbols(values[0]) else values[0]
    return last if name is None else tree.rel("=", name, last)


def _check_about(exactly: Node, about: Node) -> None:
    """Raises UnreadableError where one is not roughly the other."""
    values = [scalars.order(n.args[0] if n.kind == "measure" else n) for n in (exactly, about)]
    one, other = values
    if one is not None and other is not None and not math.isclose(one, other, rel_tol=0.05):
        raise UnreadableError("an answer that says two different things")


def _is_integrality(node: Node) -> bool:
    r"""k \in \mathbb{Z}."""
    return (
        node.kind == "rel"
        and node.name == "in"
        and node.args[0].kind in ("sym", "list")
        and node.args[1].kind == "all"
        and node.args[1].name in "ZN"
    ) or (node.kind == "text" and "integer" in node.name)
