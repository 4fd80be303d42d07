"""What runs inside the jail, and only there: math-verify on two texts that arrive as data.

This file is sent as text (`shared.grading.grader`); its last line on standard output is the answer.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any


def compare(answer: str, reference: str) -> dict[str, Any]:
    """{"value": equal | different | undecided, "reason"}."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    parsed = []
    for name, text in (("answer", answer), ("reference", reference)):
        found = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
        if not found:
            return {"value": "undecided", "reason": f"the {name} cannot be parsed"}
        parsed.append(found)
    mine, gold = parsed
    forth = verify(gold, mine, timeout_seconds=None)
    back = verify(mine, gold, timeout_seconds=None)
    if forth != back:
        return {"value": "undecided", "reason": "math-verify decides differently when swapped"}
    if not forth:
        return {"value": "different", "reason": ""}
    doubt = _doubt(mine[0], gold[0])
    return {"value": "undecided" if doubt else "equal", "reason": doubt}


def _doubt(mine: Any, gold: Any) -> str:
    """Why what math-verify accepts is not believed: it rounds to six digits and forgives names."""
    names = [{str(s) for s in getattr(side, "free_symbols", ())} for side in (mine, gold)]
    if names[0] != names[1]:
        return "equal only up to the names of variables"
    if names[0] or not (hasattr(mine, "evalf") and hasattr(gold, "evalf")):
        return ""
    try:
        left, right = complex(mine.evalf(30)), complex(gold.evalf(30))
    except (TypeError, ValueError, OverflowError):
        return ""
    scale = max(abs(left), abs(right))
    if not math.isfinite(scale):
        return ""
    if scale == 0 or abs(left - right) <= 1e-6 * scale:
        return ""
    return "equal only after rounding"


def main(answer: str, reference: str) -> None:
    sys.setrecursionlimit(5000)
    print(json.dumps(compare(answer, reference)))  # noqa: T201  the answer's way out of the jail
