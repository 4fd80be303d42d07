"""Markdown fences in a model's text, as a state machine over whole lines.

Only ```` ```python ```` and ```` ```py ```` open an action; every other fence passes through as
text of its own kind. A fence opens at the start of a line (at most three spaces before it) and
closes with a line of at least as many of the same character and nothing else (CommonMark 4.5).
Words like "python" inside code mean nothing. An ```` ```output ```` block that the policy wrote
itself is kept apart, so that nobody takes it for an observation.

Chunk boundaries cannot matter: a line is looked at only when it is complete.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\r\n]*?)[ \t]*\r?\n?")


class Kind(StrEnum):
    TEXT = "text"
    PYTHON = "python"
    OUTPUT = "output"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of text. The `raw` of all blocks, joined, is the input, character for character.

    `body` is what stands between the fences, without the newline before the closing one; for text
    it is `raw`. `closed` is false for a block that the text ended inside.
    """

    kind: Kind
    body: str
    raw: str
    closed: bool = True


class FenceParser:
    """Feed it chunks, get blocks as they become certain; `finish` returns what is left."""

    def __init__(self) -> None:
        self._line = ""  # the incomplete last line
        self._raw: list[str] = []  # complete lines of the current block
        self._fence: str | None = None  # the opening fence, while inside a block
        self._kind = Kind.TEXT

    def feed(self, chunk: str) -> list[Block]:
        *lines, self._line = (self._line + chunk).split("\n")
        return [block for line in lines for block in self._take(line + "\n")]

    def finish(self) -> list[Block]:
        blocks = self._take(self._line) if self._line else []
        self._line = ""
        if self._raw:
            blocks.append(self._end(closed=self._fence is None))
        return blocks

    def _take(self, line: str) -> list[Block]:
        match = _FENCE.fullmatch(line)
        if self._fence is None:
            if match is None:
                self._raw.append(line)
                return []
            done = [self._end()] if self._raw else []
            self._fence, self._kind = match[1], _kind(match[2])
            self._raw = [line]
            return done
        self._raw.append(line)
        if match and not match[2] and match[1].startswith(self._fence):
            return [self._end()]
        return []

    def _end(self, closed: bool = True) -> Block:
        raw, kind = self._raw, self._kind
        inside = raw if kind is Kind.TEXT else raw[1:-1] if closed else raw[1:]
        body = "".join(inside)
        if kind is not Kind.TEXT and closed:
            body = body.removesuffix("\n")
        self._raw, self._fence, self._kind = [], None, Kind.TEXT
        return Block(kind, body, "".join(raw), closed)


def parse(text: str) -> list[Block]:
    """All blocks of a finished text."""
    parser = FenceParser()
    return parser.feed(text) + parser.finish()


def _kind(info: str) -> Kind:
    word = (info.split() or [""])[0].lower()
    return {"python": Kind.PYTHON, "py": Kind.PYTHON, "output": Kind.OUTPUT}.get(word, Kind.OTHER)


def prose(text: str) -> str:
    """What stands outside code and output blocks: only there do marks and answers count."""
    return "".join(b.raw for b in parse(text) if b.kind in (Kind.TEXT, Kind.OTHER))


def action(code: str) -> str:
    """a_t as it stands in a trajectory, after the thought. Inverse: a closed PYTHON block."""
    return f"\n{_rail(code)}python\n{code}\n{_rail(code)}"


def observation(output: str) -> str:
    """o_t as it stands in a trajectory, right after the action (method.md 2)."""
    return f"\n{_rail(output)}output\n{output}\n{_rail(output)}\n"


def _rail(body: str) -> str:
    """A fence that nothing inside `body` can close: hostile output must not end its own block."""
    runs = re.findall(r"^ {0,3}(`{3,})", body, re.MULTILINE)
    return "`" * (1 + max(map(len, runs), default=2))
