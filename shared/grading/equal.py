r"""Are two trees equal? By their structure, down to scalars.

What one side leaves out is forgiven where it can mean only one thing: a name ("x = 3" and "3"), a
unit ("5 cm" and "5"), the braces of a set ("1, 2" and "\{2, 1\}"). Where it could mean two things
the pair is undecided: a percent sign, the base of a numeral, the brackets of a tuple.
"""

from __future__ import annotations

from shared.grading import families, items, labels, naming, reals, relations, scalars, tree
from shared.grading.settle import settled
from shared.grading.tree import Node
from shared.grading.verdict import Compare, Decision, Rule, Stage, different, equal, undecided

_HERE = Stage.STRUCTURE


def compare(a: Node, b: Node) -> Decision:
    """Raises TooMuchError or UnreadableError, nothing else."""
    a, b = settled(a, compare), settled(b, compare)
    if a == b:
        return equal(_HERE)
    for rule in _RULES:
        found = rule(a, b, compare)
        if found is not None:
            return found
    kinds = sorted({tree.kind(a), tree.kind(b)})
    if len(kinds) == 2:
        return different(_HERE, f"a {kinds[0]} and a {kinds[1]}")
    return undecided(_HERE, f"no rule compares a {a.kind} with a {b.kind}")


def _scalars(a: Node, b: Node, _: Compare) -> Decision | None:
    if not (tree.is_scalar(a) and tree.is_scalar(b)):
        return None
    if _is_lettering(a) and _is_lettering(b) and set(a.args) == set(b.args):
        return undecided(_HERE, "the same letters in another order")
    return families.compare(a, b) or scalars.compare(a, b)


def _is_lettering(node: Node) -> bool:
    """AB: a product of matrices, a vector, a word, where order counts."""
    return node.kind == "mul" and all(n.kind == "sym" and n.name.isupper() for n in node.args)


def _sets(a: Node, b: Node, _: Compare) -> Decision | None:
    return reals.compare(a, b)


_RULES: tuple[Rule, ...] = (
    labels.choices,
    labels.texts,
    labels.fields,
    labels.residues,
    labels.based,
    labels.quantities,
    naming.names,
    items.signs,
    items.shapes,
    labels.ratios,
    _scalars,
    items.intervals,
    items.collections,
    _sets,
    relations.relations,
)
