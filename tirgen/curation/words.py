"""A problem's text as plain words, so that copies are equal whatever their typesetting."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

_SMALL = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()  # noqa: E501
_TENS = "thirty forty fifty sixty seventy eighty ninety".split()
# "one" is left alone: it mostly is no number.
_SPELLED = {word: str(n) for n, word in enumerate(_SMALL, start=2)} | {
    word: str(10 * n) for n, word in enumerate(_TENS, start=3)
}
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|limits|quad|qquad|[,;:! ()\[\]])|\$|"
    r"\\(?:text|mathrm|mathbf|mbox|textbf|operatorname)(?![a-zA-Z])"
)
_FRACTIONS = re.compile(r"\\[dt]frac")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\\,|\{,\})(?=\d{3}(?!\d))")
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>|%!]")


@lru_cache(maxsize=4096)
def words(text: str) -> tuple[str, ...]:
    """Numbers, words and operators of `text`, in order.

    Without case, accents of typesetting, LaTeX layout, punctuation; small numbers as digits.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = _FRACTIONS.sub(r"\\frac", _THOUSANDS.sub("", plain))
    found = _WORD.findall(_LAYOUT.sub(" ", plain))
    return tuple(_SPELLED.get(word, word) for word in found)


def numbers(found: Sequence[str]) -> Counter[str]:
    """The numbers among `found`, with how often each is there."""
    return Counter(word for word in found if word[0].isdigit())


def stems(found: Sequence[str]) -> Counter[str]:
    """Words by their beginnings, so that "lays" and "laying" are one."""
    return Counter(word if word[0].isdigit() else word.removesuffix("s")[:6] for word in found)


def grams(found: Sequence[str], n: int) -> list[str]:
    """All n words in a row; the whole text if it is shorter."""
    return [" ".join(found[i : i + n]) for i in range(max(len(found) - n, 0) + 1)]


def agreement(one: Counter[str], other: Counter[str]) -> float:
    """Jaccard index of two multisets; 1 where both are empty."""
    union = (one | other).total()
    return (one & other).total() / union if union else 1.0
