r"""Find the final answer in a text: the content of the last complete \boxed{...}."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\f?boxed\s*\{")


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox-like \fboxed{...} whose braces close, stripped.

    Braces nest and escaped ones (\{) do not count. A box inside of another is part of the outer
    one. None where there is no complete box. Linear in the length of the text.
    """
    starts = [match.end() for match in _BOXED.finditer(text)]
    answer, end = None, 0
    closing = _closing_braces(text) if starts else {}
    for start in starts:
        close = closing.get(start - 1)
        if close is not None and start >= end:
            answer, end = text[start:close].strip(), close
    return answer


def _closing_braces(text: str) -> dict[int, int]:
    """Position of every opening brace that closes -> position of its closing brace."""
    pairs, stack, position = {}, [], 0
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 1  # what is escaped is skipped
        elif letter == "{":
            stack.append(position)
        elif letter == "}" and stack:
            pairs[stack.pop()] = position
        position += 1
    return pairs
