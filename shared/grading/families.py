r"""Families of angles: \pi/2 + k\pi for every whole k is \pi/2 + n\pi.

That k is any whole number is mostly left unsaid, so only a change of its name is forgiven; what is
the same family in another guise (3\pi/2 - k\pi), or could be a mere product (k\pi), is undecided.
"""

from __future__ import annotations

from fractions import Fraction

from shared.grading import scalars, tree
from shared.grading.tree import Node
from shared.grading.values import UndefinedError, exact
from shared.grading.verdict import Decision, Stage, different, equal, undecided

_WHOLE = frozenset("knm")
_SAID = "\N{ELEMENT OF}Z"  # mark of a variable that the answer itself calls whole
_PROBES = (0, 1, 2, 5, -3)


def marked(node: Node, names: frozenset[str]) -> Node:
    """`node` with a mark on the variables that stand for every whole number."""
    if len(names) == 1 and (name := next(iter(names))) and not name.endswith(_SAID):
        return tree.replace(node, tree.sym(name), tree.sym(f"k{_SAID}"))
    return node


def compare(a: Node, b: Node) -> Decision | None:
    """None unless both are families."""
    said = any(name.endswith(_SAID) for name in tree.symbols(a) | tree.symbols(b))
    if said:
        a, b = _renamed(a), _renamed(b)
    mine, gold = _family(a), _family(b)
    if mine is None or gold is None:
        return scalars.compare(a, b) if said else None
    (start, step), (other, step_2) = mine, gold
    if mine == gold and (said or start or tree.symbols(a) == tree.symbols(b)):
        return equal(Stage.STRUCTURE)
    if abs(step) == abs(step_2) and ((start - other) / step).denominator == 1:
        if said:
            return equal(Stage.STRUCTURE)
        return undecided(Stage.STRUCTURE, "the same if it stands for every whole number")
    return different(Stage.STRUCTURE, "different families")


def _renamed(node: Node) -> Node:
    """The one variable that may be whole, under the name k."""
    names = [n for n in tree.symbols(node) if n in _WHOLE or n.endswith(_SAID)]
    return tree.replace(node, tree.sym(names[0]), tree.sym("k")) if len(names) == 1 else node


def _family(node: Node) -> tuple[Fraction, Fraction] | None:
    r"""(start, step) in units of \pi, of what is linear in one whole variable and in \pi."""
    names = tree.symbols(node)
    if len(names) != 1 or not names <= _WHOLE:
        return None
    if any(n.kind in ("pow", "fn", "root", "app") and tree.symbols(n) for n in node):
        return None
    node = _in_turns(node)
    if tree.PI not in node:
        return None
    name = tree.sym(next(iter(names)))
    values = []
    for times in (1, 2):  # \pi as a number: what is linear in it doubles
        plain = tree.replace(node, tree.PI, tree.num(times))
        for probe in _PROBES:
            try:
                value = exact(tree.replace(plain, name, tree.num(probe)))
            except UndefinedError:
                return None
            if value is None:
                return None
            values.append(value / times)
    start, step = values[0], values[1] - values[0]
    if step == 0 or any(v != start + step * p for v, p in zip(values, _PROBES * 2, strict=True)):
        return None
    return start, step


def _in_turns(node: Node) -> Node:
    r"""Degrees as multiples of \pi."""
    if node.kind == "deg":
        return tree.mul(node.args[0], tree.PI, tree.num(Fraction(1, 180)))
    return Node(node.kind, node.value, tuple(_in_turns(arg) for arg in node.args))
