"""Values onto a terminal. Whatever a model or a file wrote passes through `visible` first."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shared.errors import TirgenError

console = Console()
errors = Console(stderr=True)  # progress and notes, where standard output is data

CELL = 200  # characters of a value that a table may show
NARROW = 12  # characters; a column of no more keeps its width

# Control characters (terminal escape sequences start with one), marks that reorder text, and
# separators that some terminals take for line ends.
_UNSAFE = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF]
_UNSAFE += [*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_ESCAPES = {c: f"\\x{c:02x}" if c < 0x100 else f"\\u{c:04x}" for c in _UNSAFE}
_IN_TEXT = {c: shown for c, shown in _ESCAPES.items() if c not in (0x09, 0x0A)}
_IN_LINE = _ESCAPES | {0x09: " ", 0x0A: "⏎"}
_IN_JSON = {c: f"\\u{c:04x}" for c in _UNSAFE if c >= 0x7F}  # below, json has done it


class Format(StrEnum):
    """Of a list that a command prints."""

    TABLE = "table"
    JSON = "json"


def visible(text: str) -> str:
    """`text` with control characters written out; line breaks and tabs stay."""
    return text.translate(_IN_TEXT)


def line(text: str, limit: int = CELL) -> str:
    """`text` on one line, cut at `limit` characters."""
    shown = text[: limit + 1].translate(_IN_LINE)
    return shown if len(text) <= limit else shown[: limit - 1] + "…"


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that is safe to print: no character in it acts on a terminal."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)
    return text.translate(_IN_JSON)


def cell(value: Any) -> Text:
    """One value of a table, on one line; a Text is left as it is and may take several."""
    match value:
        case Text():
            return value
        case None:
            return Text("-", style="dim")
        case bool():
            return Text("yes" if value else "no", style="green" if value else "red")
        case int():
            return Text(f"{value}", justify="right")
        case float():
            return Text(f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}", justify="right")
        case datetime():
            return Text(f"{value:%Y-%m-%d %H:%M}")
        case list():
            value = ", ".join(map(str, value))
    return Text(line(str(value)), no_wrap=True, overflow="ellipsis")


def table(names: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """A table that fits the terminal: where it is too wide, the columns of long texts give way."""
    made = Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold",
        title=title or None, title_justify="left", title_style="bold cyan",
    )  # fmt: skip
    listed = [[cell(value) for value in row] for row in rows]
    for i, name in enumerate(names):
        is_number = any(row[i].justify == "right" for row in listed)
        is_long = any(row[i].cell_len > NARROW for row in listed)
        # A number that is cut is another number: where room is short, names and texts give way.
        least = max(row[i].cell_len for row in listed) if is_number else None
        header = Text(name, justify="right" if is_number else "left")
        made.add_column(header, no_wrap=not is_long, min_width=least)
    for row in listed:
        made.add_row(*row)
    return made


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def share(part: int, whole: int) -> Text:
    return Text(percent(part, whole), justify="right")


def age(begun: datetime) -> str:
    seconds = max(0, (datetime.now(begun.tzinfo) - begun).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def run(program: Callable[[], object]) -> None:
    """A command line: errors that are for people become messages.

    Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        program()
    except TirgenError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
