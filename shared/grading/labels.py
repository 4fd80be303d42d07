r"""What stands beside a value or in its place: choices, words, units, percent signs, bases, moduli.

Rules take two settled trees and `compare`; None means that a rule has nothing to say.
"""

from __future__ import annotations

from shared.grading import parse, scalars, tree
from shared.grading.caps import UnreadableError
from shared.grading.tree import Node
from shared.grading.units import unit
from shared.grading.values import exact
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


def choices(a: Node, b: Node, compare: Compare) -> Decision | None:
    if "choice" not in (a.kind, b.kind):
        return None
    if a.kind != "choice":
        a, b = b, a
    rest = a.args[0] if a.args else None
    if b.kind == "choice":
        if a.name != b.name:
            return different(_HERE, "different choices")
        if rest is not None and b.args and compare(rest, b.args[0]).value is Value.DIFFERENT:
            return undecided(_HERE, "the same letter with different texts")
        return equal(_HERE)
    if b.kind == "sym" and len(b.name) == 1:
        same = a.name == b.name.upper()
        return equal(_HERE) if same else different(_HERE, "different choices")
    if b in (tree.E, tree.IMAGINARY):
        return equal(_HERE) if a.name == b.name.upper() else different(_HERE, "different choices")
    if rest is not None:
        return compare(rest, b)
    return undecided(_HERE, "a choice and a value")


def texts(a: Node, b: Node, compare: Compare) -> Decision | None:
    if "text" not in (a.kind, b.kind):
        return None
    if a.kind != b.kind:
        return different(_HERE, "words and no words") if tree.kind(a) != tree.kind(b) else None
    if a.name == b.name or a.name.replace(" ", "") == b.name.replace(" ", ""):
        return equal(_HERE)
    words = [set(side.name.split()) for side in (a, b)]
    if words[0] < words[1] or words[1] < words[0]:
        return undecided(_HERE, "one text is part of the other")
    if words[0] == words[1]:
        return undecided(_HERE, "the same words in another order")
    return different(_HERE, "different words")


def fields(a: Node, b: Node, compare: Compare) -> Decision | None:
    if a.kind == b.kind == "all":
        return different(_HERE, "different sets of numbers")
    return None


def residues(a: Node, b: Node, compare: Compare) -> Decision | None:
    r"""3 \pmod 7 is 10 \pmod 7; a modulus may be left out."""
    if "residue" not in (a.kind, b.kind):
        return None
    if a.kind == b.kind:
        modulus = compare(a.args[1], b.args[1])
        values = [exact(node) for node in (a.args[0], b.args[0], a.args[1])]
        if not modulus.equal:
            return modulus
        if None in values or not values[2]:
            return compare(a.args[0], b.args[0])
        one, other, size = (value for value in values if value is not None)
        whole = ((one - other) / size).denominator == 1
        return equal(_HERE) if whole else different(_HERE, "different residues")
    residue, other_side = (a, b) if a.kind == "residue" else (b, a)
    if not tree.is_scalar(other_side):
        return None
    return compare(residue.args[0], other_side)


def based(a: Node, b: Node, compare: Compare) -> Decision | None:
    """Numerals of a named base: 52_8. Without the name nobody knows what is meant."""
    has = [any(n.kind == "based" for n in side) for side in (a, b)]
    if has[0] == has[1] or not (tree.is_scalar(a) and tree.is_scalar(b)):
        return None
    named, other = (a, b) if has[0] else (b, a)
    bases = {n.name.split(":")[0] for n in named if n.kind == "based"}
    found = scalars.compare(named, other)
    if bases == {"10"}:
        return found
    bare = tree.mapped(named, "based", lambda n: _digits(n.name.split(":")[1]))
    if found.equal or scalars.compare(bare, other).equal:
        return undecided(_HERE, "the base is named on one side only")
    return different(found.stage, "unequal in that base and without it")


def _digits(text: str) -> Node:
    return tree.num(int(text)) if text.isdigit() else Node("text", text)


def quantities(a: Node, b: Node, compare: Compare) -> Decision | None:
    """Units, percent and degrees at the top of either side."""
    kinds = (a.kind, b.kind)
    if "percent" in kinds:
        return _percents(a, b, compare)
    if "measure" in kinds:
        return _measures(a, b, compare)
    if "deg" in kinds and tree.is_scalar(a) and tree.is_scalar(b):
        if a.kind == b.kind:
            return compare(a.args[0], b.args[0])
        angle, other = (a, b) if a.kind == "deg" else (b, a)
        if any(n.kind == "deg" for n in other):
            return None
        found = compare(angle.args[0], other)
        return found if found.equal else scalars.compare(angle, other)
    return None


def _percents(a: Node, b: Node, compare: Compare) -> Decision | None:
    if a.kind == b.kind:
        return compare(a.args[0], b.args[0])
    percent, other = (a, b) if a.kind == "percent" else (b, a)
    if not tree.is_scalar(other) or not tree.is_scalar(percent):
        return None
    found = compare(tree.div(percent.args[0], tree.num(100)), other)
    if found.value is Value.DIFFERENT and compare(percent.args[0], other).equal:
        return undecided(_HERE, "a percent sign on one side only")
    return found


def _measures(a: Node, b: Node, compare: Compare) -> Decision | None:
    if a.kind != b.kind:
        (quantity, other) = (a, b) if a.kind == "measure" else (b, a)
        meaning = unit(quantity.name)
        if other.kind == "deg":
            if dict(meaning.dimension) == {"radian": 1}:
                return scalars.compare(quantity.args[0], other)
            return different(_HERE, "degrees and another unit")
        found = compare(quantity.args[0], other)  # a unit that is left out
        if not found.equal and tree.is_scalar(other) and tree.symbols(other):
            try:
                written = tree.mul(quantity.args[0], parse.read(quantity.name))  # 3 m/s
            except UnreadableError:
                return found
            return compare(written, other)
        return found
    mine, gold = unit(a.name), unit(b.name)
    left, right = a.args[0], b.args[0]
    values = compare(left, right)
    if mine == gold:
        return values
    if {mine.label, gold.label} == {frozenset({"am"}), frozenset({"pm"})}:
        return different(_HERE, "before and after noon")
    if mine.label or gold.label:
        if mine.label and gold.label and (mine.label <= gold.label or gold.label <= mine.label):
            return values
        if values.equal:
            return undecided(_HERE, "the same value of different things")
        return values
    if not mine.dimension or not gold.dimension:
        return values
    if mine.dimension != gold.dimension:
        return different(_HERE, "units of different kinds")
    if not (tree.is_scalar(left) and tree.is_scalar(right)):
        return None
    return compare(tree.mul(left, tree.num(mine.size)), tree.mul(right, tree.num(gold.size)))


def ratios(a: Node, b: Node, compare: Compare) -> Decision | None:
    if "ratio" not in (a.kind, b.kind):
        return None
    sides = [side.args if side.kind == "ratio" else (side,) for side in (a, b)]
    if len(sides[0]) == len(sides[1]):
        if any(not tree.is_scalar(part) for side in sides for part in side):
            return undecided(_HERE, "a ratio of what is no number")
        same = every(compare(x, y) for x, y in zip(*sides, strict=True))
        if same.equal or any(part == tree.ZERO for side in sides for part in side):
            return same  # 5:00 is a time of day
        crossed = [
            compare(tree.mul(x, sides[1][0]), tree.mul(y, sides[0][0]))
            for x, y in zip(sides[0][1:], sides[1][1:], strict=True)
        ]
        return every(crossed)
    for ratio, other in ((a, b), (b, a)):
        if ratio.kind == "ratio" and len(ratio.args) == 2 and tree.is_scalar(other):
            return scalars.compare(tree.div(*ratio.args), other)
    return different(_HERE, "a ratio of another length")
