"""The stages that need no reading: equal strings, and plain numbers. Safe in any process.

Only regular expressions and integers of a bounded size; what they do not recognise is None.
"""

from __future__ import annotations

import re
from fractions import Fraction

from shared.grading.caps import MAX_DIGITS, MAX_LENGTH
from shared.grading.extract import final_answer
from shared.grading.verdict import Decision, Stage, different, equal, undecided

_SPACING = re.compile(
    r"\\[,;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[\s~\u00a0\u2009\u202f]"
)
_SYNONYMS = ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), ("−", "-"))
_THIN_GROUP = re.compile(r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,|\{,\\!\})(?=\d{3}(?!\d))")
_LIST_COMMA = re.compile(r",\s+(?=\d{3}(?!\d))")  # "1, 234" is no "1,234"
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_RATIONAL = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<number>{_NUMBER})(?:/(?P<over>\d+))?"
    r"|(?P<whole>\d*)\\frac(?:\{(?P<a>-?\d+)\}|(?P<a1>\d))(?:\{(?P<b>\d+)\}|(?P<b1>\d)))"
)


def decide(mine: str, gold: str) -> Decision | None:
    """What these stages say of two normalised texts; None: they have to be read."""
    for name, text in (("answer", mine), ("reference", gold)):
        if not text:
            return undecided(Stage.CAPS, f"the {name} is empty")
        if len(text) > MAX_LENGTH:
            return undecided(Stage.CAPS, f"the {name} is longer than {MAX_LENGTH} characters")
    if canonical(mine) == canonical(gold):
        return equal(Stage.STRING)
    left, right = rational(mine), rational(gold)
    if left is None or right is None:
        return None
    return equal(Stage.RATIONAL) if left == right else different(Stage.RATIONAL, "unequal numbers")


def normalise(text: str) -> str:
    r"""The answer itself: out of its \boxed{} and $ signs, without a final full stop."""
    text = final_answer(text)
    before = None
    while text != before:
        before = text
        text = text.strip()
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"),
                                 ("**", "**"), ("`", "`")):  # fmt: skip
            inner = text[len(opening) : -len(closing)]
            if (
                len(text) > len(opening) + len(closing)
                and text.startswith(opening)
                and text.endswith(closing)
                and opening not in inner
                and not inner.endswith("\\")
            ):
                text = inner.strip()
        if not text.endswith(("..", r"\.")):
            text = text.removesuffix(".")
    return text


def canonical(text: str) -> str:
    """`normalise`d text without what carries no meaning: spacing and spellings of the same sign."""
    for spelling, one in _SYNONYMS:
        text = text.replace(spelling, one)
    text = _LIST_COMMA.sub(r";", _THIN_GROUP.sub(",", text))
    # A space between letters or digits may mean something; elsewhere it never does.
    text = _SPACING.sub(" ", text)
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text).strip()


def rational(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, a/b, \frac{a}{b} or mixed number; None otherwise.

    Commas group by threes ("1,234"; "1,23" is no number); a mixed number needs a \frac.
    """
    if len(text) > 2 * MAX_DIGITS or not text.isascii():
        return None
    text = canonical(text)
    found = _RATIONAL.fullmatch(text)
    if found is None or sum(map(str.isdecimal, text)) > MAX_DIGITS:
        return None
    part = found.groupdict()
    if part["number"] is not None:
        value = Fraction(part["number"].replace(",", "").removesuffix("."))
        bottom = int(part["over"] or 1)
        if bottom == 0:
            return None
        value /= bottom
    else:
        top, bottom = int(part["a"] or part["a1"]), int(part["b"] or part["b1"])
        if bottom == 0 or (part["whole"] and not 0 < top < bottom):
            return None
        value = int(part["whole"] or 0) + Fraction(top, bottom)
    return -value if part["sign"] == "-" else value
