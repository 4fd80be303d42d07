"""A job's log, OUT/log.txt: its end, and what is added to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rl.job_rows import Tail

LOG = "log.txt"
TAIL_BYTES = 8192

_OVERWRITTEN = re.compile(r"[^\r\n]*\r")


def read_tail(file: Path, known: int | None = None, limit: int = TAIL_BYTES) -> Tail | None:
    """The last `limit` bytes; None where there is no log, or it still has `known` bytes."""
    try:
        with file.open("rb") as log:
            n_bytes = log.seek(0, 2)
            if n_bytes == known:
                return None
            log.seek(max(0, n_bytes - limit))
            return Tail(log.read(limit).decode(errors="replace"), n_bytes)
    except OSError:
        return None


def last_lines(text: str, n: int) -> str:
    return "\n".join(settled(text).split("\n")[-n:])


def settled(text: str) -> str:
    """Without what progress bars have written over."""
    return _OVERWRITTEN.sub("", text.replace("\r\n", "\n"))


class Follower:
    """What is added to a log from one `read` to the next, from the last `lines` lines on."""

    def __init__(self, file: Path, lines: int) -> None:
        self.file, self.lines = file, lines
        self._at: int | None = None

    @property
    def found(self) -> bool:
        """Has there been a file to read?"""
        return self._at is not None

    def read(self) -> Iterator[str]:
        """Nothing where there is no log, yet or any more."""
        if self._at is None:
            tail = read_tail(self.file, limit=1 << 20)
            if tail is not None:
                self._at = tail.n_bytes
                lines = tail.text.splitlines(keepends=True)
                yield "".join(
                    lines[len(lines) - self.lines :] if self.lines < len(lines) else lines
                )
            return
        try:
            with self.file.open("rb") as log:
                self._at = min(self._at, log.seek(0, 2))  # it was begun anew
                log.seek(self._at)
                while piece := log.read(1 << 16):
                    self._at += len(piece)
                    yield piece.decode(errors="replace")
        except OSError:
            return
