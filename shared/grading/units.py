r"""Units and labels after a value: "5 cm", "18 dollars", "20 sq units", "14 right triangles".

A unit that is known has a size and a dimension; other words are a label, which says nothing about
size. What a missing unit means is decided where two answers are compared.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from shared.grading import tree
from shared.grading.caps import UnreadableError
from shared.grading.tree import Node
from shared.grading.words import DEGREES, MULTIPLES, PERCENTS, POWERS, QUOTIENTS, UNITS

_PIECE = re.compile(r"\^\s*(-?\d+)|/|\*|[^\W\d_]+[23]?(?![^\W\d_])|[²³]")
_CLOCK = re.compile(r"([ap])\s*\.?\s*m\.?", re.IGNORECASE)
_FILLER = frozenset("of the a an approximately about in total".split())


@dataclass(frozen=True, slots=True)
class Unit:
    """`size` in the base unit of `dimension` (sorted (name, power) pairs), or a `label`."""

    size: Fraction
    dimension: tuple[tuple[str, int], ...]
    label: frozenset[str] = frozenset()


def measured(node: Node, words: list[str]) -> Node:
    """`node` with the words that follow it. Raises UnreadableError where they are no unit."""
    said = [word for word in words if word]
    while said and said[0].strip().lower() in MULTIPLES:
        node = tree.mul(node, tree.num(MULTIPLES[said.pop(0).strip().lower()]))
    text = " ".join(said).strip()
    plain = text.lower().strip(" .")
    if not text.strip(" ."):
        return node
    if plain in PERCENTS:
        return Node("percent", "", (node,))
    if plain in DEGREES:
        return Node("deg", "", (node,))
    if clock := _CLOCK.fullmatch(text):
        return Node("measure", f"{clock[1].lower()}.m.", (node,))
    if len(text) > 60:
        raise UnreadableError("many words after a value")
    return Node("measure", text, (node,))


def unit(text: str) -> Unit:
    """What the words of a `measure` mean."""
    for name, meaning in QUOTIENTS.items():
        if text.strip(" .").lower() == name:
            text = meaning
    size, powers = Fraction(1), Counter[str]()
    sign, prefix, last = 1, 1, ""
    for piece in re.finditer(_PIECE, text.replace(" per ", " / ").replace(".", "")):
        word = piece[0]
        if word == "/":
            sign = -1
            continue
        if word == "*" or word.lower() in _FILLER:
            continue
        if piece[1] is not None or word in "²³":
            if not last:
                return _label(text)
            times = int(piece[1] or {"²": 2, "³": 3}[word]) - 1
            if abs(times) > 9:
                return _label(text)
            dimension, factor = UNITS[last]
            powers[dimension] += sign * times
            size *= factor ** (sign * times)
            continue
        if word.lower() in POWERS:
            if last and word.lower() in ("squared", "cubed"):
                dimension, factor = UNITS[last]
                times = POWERS[word.lower()] - 1
                powers[dimension] += sign * times
                size *= factor ** (sign * times)
            else:
                prefix = POWERS[word.lower()]
            continue
        if word[-1] in "23" and word[:-1] in UNITS:
            prefix, word = int(word[-1]), word[:-1]
        known = word if word in UNITS else word.lower()
        if known not in UNITS:
            return _label(text)
        dimension, factor = UNITS[known]
        powers[dimension] += sign * prefix
        size *= factor ** (sign * prefix)
        last, prefix = known, 1
    return Unit(size, tuple(sorted((d, n) for d, n in powers.items() if n)))


def _label(text: str) -> Unit:
    words = re.findall(r"[^\W_]+", text.lower().replace(".", ""))
    kept = frozenset(w.removesuffix("s") for w in words if w not in _FILLER)
    return Unit(Fraction(1), (), kept)
