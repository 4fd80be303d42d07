"""What runs inside the jail: pairs arrive as data, decisions leave as lines of JSON.

A line is written as soon as its pair is decided, so that a pair that never ends takes nothing from
those before it; the caller starts again with those behind it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable

from shared.grading import forms, opinion
from shared.grading.caps import TooMuchError, UnreadableError
from shared.grading.equal import compare
from shared.grading.verdict import Decision, Stage, undecided

_GROUPED = re.compile(r"\d,\d{3}(?!\d)")


def decide(answer: str, reference: str) -> Decision:
    """One pair. Raises nothing that is about the texts."""
    try:
        return _read_and_compare(answer, reference)
    except TooMuchError as error:
        return undecided(Stage.CAPS, str(error))
    except RecursionError:
        return undecided(Stage.CAPS, "nested too deeply")
    except UnreadableError as error:
        found = _opinion(answer, reference)
        return found if found.reason == "" else _with(found, f"{found.reason}; {error}")


def _read_and_compare(answer: str, reference: str) -> Decision:
    found = compare(forms.read(answer), forms.read(reference))
    if not found.equal and any(map(_GROUPED.search, (answer, reference))):
        # "100,200,300" may be a number or a list: a list where the other side is one.
        trees = [forms.read(text, lists=True) for text in (answer, reference)]
        if all(tree.kind in ("list", "set") for tree in trees):
            again = compare(*trees)
            return again if again.equal else found
    return found


def _opinion(answer: str, reference: str) -> Decision:
    try:
        return opinion.ask(answer, reference)
    except Exception as error:  # noqa: BLE001  a library at the mercy of hostile text
        return undecided(Stage.MATH_VERIFY, f"math-verify failed: {type(error).__name__}")


def _with(found: Decision, reason: str) -> Decision:
    return Decision(found.value, found.stage, reason[:300])


def main(pairs: Iterable[tuple[str, str]]) -> None:
    sys.setrecursionlimit(3000)
    for answer, reference in pairs:
        found = decide(answer, reference)
        print(json.dumps([found.value, found.stage, found.reason]), flush=True)  # noqa: T201
