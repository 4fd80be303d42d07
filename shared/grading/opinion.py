r"""math-verify's opinion on a pair that our own parser cannot read. Runs in the jail only.

It rounds to six digits, forgives names and drops what it does not understand, so that its "equal"
counts only where (1) it holds both ways round, (2) both sides have the same numbers and the same
letters, written as often, and (3) what it parsed agrees to 30 digits. Its "different" is believed
where it parsed both sides.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from shared.grading.verdict import Decision, Stage, different, equal, undecided

_STAGE = Stage.MATH_VERIFY


_UNFIT = (  # what is not even shown to a library that evaluates what it reads
    (re.compile(r".{401}", re.DOTALL), "too long"),
    (re.compile(r"\d{40}|\d{7}\s*[!}]|(?:\^|\*\*)[({\s]*\d{4}|!\s*!"), "too big"),
    (re.compile(r"(?:\^|\*\*)[^,=+]*(?:\^|\*\*)[^,=+]*(?:\^|\*\*)"), "a tower of powers"),
    (re.compile(r"__|\bimport\b|\blambda\b|[A-Za-z]\.[A-Za-z]|[\"`;@]"), "code"),
)


def ask(answer: str, reference: str) -> Decision:
    for name, text in (("answer", answer), ("reference", reference)):
        for pattern, what in _UNFIT:
            if pattern.search(text):
                return undecided(_STAGE, f"the {name} is not shown to math-verify: {what}")
    config = [LatexExtractionConfig()]
    parsed = []
    for name, text in (("answer", answer), ("reference", reference)):
        found = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
        if not found:
            return undecided(_STAGE, f"the {name} cannot be parsed")
        parsed.append(found)
    mine, gold = parsed
    forth = verify(gold, mine, timeout_seconds=None)
    back = verify(mine, gold, timeout_seconds=None)
    if forth != back:
        return undecided(_STAGE, "math-verify decides differently when swapped")
    if not forth:
        return different(_STAGE, "math-verify finds them different")
    if _content(answer) != _content(reference):
        return undecided(_STAGE, "equal for math-verify, which may have dropped something")
    if not _agrees(mine[0], gold[0]):
        return undecided(_STAGE, "equal for math-verify, but only after rounding")
    return equal(_STAGE)


def _content(text: str) -> Counter[str]:
    r"""Numbers, letters and commands, but for typography."""
    text = re.sub(r"\\(?:left|right|[dt]frac|text|mathrm|displaystyle|quad|[,;:! ])", " ", text)
    return Counter(re.findall(r"\d+|\\?[A-Za-z]+", text))


def _agrees(mine: Any, gold: Any) -> bool:
    if not (hasattr(mine, "free_symbols") and hasattr(gold, "free_symbols")):
        return False
    if {str(s) for s in mine.free_symbols} != {str(s) for s in gold.free_symbols}:
        return False
    if mine == gold:
        return True
    try:
        left, right = mine.evalf(40), gold.evalf(40)
        return bool(abs(left - right) <= abs(left) * 1e-30)
    except (TypeError, ValueError, AttributeError):
        return False
