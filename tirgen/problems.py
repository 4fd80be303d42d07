"""Problem files: JSON lines, CSV, Parquet or a Hugging Face dataset, read as a stream.

Contract: a source yields problems that are distinct (by `Problem.key`) or raises an InputError that
names the file, the line or row, what was found there and what was expected. Nothing is guessed:
a row that cannot be used is an error. Left out, and counted, are only duplicates and rows whose
answer is blank (public datasets hold a few). What is held in memory of each row is its key and its
id, so files may be larger than memory.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from shared.errors import InputError
from shared.trajectory import Problem
from tirgen.optional import require

NANO = "nano"  # name of the packaged problems, wherever a source is asked for
SUFFIXES = ".jsonl, .json, .csv (each also with .gz), .parquet"
MAX_LINE = 1 << 24  # bytes; one problem is never that long, but a file of another kind may be

# Names that public datasets use, best first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id",),
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "target"),
    "source": ("source",),
    "subject": ("subject",),
    "level": ("level",),
}
EXPECTED = 'expected is e.g. {"id": "a1", "problem": "What is 6 times 7?", "answer": "42"}'

_FOUR_HASHES = re.compile(r"^####[ \t]*(.*\S)", re.MULTILINE)  # GSM8K: a worked solution, #### 72
_DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?", re.ASCII)

Row = Mapping[str, Any]


class Literal(str):
    """A JSON number as it stands in the file: 0.10 stays 0.10."""

    __slots__ = ()


def packaged_problems() -> Path:
    """The held-out problems of nano's world; on the command line the source `nano`."""
    return Path(str(files("shared.nano").joinpath("problems.jsonl")))


def load_problems(source: str, limit: int | None = None) -> ProblemStream:
    """Open `source`: a path, a dataset as ORG/NAME[:CONFIG][:SPLIT] (split: train), or `nano`.

    Yields at most `limit` problems. Raises InputError for what is there at all, here; for what is
    in it, while it is read. Raises ConfigError where an optional library is missing.
    """
    if source == NANO:
        return ProblemStream(source, _jsonl(packaged_problems()), "line", limit)
    path = Path(source)
    dataset = _DATASET.fullmatch(source)
    if not path.exists() and dataset and not _kind(path):
        return ProblemStream(source, _hugging_face(source, *dataset.groups()), "row", limit)
    readers = {"jsonl": _jsonl, "json": _jsonl, "csv": _csv, "parquet": _parquet}
    _check_file(path)
    kind = _kind(path)
    if kind is None:
        remedy = f"rename or convert it; known are {SUFFIXES}"
        raise InputError(
            "the file's name does not say what kind it is", where=source, remedy=remedy
        )
    return ProblemStream(source, readers[kind](path), "row" if kind == "parquet" else "line", limit)


class ProblemStream:
    """Distinct problems of one source, in its order; can be iterated once.

    What has been read so far: `n_rows` of them, of which were left out `n_duplicates` (text and
    answer were there before) and `n_unanswered` (the answer is there but blank).
    """

    def __init__(
        self, source: str, rows: Iterator[tuple[int, Row]], unit: str, limit: int | None
    ) -> None:
        self.source = source
        self.n_rows = 0
        self.n_duplicates = 0
        self.n_unanswered = 0
        self._unit = unit
        self._problems = islice(self._distinct(rows), limit)

    def __iter__(self) -> Iterator[Problem]:
        return self._problems

    def _distinct(self, rows: Iterator[tuple[int, Row]]) -> Iterator[Problem]:
        label = self.source.rpartition("/")[2] if Path(self.source).exists() else self.source
        seen: set[bytes] = set()
        by_id: dict[bytes, tuple[bytes, int]] = {}  # digests, and where the id was first
        for number, row in rows:
            where = f"{self.source}, {self._unit} {number}"
            problem = _problem(row, label, where)
            self.n_rows += 1
            if not problem.answer:
                self.n_unanswered += 1
                continue
            key = bytes.fromhex(problem.key)
            if problem.external_id:
                identifier = hashlib.sha256(problem.external_id.encode(errors="replace")).digest()
                first_key, first = by_id.setdefault(identifier, (key, number))
                if first_key != key:
                    raise InputError(
                        f"the id {_brief(problem.external_id)} is already that of another problem, "
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


def _problem(row: Row, label: str, where: str) -> Problem:
    """`answer` is "" where the row has a blank one."""
    text = _field(row, "problem", where)
    answer = _field(row, "answer", where, numbers=True)
    if text is None:
        raise _missing(row, "problem", where)
    if not text.strip():
        raise InputError("the problem is empty", where=where, remedy=EXPECTED)
    if answer is None and not any(name in row for name in NAMES["answer"]):
        raise _missing(row, "answer", where)
    marked = _FOUR_HASHES.findall(answer or "")
    return Problem(
        text=text,
        answer=marked[-1] if marked else (answer or "").strip(),
        source=_field(row, "source", where) or label,
        external_id=_field(row, "id", where, numbers=True) or "",
        subject=_field(row, "subject", where, numbers=True) or None,
        level=_field(row, "level", where, numbers=True) or None,
    )


def _field(row: Row, field: str, where: str, *, numbers: bool = False) -> str | None:
    """The value as text; None where the field is absent or null."""
    name = next((n for n in NAMES[field] if row.get(n) is not None), None)
    if name is None:
        return None
    value = row[name]
    if numbers and isinstance(value, Literal):
        return str(value)
    if numbers and type(value) in (int, float) and math.isfinite(value):
        return str(value)
    if type(value) is str:
        return value
    found = "a number" if isinstance(value, Literal | int | float) else type(value).__name__
    found = {"bool": "true or false", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, found
    )
    expected = "a text or a number" if numbers else "a text"
    raise InputError(
        f"field {name!r} is {found} ({_brief(value)}), expected {expected}",
        where=where,
        remedy=EXPECTED,
    )


def _missing(row: Row, field: str, where: str) -> InputError:
    names = " or ".join(repr(name) for name in NAMES[field])
    there = ", ".join(_brief(str(name)) for name in list(row)[:12]) or "none"
    what = f"no field {names}; the row has: {there}"
    if field == "answer" and "solution" in row:
        what += " (a worked solution is not a final answer)"
    return InputError(what, where=where, remedy=EXPECTED)


# ---- readers: each yields the line's or row's number, from 1, and its fields --------------------


def _kind(path: Path) -> str | None:
    """By suffix; None if it says nothing that is known."""
    name = path.name.lower()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("jsonl", "json", "csv"):
        return kind
    return "parquet" if name.endswith(".parquet") else None


def _check_file(path: Path) -> None:
    where = str(path)
    if path.is_dir():
        remedy = "name the files in it: tirgen generate FOLDER/*.jsonl"
        raise InputError("this is a folder, not a file", where=where, remedy=remedy)
    if not path.exists():
        remedy = "check the path; a dataset of the Hugging Face Hub is written ORG/NAME:SPLIT"
        raise InputError("there is no such file", where=where, remedy=remedy)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines as text. Raises InputError for what is not UTF-8 text."""
    where = str(path)
    try:
        with _opened(path) as stream:
            for number, raw in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
                yield number, _decoded(raw, f"{where}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "it is damaged or not compressed at all; fetch it again or drop the .gz"
        raise InputError(f"gzip cannot read it: {error}", where=where, remedy=remedy) from error
    except OSError as error:
        what = f"it cannot be read: {error.strerror or error}"
        raise InputError(what, where=where, remedy="check that you may read it") from error


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _decoded(raw: bytes, where: str) -> str:
    remedy = f"expected is UTF-8 text, one problem a line; known are {SUFFIXES}"
    if len(raw) > MAX_LINE:
        raise InputError(f"a line of more than {MAX_LINE} bytes", where=where, remedy=remedy)
    if b"\0" in raw:
        raise InputError("binary data (a NUL byte)", where=where, remedy=remedy)
    try:
        return raw.decode("utf-8-sig")  # Windows programs put a byte order mark first
    except UnicodeDecodeError as error:
        what = f"binary data (byte 0x{raw[error.start]:02x} is not UTF-8)"
        raise InputError(what, where=where, remedy=remedy) from error


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, parse_int=Literal, parse_float=Literal)
        except json.JSONDecodeError as error:
            raise _not_json(number, line, error, where) from error
        except RecursionError as error:
            what = "JSON nested too deeply"
            raise InputError(what, where=where, remedy=EXPECTED) from error
        if not isinstance(row, dict):
            what = f"expected one JSON object a line, found {_brief(row)}"
            raise InputError(what, where=where, remedy=EXPECTED)
        yield number, row


def _not_json(number: int, line: str, error: json.JSONDecodeError, where: str) -> InputError:
    if number == 1 and line.lstrip()[:1] in ("[", "{") and error.pos >= len(line.rstrip()):
        remedy = "write one object a line: jq -c '.[]' FILE > FILE.jsonl ('.' for loose objects)"
        what = "this is JSON over several lines, expected is one complete object a line"
        return InputError(what, where=where, remedy=remedy)
    near = _brief(line[max(0, error.pos - 20) : error.pos + 20].strip("\n"))
    what = f"broken JSON at column {error.colno}: {error.msg}, near {near}"
    return InputError(what, where=where, remedy=EXPECTED)


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    rows: Iterable[list[str]] = reader
    try:
        for cells in rows:
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{len(cells)} cells, but the header names {len(header)} columns",
                    where=f"{path}, line {reader.line_num}",
                    remedy="quote cells that hold commas or line breaks",
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        remedy = "quote cells that hold commas, quotes or line breaks"
        raise InputError(f"broken CSV: {error}", where=where, remedy=remedy) from error


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    need = {"need": "reading Parquet", "install": "tirgen[parquet]"}
    arrow, parquet = require("pyarrow", **need), require("pyarrow.parquet", **need)
    wanted = {name for names in NAMES.values() for name in names}
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            columns = [name for name in names if name in wanted]
            batches = table.iter_batches(batch_size=1000, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, row if columns else dict.fromkeys(names)
    except (arrow.ArrowException, OSError) as error:
        remedy = "it is damaged or of another kind; fetch or write it again"
        what = f"it cannot be read as Parquet: {_clip(str(error), 500)}"
        raise InputError(what, where=str(path), remedy=remedy) from error


def _hugging_face(
    source: str, name: str, first: str | None, second: str | None
) -> Iterator[tuple[int, Row]]:
    datasets = require(
        "datasets", need=f"{source!r} is no file; reading it from the Hub", install="datasets"
    )
    config, split = (first, second) if second else (None, first or "train")
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from enumerate(stream, start=1)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        remedy = (
            "a file is named by its path; a dataset needs a network and is written "
            "ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG:SPLIT"
        )
        what = f"the dataset cannot be read: {_clip(str(error), 500)}"
        raise InputError(what, where=source, remedy=remedy) from error


def _brief(value: Any) -> str:
    """A value in a message: quoted, control characters escaped, not long."""
    return _clip(ascii(value) if not isinstance(value, str) else ascii(str(value)))


def _clip(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
