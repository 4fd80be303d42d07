"""Rows of a query as a stream of bytes: JSON, JSON lines, CSV, Parquet. Memory stays constant."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TextIO

from shared.errors import ConfigError
from shared.optional import require
from shared.terminal import json_text, line
from tirgen.fields import Kind

ROW_GROUP = 10_000
Columns = Mapping[str, Kind]  # name and type
Rows = Iterator[tuple[Any, ...]]


def write_json(columns: Columns, rows: Rows, out: TextIO) -> None:
    """One array, a row a line."""
    separator = "[\n"
    for row in rows:
        out.write(separator + json_text(dict(zip(columns, row, strict=True))))
        separator = ",\n"
    out.write("\n]\n" if separator != "[\n" else "[]\n")


def write_jsonl(columns: Columns, rows: Rows, out: TextIO) -> None:
    for row in rows:
        out.write(json_text(dict(zip(columns, row, strict=True))) + "\n")


def write_csv(columns: Columns, rows: Rows, out: TextIO) -> None:
    """Missing values are empty, lists JSON. A file gets texts as they are, a terminal harmless."""
    safe = out.isatty()
    plain = csv.writer(out, lineterminator="\n")
    quoted = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(columns)
    for row in rows:
        cells = [_csv(value) for value in row]
        if safe:
            cells = [line(cell, len(cell)) if isinstance(cell, str) else cell for cell in cells]
        # Python's writer leaves a lone carriage return unquoted, which ends a row elsewhere.
        has_return = any(isinstance(v, str) and "\r" in v for v in cells)
        (quoted if has_return else plain).writerow(cells)


def write_parquet(columns: Columns, rows: Rows, out: TextIO) -> None:
    need = {"need": "writing Parquet", "install": "tirgen[parquet]"}
    arrow, parquet = require("pyarrow", **need), require("pyarrow.parquet", **need)
    if out.isatty():
        remedy = "send it to a file: tirgen query ... --format parquet > FILE.parquet"
        raise ConfigError("Parquet is binary", where="--format parquet", remedy=remedy)
    types = {
        Kind.TEXT: arrow.string(),
        Kind.INTEGER: arrow.int64(),
        Kind.NUMBER: arrow.float64(),
        Kind.BOOLEAN: arrow.bool_(),
        Kind.TIME: arrow.timestamp("us", tz="UTC"),
        Kind.TEXTS: arrow.list_(arrow.string()),
    }
    schema = arrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(_Sink(out), schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            values = zip(*group, strict=True)
            arrays = [arrow.array(v, f.type) for v, f in zip(values, schema, strict=True)]
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))


WRITERS = {
    "json": write_json, "jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet,
}  # fmt: skip


class _Sink:
    """Standard output as pyarrow wants a file: a pipe does not know its own position."""

    closed = False

    def __init__(self, out: TextIO) -> None:
        self._out, self._position = out.buffer, 0

    def write(self, data: bytes) -> int:
        self._position += len(data)
        return self._out.write(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        self._out.flush()

    def close(self) -> None:
        self.flush()


def _csv(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return value.isoformat() if hasattr(value, "isoformat") else value
