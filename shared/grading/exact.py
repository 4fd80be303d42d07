"""Stages that need no library: light normalisation, exact strings, exact rationals, static caps."""

from __future__ import annotations

import re
from fractions import Fraction

from shared.grading.extract import last_boxed

MAX_LENGTH, MAX_NESTING, MAX_DIGITS, MAX_EXPONENT, MAX_FACTORIAL = 2000, 32, 100, 10_000, 500

_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[\s~]")
_SYNONYMS = ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), ("−", "-"), (r"\$", ""))
_ASSIGNED = re.compile(r"[A-Za-z]\s*(?:=|\\in(?![A-Za-z]))\s*(?=[^=]+$)")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}|\\[A-Za-z]+")
_NUMBER = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_RATIONAL = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<number>{_NUMBER})(?:/(?P<over>\d+))?"
    r"|(?P<whole>\d*)\\frac(?:\{(?P<a>-?\d+)\}|(?P<a1>\d))(?:\{(?P<b>\d+)\}|(?P<b1>\d)))"
)


def normalise(text: str) -> str:
    r"""The answer itself: out of its \boxed{} and $ signs, without a final full stop."""
    text = text.strip()
    if (inner := last_boxed(text)) is not None:
        text = inner
    for fence in ("$$", "$"):
        if len(text) > 2 * len(fence) and text.startswith(fence) and text.endswith(fence):
            text = text[len(fence) : -len(fence)]
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    return text.strip().removesuffix(".").strip()


def canonical(text: str) -> str:
    """`normalise`d text without what carries no meaning: spacing and spellings of the same sign."""
    for spelling, one in _SYNONYMS:
        text = text.replace(spelling, one)
    # A space between letters or digits may mean something; elsewhere it never does.
    text = _SPACING.sub(" ", text)
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text).strip()


def unassigned(text: str, other: str) -> str:
    r"""`text` without a leading "x =" or "x \in" that `other` does not have either."""
    found, same = _ASSIGNED.match(text), _ASSIGNED.match(other)
    return text[found.end() :] if found and not same and "=" not in other else text


def same_but_for_case(text: str, other: str) -> bool:
    """Whether two texts name variables that differ in case only (r is not R)."""
    names = [set(re.findall("[A-Za-z]", _WORDS.sub(" ", side))) for side in (text, other)]
    folded = [{name.lower() for name in side} for side in names]
    return names[0] != names[1] and folded[0] == folded[1]


def rational(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, a/b, \frac{a}{b} or mixed number; None otherwise.

    Commas group by threes ("1,234"; "1,23" is no number); a mixed number needs a \frac.
    """
    text = canonical(text)
    found = _RATIONAL.fullmatch(text)
    if found is None or sum(map(str.isdecimal, text)) > MAX_DIGITS or not text.isascii():
        return None
    part = found.groupdict()
    if part["number"] is not None:
        value = Fraction(re.sub(r"[,{}]", "", part["number"]))
        bottom = int(part["over"] or 1)
        if bottom == 0:
            return None
        value /= bottom
    else:
        top, bottom = int(part["a"] or part["a1"]), int(part["b"] or part["b1"])
        if bottom == 0 or (part["whole"] and top < 0):
            return None
        value = int(part["whole"] or 0) + Fraction(top, bottom)
    return -value if part["sign"] == "-" else value


def too_much(text: str) -> str | None:
    """Why a text must not be evaluated, or None. Checked before anything computes with it."""
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} characters"
    if any(len(run) > MAX_DIGITS for run in re.findall(r"\d+", text)):
        return f"a number of more than {MAX_DIGITS} digits"
    depth = deepest = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        return f"nested deeper than {MAX_NESTING}"
    powers = re.findall(r"(?:\^|\*\*)\s*[{(]*\s*-?\s*(\d+)", text)
    if any(int(power) > MAX_EXPONENT for power in powers):
        return f"an exponent above {MAX_EXPONENT}"
    if re.search(r"(?:\^|\*\*)\s*[{(]*[^{}()^*]*(?:\^|\*\*)\s*[{(]*[^{}()^*]*(?:\^|\*\*)", text):
        return "a tower of powers"
    factorials = re.findall(r"(\d+)\s*\)?\s*!", text)
    if any(int(number) > MAX_FACTORIAL for number in factorials) or "!!" in text:
        return f"a factorial above {MAX_FACTORIAL}"
    if re.search(r"__|\bimport\b|\blambda\b|[A-Za-z]\.[A-Za-z]|[\"`;@]", text):
        return "code in place of an answer"
    return None
