"""A snapshot as a folder: Parquet shards, and a manifest file that answers for every byte of them.

    DIR/manifest.json                          the record, and each shard with its SHA-256
    DIR/data/train-00000-of-00002.parquet      rows in order of position, of one split
    DIR/README.md                              dataset card; may be edited

`manifest.json` is written in one way only and carries a checksum over itself, so that a changed
byte shows there too. The columns are for reading (`problem`, `response`, `steps` ...); what a
reader of ours takes is `body`, the trajectory's stored bytes, whose hash the digest covers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from shared.errors import ConfigError, InputError
from shared.store.models import SnapshotKind
from shared.store.snapshot_rows import PAGE, Shard, StoredRow
from shared.store.snapshots import COLUMNS, Record, digest_of
from shared.trajectory import content_hash

MANIFEST = "manifest.json"
GROUP = 256  # rows of a row group, which is written and read as a whole
_PATH = re.compile(r"data/[A-Za-z0-9._-]+\.parquet")
_REMEDY = "export the snapshot again, or fetch the folder again"


@dataclass(frozen=True, slots=True)
class File:
    """One shard: `rows` rows from position `first` on."""

    path: str
    sha256: str
    bytes: int
    first: int
    rows: int


def schema(kind: SnapshotKind) -> Any:
    """Columns of a shard. Position, split and problem are common to both kinds."""
    arrow, _ = pyarrow()
    text, number = arrow.string(), arrow.int32()
    step = arrow.struct(
        [("thought", text), ("code", text), ("observation", text), ("outcome", text)]
    )
    common = [
        ("position", number), ("split", text), ("problem_key", text), ("problem", text),
        ("reference", text), ("source", text), ("external_id", text), ("subject", text),
        ("level", text),
    ]  # fmt: skip
    own = {
        SnapshotKind.PROBLEMS: [
            ("n_passed", number), ("n_samples", number), ("pass_rate", arrow.float64()),
        ],
        SnapshotKind.TRAJECTORIES: [
            ("response", text), ("answer", text), ("steps", arrow.list_(step)),
            ("n_calls", number), ("n_tokens", number), ("run", text), ("model", text),
            ("content_hash", text), ("body_hash", text), ("verdicts_hash", text),
            ("verdicts", text), ("origin", text), ("body", arrow.binary()),
        ],
    }  # fmt: skip
    return arrow.schema(common + own[kind])


def write_shard(path: Path, kind: SnapshotKind, rows: Iterator[Mapping[str, Any]]) -> int:
    """Write all of `rows`, GROUP at a time; returns how many there were."""
    arrow, parquet = pyarrow()
    wanted = schema(kind)
    # A body is compressed already.
    packing = {name: "none" if name == "body" else "zstd" for name in wanted.names}
    n = 0
    with parquet.ParquetWriter(path, wanted, compression=packing) as writer:
        page: list[Mapping[str, Any]] = []
        for row in rows:
            page.append(row)
            if len(page) == GROUP:
                writer.write_table(arrow.Table.from_pylist(page, schema=wanted))
                n, page = n + len(page), []
        writer.write_table(arrow.Table.from_pylist(page, schema=wanted))
    return n + len(page)


def write_manifest(folder: Path, record: Record, files: Sequence[File]) -> None:
    value = {"record": record.to_json(), "files": [asdict(file) for file in files]}
    (folder / MANIFEST).write_bytes(_rendered(value))


def describe(folder: Path, path: str, first: int, rows: int) -> File:
    """The entry of a shard that lies in `folder`."""
    with (folder / path).open("rb") as shard:
        sha256 = hashlib.file_digest(shard, "sha256").hexdigest()
    return File(path, sha256, (folder / path).stat().st_size, first, rows)


@dataclass(frozen=True, slots=True)
class ParquetSource:
    record: Record
    folder: Path
    files: tuple[File, ...]

    @classmethod
    def open(cls, folder: Path) -> ParquetSource:
        """Raises InputError where `folder` is no export or its manifest file was altered."""
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"there is no exported snapshot: {error.strerror}",
                where=str(path), remedy="name the folder that `tirgen snapshot export` wrote",
            ) from error  # fmt: skip
        try:
            value = json.loads(raw)
            record = Record.from_json(value["record"])
            files = tuple(File(**file) for file in value["files"])
            is_whole = raw == _rendered({"record": record.to_json(), "files": value["files"]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _altered("the manifest file", path) from error
        if not is_whole or not all(_PATH.fullmatch(file.path) for file in files):
            raise _altered("the manifest file", path)
        ends = [0, *(file.first + file.rows for file in files)]
        if [file.first for file in files] != ends[:-1] or ends[-1] != record.n_rows:
            raise _altered("the manifest file", path)
        return cls(record, folder, files)

    @property
    def columns(self) -> list[str]:
        """Those of a shard that a StoredRow is made of."""
        return [name for name in StoredRow._fields if name in schema(self.record.kind).names]

    def pages(self, shard: Shard, stop: Event) -> Iterator[list[StoredRow]]:
        self.check()
        positions = shard.positions()
        for file in self.files:
            if positions and positions[0] < file.first + file.rows and file.first <= positions[-1]:
                self.check_file(file)
                for first, table in self.tables(file, self.columns):
                    consecutive = range(first, first + table.num_rows)
                    chosen = [p - first for p in consecutive if p in positions]
                    for at in range(0, len(chosen), PAGE):
                        yield stored_rows(table.take(chosen[at : at + PAGE]))

    def check(self) -> None:
        """Raises InputError unless the shards' rows have the record's digest."""
        if digest_of(self.record.kind, self.record.n_rows, self._lines()) != self.record.digest:
            raise _altered("the content of the shards", self.folder)

    def check_file(self, file: File) -> None:
        """Raises InputError unless every byte of the shard is as it was written."""
        path = self.folder / file.path
        try:
            with path.open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"a shard cannot be read: {error.strerror}", where=str(path), remedy=_REMEDY
            ) from error
        if found != file.sha256:
            raise _altered(f"shard {file.path}", self.folder)

    def tables(self, file: File, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """The shard's row groups as (first position, Arrow table), one in memory at a time."""
        arrow, parquet = pyarrow()
        first = file.first
        try:
            with (self.folder / file.path).open("rb") as handle:
                # Arrow's own threads can abort a process that ends soon after they were started.
                groups = parquet.ParquetFile(handle, pre_buffer=False)
                for i in range(groups.num_row_groups):
                    table = groups.read_row_group(i, columns=list(columns), use_threads=False)
                    yield first, table
                    first += table.num_rows
        except (OSError, arrow.ArrowException) as error:
            raise _altered(f"shard {file.path}", self.folder) from error

    def _lines(self) -> Iterator[bytes]:
        names = COLUMNS[self.record.kind]
        for file in self.files:
            for _, table in self.tables(file, names):
                values = (map(str, table.column(name).to_pylist()) for name in names)
                yield "".join("\t".join(row) + "\n" for row in zip(*values, strict=True)).encode()


def stored_rows(table: Any) -> list[StoredRow]:
    """An Arrow table of at least a source's `columns`, as rows."""
    nothing = [None] * table.num_rows
    values = (
        table.column(name).to_pylist() if name in table.column_names else nothing
        for name in StoredRow._fields
    )  # fmt: skip
    return [StoredRow(*row) for row in zip(*values, strict=True)]


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet, which only folders need. Raises ConfigError without them."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(
            "exported snapshots need the Python package 'pyarrow'",
            where=str(error),
            remedy="pip install 'tirgen[parquet]'",
        ) from error
    return pyarrow, parquet


def _rendered(value: Mapping[str, Any]) -> bytes:
    whole = {**value, "checksum": content_hash(value)}
    return (json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _altered(what: str, where: Path) -> InputError:
    return InputError(
        f"{what} was altered: it is not what was exported", where=str(where), remedy=_REMEDY
    )
