"""Rows of a problem file, one after the other: JSON lines, CSV, Parquet, Hugging Face datasets.

Each reader yields the line's or row's number, from 1, and its fields, and raises InputError for
what is not of its kind. A file may be larger than memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from shared.errors import InputError
from shared.optional import require

SUFFIXES = ".jsonl, .json, .csv (each also with .gz), .parquet"
MAX_LINE = 1 << 24  # bytes; one problem is never that long, but a file of another kind may be
EXPECTED = 'expected is e.g. {"id": "a1", "problem": "What is 6 times 7?", "answer": "42"}'

_DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?", re.ASCII)

Row = Mapping[str, Any]
Numbered = Iterator[tuple[int, Row]]


class Literal(str):
    """A JSON number as it stands in the file: 0.10 stays 0.10."""

    __slots__ = ()


def read(source: str, wanted: frozenset[str]) -> tuple[Numbered, str]:
    """The rows of `source`, and whether they are lines or rows; `wanted` are columns of interest.

    Raises InputError for what is there at all, here; for what is in it, while it is read. Raises
    ConfigError where an optional library is missing.
    """
    path = Path(source)
    dataset = _DATASET.fullmatch(source)
    if not path.exists() and dataset and not _kind(path):
        return _hub(source, *dataset.groups()), "row"
    folder, colon, split = source.rpartition(":")
    if path.is_dir() or (colon and Path(folder).is_dir() and not path.exists()):
        whole = path.is_dir()
        return _folder(path if whole else Path(folder), "" if whole else split), "row"
    _check_file(path)
    kind = _kind(path)
    if kind is None:
        remedy = f"rename or convert it; known are {SUFFIXES}"
        raise InputError(
            "the file's name does not say what kind it is", where=source, remedy=remedy
        )
    if kind == "parquet":
        return _parquet(path, wanted), "row"
    return (_csv if kind == "csv" else _jsonl)(path), "line"


def _kind(path: Path) -> str | None:
    """By suffix; None if it says nothing that is known."""
    name = path.name.lower()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("jsonl", "json", "csv"):
        return kind
    return "parquet" if name.endswith(".parquet") else None


def _check_file(path: Path) -> None:
    where = str(path)
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


def _jsonl(path: Path) -> Numbered:
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
            what = f"expected one JSON object a line, found {brief(row)}"
            raise InputError(what, where=where, remedy=EXPECTED)
        yield number, row


def _not_json(number: int, line: str, error: json.JSONDecodeError, where: str) -> InputError:
    if number == 1 and line.lstrip()[:1] in ("[", "{") and error.pos >= len(line.rstrip()):
        remedy = "write one object a line: jq -c '.[]' FILE > FILE.jsonl ('.' for loose objects)"
        what = "this is JSON over several lines, expected is one complete object a line"
        return InputError(what, where=where, remedy=remedy)
    near = brief(line[max(0, error.pos - 20) : error.pos + 20].strip("\n"))
    what = f"broken JSON at column {error.colno}: {error.msg}, near {near}"
    return InputError(what, where=where, remedy=EXPECTED)


def _csv(path: Path) -> Numbered:
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


def _parquet(path: Path, wanted: frozenset[str]) -> Numbered:
    need = {"need": "reading Parquet", "install": "tirgen[parquet]"}
    arrow, parquet = require("pyarrow", **need), require("pyarrow.parquet", **need)
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
        what = f"it cannot be read as Parquet: {clip(str(error), 500)}"
        raise InputError(what, where=str(path), remedy=remedy) from error


def _hub(source: str, name: str, first: str | None, second: str | None) -> Numbered:
    config, split = (first, second) if second else (None, first or "train")
    datasets = _datasets(source)
    arguments = {"split": split, "streaming": True}
    yield from _loaded(datasets, source, lambda: datasets.load_dataset(name, config, **arguments))


def _folder(folder: Path, split: str) -> Numbered:
    """A folder that `datasets` wrote or reads: saved to disk, or holding Parquet files."""
    source = str(folder)
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).exists()]
    if not saved and next(folder.rglob("*.parquet"), None) is None:
        remedy = "name the files in it: tirgen generate FOLDER/*.jsonl"
        what = "this is a folder, not a file, and holds no dataset"
        raise InputError(what, where=source, remedy=remedy)
    datasets = _datasets(source)

    def load() -> Iterable[Row]:
        if not saved:
            return datasets.load_dataset(source, split=split or "train", streaming=True)  # type: ignore[no-any-return]
        found = datasets.load_from_disk(source)
        return found[split or "train"] if saved == ["dataset_dict.json"] else found  # type: ignore[no-any-return]

    return _loaded(datasets, source, load)


def _loaded(datasets: Any, source: str, load: Callable[[], Iterable[Row]]) -> Numbered:
    try:
        yield from enumerate(load(), start=1)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        remedy = (
            "a file or folder is named by its path (FOLDER:SPLIT); a dataset of the Hub needs a "
            "network and is written ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG:SPLIT"
        )
        what = f"the dataset cannot be read: {clip(str(error), 500)}"
        raise InputError(what, where=source, remedy=remedy) from error


def _datasets(source: str) -> Any:
    need = f"{source!r} is no file; reading it as a dataset"
    return require("datasets", need=need, install="tirgen[hub]")


def brief(value: Any) -> str:
    """A value in a message: quoted, control characters escaped, not long."""
    return clip(ascii(value) if not isinstance(value, str) else ascii(str(value)))


def clip(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
