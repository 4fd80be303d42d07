"""Problem files: JSON lines, CSV, Parquet or a Hugging Face dataset, read as a stream.

Contract: a source yields problems that are distinct (by `Problem.key`) or raises an InputError that
names the file, the line or row, what was found there and what was expected. Nothing is guessed:
a row that cannot be used is an error. Left out, and counted, are only duplicates and rows whose
answer is blank (public datasets hold a few). What is held in memory of each row is its key and its
id, so files may be larger than memory.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from shared import rows
from shared.errors import ConfigError, InputError
from shared.grading.extract import last_boxed
from shared.rows import EXPECTED, Literal, Row, brief
from shared.trajectory import Problem

NANO = "nano"  # name of the packaged problems, wherever a source is asked for

# Names that public datasets use, best first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id",),
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "target"),
    "source": ("source",),
    "subject": ("subject",),
    "level": ("level",),
}
MAP_REMEDY = "write --map problem=question,answer=final"
BOXED = "boxed:"  # before a mapped column: take the content of its last \\boxed{}

_FOUR_HASHES = re.compile(r"^####[ \t]*(.*\S)", re.MULTILINE)  # GSM8K: a worked solution, #### 72


def packaged_problems() -> Path:
    """The held-out problems of nano's world; on the command line the source `nano`."""
    return Path(str(files("shared.nano").joinpath("problems.jsonl")))


def field_map(settings: Iterable[str]) -> dict[str, str]:
    """`problem=question,answer=final` as a mapping. Raises ConfigError for what it does not know.

    A column may lie deeper (`answer=reward_model.ground_truth`, `problem=prompt.0.content`), and
    `answer=boxed:solution` takes the last \\boxed{} of a worked solution.
    """
    found: dict[str, str] = {}
    for part in (part for setting in settings for part in setting.split(",") if part.strip()):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise ConfigError(f"{part!r} is not FIELD=COLUMN", where="--map", remedy=MAP_REMEDY)
        if field not in NAMES:
            near = difflib.get_close_matches(field, NAMES, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"fields are {', '.join(NAMES)}"
            raise ConfigError(f"problems have no field {field!r}", where="--map", remedy=remedy)
        found[field] = column
    return found


def load_problems(
    source: str,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
    answers: bool = True,
) -> ProblemStream:
    """Open `source`: a path, a dataset as ORG/NAME[:CONFIG][:SPLIT] (split: train), or `nano`.

    `fields` says which column a field is, where it has none of the usual names. Without `answers`
    none is needed, as with benchmarks that are only compared. Yields at most `limit` problems.
    Raises InputError for what is there at all, here; for what is in it, while it is read. Raises
    ConfigError where an optional library is missing.
    """
    names = {**NAMES, **{field: (column,) for field, column in (fields or {}).items()}}
    columns = {column.removeprefix(BOXED) for found in names.values() for column in found}
    wanted = frozenset(columns | {column.partition(".")[0] for column in columns})
    path = str(packaged_problems()) if source == NANO else source
    found, unit = rows.read(path, wanted)
    return ProblemStream(source, found, unit, limit, names, answers)


class ProblemStream:
    """Distinct problems of one source, in its order; can be iterated once.

    What has been read so far: `n_rows` of them, of which were left out `n_duplicates` (text and
    answer were there before) and `n_unanswered` (the answer is there but blank).
    """

    def __init__(
        self,
        source: str,
        rows: Iterator[tuple[int, Row]],
        unit: str,
        limit: int | None,
        names: Mapping[str, tuple[str, ...]] = NAMES,
        answers: bool = True,
    ) -> None:
        self.source = source
        self.n_rows = 0
        self.n_duplicates = 0
        self.n_unanswered = 0
        self._unit, self._names, self._answers = unit, names, answers
        self._problems = islice(self._distinct(rows), limit)

    def __iter__(self) -> Iterator[Problem]:
        return self._problems

    def _distinct(self, rows: Iterator[tuple[int, Row]]) -> Iterator[Problem]:
        label = self.source.rpartition("/")[2] if Path(self.source).exists() else self.source
        seen: set[bytes] = set()
        by_id: dict[bytes, tuple[bytes, int]] = {}  # digests, and where the id was first
        for number, row in rows:
            where = f"{self.source}, {self._unit} {number}"
            problem = _problem(row, self._names, label, where, self._answers)
            self.n_rows += 1
            if not problem.answer and self._answers:
                self.n_unanswered += 1
                continue
            key = bytes.fromhex(problem.key)
            if problem.external_id:
                identifier = hashlib.sha256(problem.external_id.encode(errors="replace")).digest()
                first_key, first = by_id.setdefault(identifier, (key, number))
                if first_key != key:
                    raise InputError(
                        f"the id {brief(problem.external_id)} is already that of another problem, "
                        f"in {self._unit} {first}",
                        where=where,
                        remedy="give every problem an id of its own, or leave ids out",
                    )
            if key in seen:
                self.n_duplicates += 1
                continue
            seen.add(key)
            yield problem
        if not seen:
            what = f"none of its {self.n_rows} rows has an answer" if self.n_rows else "it is empty"
            raise InputError(what, where=self.source, remedy=EXPECTED)


def _problem(
    row: Row, names: Mapping[str, tuple[str, ...]], label: str, where: str, answers: bool
) -> Problem:
    """`answer` is "" where the row has a blank one, or may lack one."""

    def field(name: str, *, numbers: bool = False) -> str | None:
        return _field(row, names[name], where, numbers=numbers)

    text = field("problem")
    answer = field("answer", numbers=True)
    if text is None:
        raise _missing(row, "problem", names, where)
    if not text.strip():
        raise InputError("the problem is empty", where=where, remedy=EXPECTED)
    if answer is None and answers and not any(_has(row, name) for name in names["answer"]):
        raise _missing(row, "answer", names, where)
    marked = _FOUR_HASHES.findall(answer or "")
    return Problem(
        text=text,
        answer=marked[-1] if marked else (answer or "").strip(),
        source=field("source") or label,
        external_id=field("id", numbers=True) or "",
        subject=field("subject", numbers=True) or None,
        level=field("level", numbers=True) or None,
    )


def _field(row: Row, names: tuple[str, ...], where: str, *, numbers: bool = False) -> str | None:
    """The value as text; None where the field is absent or null."""
    name = next((n for n in names if _value(row, n) is not None), None)
    if name is None:
        return None
    value = _value(row, name)
    if numbers and isinstance(value, Literal):
        return str(value)
    if numbers and type(value) in (int, float) and math.isfinite(value):
        return str(value)
    if type(value) is str:
        return _unboxed(value, name, where) if name.startswith(BOXED) else value
    found = "a number" if isinstance(value, Literal | int | float) else type(value).__name__
    found = {"bool": "true or false", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, found
    )
    expected = "a text or a number" if numbers else "a text"
    raise InputError(
        f"field {name!r} is {found} ({brief(value)}), expected {expected}",
        where=where,
        remedy=EXPECTED,
    )


def _unboxed(text: str, name: str, where: str) -> str:
    boxed = last_boxed(text)
    if boxed is None:
        what = f"field {name.removeprefix(BOXED)!r} has no complete \\boxed{{}}: {brief(text)}"
        raise InputError(what, where=where, remedy="map the answer to another column, or leave "
                         "such rows out of the file")  # fmt: skip
    return boxed


def _value(row: Row, name: str) -> Any:
    """What is in the column; one with dots may also be a path into objects and lists."""
    name = name.removeprefix(BOXED)
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _has(row: Row, name: str) -> bool:
    return name.removeprefix(BOXED) in row or _value(row, name) is not None


def _missing(row: Row, field: str, names: Mapping[str, tuple[str, ...]], where: str) -> InputError:
    wanted = " or ".join(repr(name.removeprefix(BOXED)) for name in names[field])
    there = ", ".join(brief(str(name)) for name in list(row)[:12]) or "none"
    what = f"no field {wanted}; the row has: {there}"
    if field == "answer" and "solution" in row:
        what += " (a worked solution is not a final answer; --map answer=boxed:solution takes it)"
    remedy = EXPECTED if names[field] == NAMES[field] else "correct --map"
    return InputError(what, where=where, remedy=f"{remedy}; or --map {field}=COLUMN")
