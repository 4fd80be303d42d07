r"""Find the final answer in a text: the content of \boxed{...}, or what the text calls its answer.

final_answer(r"so 2x = 6 and \boxed{x = 3}.")                     ->  "x = 3"
find("The answer is 18 dollars.", Rules())                        ->  "18 dollars", PHRASE
find(text, Rules(sources=(Source.BOXED,), boxes=Boxes.LAST))      ->  None without a box
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

_BOXED = re.compile(r"\\(?:f|frame)?box(?:ed)?\s*(?=[\{\w\\$-])")
_BARE_BOX = re.compile(r"[^\s{}$.,;]+")
_PHRASE = re.compile(
    r"(?:final answer|the answer|answer is|answer:|####)(?:\s+is)?\s*[:=]?\s*(?:is\s+)?[:=]?\s*",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_END_THINK = "</think>"


class Source(StrEnum):
    """Where an answer was found."""

    BOXED = "boxed"
    PHRASE = "phrase"
    LAST_NUMBER = "last_number"
    WHOLE = "whole"


class Boxes(StrEnum):
    """Which of several boxes is the answer."""

    LAST = "last"
    FIRST = "first"
    ALL = "all"  # joined by commas, each once
    ONLY = "only"  # none, where they differ


class Part(StrEnum):
    """Which part of a reply with </think> may hold the answer."""

    ANSWER = "answer"  # only what follows the thinking
    EITHER = "either"  # that first, then the thinking


@dataclass(frozen=True, slots=True)
class Rules:
    """In which order, and where, an answer is looked for."""

    sources: tuple[Source, ...] = (Source.BOXED, Source.PHRASE, Source.LAST_NUMBER)
    boxes: Boxes = Boxes.LAST
    part: Part = Part.ANSWER


@dataclass(frozen=True, slots=True)
class Found:
    text: str
    source: Source


def find(text: str, rules: Rules | None = None) -> Found | None:
    """The final answer of a reply, by the first source that has one."""
    rules = rules or Rules()
    thinking, mark, answer = text.rpartition(_END_THINK)
    parts = [answer] if mark else [text]
    if mark and rules.part is Part.EITHER:
        parts.append(thinking)
    for part in parts:
        for source in rules.sources:
            found = _FINDERS[source](part, rules)
            if found is not None:
                return Found(found, source)
    return None


def final_answer(text: str) -> str:
    r"""The box of a text, else what it calls its answer, else the text itself. Never a number
    picked out of prose: a comparison must not rest on a guess."""
    rules = Rules(sources=(Source.BOXED, Source.PHRASE, Source.WHOLE), part=Part.EITHER)
    found = find(text, rules)
    return found.text if found is not None else ""


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...} whose braces close, stripped; None without."""
    found = boxes(text)
    return found[-1] if found else None


def boxes(text: str) -> list[str]:
    r"""Contents of all complete boxes, in order.

    Braces nest and escaped ones (\{) do not count. A box inside of another is part of the outer
    one. "\boxed 5" without braces holds one word. Linear in the length of the text.
    """
    answers, end = [], 0
    starts = [match.end() for match in _BOXED.finditer(text)]
    closing = _closing_braces(text) if starts else {}
    for start in starts:
        if start < end:
            continue
        if text[start] == "{":
            close = closing.get(start)
            if close is not None:
                answers.append(text[start + 1 : close].strip())
                end = close
        elif (bare := _BARE_BOX.match(text, start)) is not None:
            answers.append(bare[0])
            end = bare.end()
    return answers


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


def _boxed(text: str, rules: Rules) -> str | None:
    found = boxes(text)
    match rules.boxes:
        case Boxes.ALL:
            return ", ".join(dict.fromkeys(found)) or None
        case Boxes.ONLY:
            return found[-1] if len(set(found)) == 1 else None
        case Boxes.FIRST:
            return found[0] if found else None
    return found[-1] if found else None


def _phrase(text: str, _: Rules) -> str | None:
    """What follows the last "the answer is", to the end of its sentence or line."""
    ends = [found.end() for found in _PHRASE.finditer(text)]
    if not ends:
        return None
    said = text[ends[-1] :].lstrip("*:} ").split("\n", 1)[0]
    said = re.split(r"(?<=[\w)}\]$%])\.(?:\s|$)|(?:,|;)?\s+(?:because|since|so|which)\s", said)[0]
    return said.strip("* .").strip() or None


def _last_number(text: str, _: Rules) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _whole(text: str, _: Rules) -> str | None:
    return text.strip() or None


_FINDERS = {
    Source.BOXED: _boxed,
    Source.PHRASE: _phrase,
    Source.LAST_NUMBER: _last_number,
    Source.WHOLE: _whole,
}
