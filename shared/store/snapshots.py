"""Snapshots: frozen, ordered selections of trajectories or problems.

The **manifest** is a text: a header, then one line a row in order of position, tab separated, and
nothing in it is local to a database. Its SHA-256 is the snapshot's **digest**, so that a copy in
another database, or in a folder, has the same one:

    tirgen-snapshot  1  trajectories  N
    position  split  problem_key  content_hash  body_hash  verdicts_hash

    tirgen-snapshot  1  problems  N
    position  split  problem_key  n_passed  n_samples

`problem_key` covers the question and its answer, `body_hash` every byte of the stored trajectory,
`verdicts_hash` what the verdicts used say. Positions run from 0 without a gap; a split is a range
of them. The **record** (name, digest, lineage, who and when) has a checksum of its own.

In the database, the rows are written first and the record last, in one transaction; from then on
triggers refuse every change but the deletion of the whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import psycopg
from psycopg.errors import SerializationFailure
from sqlalchemy import delete as deletion
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared.errors import ConfigError, DatabaseError, InputError
from shared.store.models import RunRow, SnapshotKind, SnapshotRow, SnapshotRunRow
from shared.trajectory import content_hash

FORMAT = 1

COLUMNS = {
    SnapshotKind.TRAJECTORIES: (
        "position", "split", "problem_key", "content_hash", "body_hash", "verdicts_hash",
    ),
    SnapshotKind.PROBLEMS: ("position", "split", "problem_key", "n_passed", "n_samples"),
}  # fmt: skip

SAID = ("check", "passed", "version", "reason", "evidence")  # of a verdict

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Record:
    """All that is said of a snapshot as a whole. `splits`: rows by name, in order of position."""

    name: str
    kind: SnapshotKind
    digest: str
    n_rows: int
    splits: Mapping[str, int]
    lineage: Mapping[str, Any]
    created_by: str
    created_at: datetime

    @property
    def checksum(self) -> str:
        """SHA-256 over the canonical form of all fields."""
        return content_hash(self.to_json())

    def to_json(self) -> dict[str, Any]:
        splits = [[name, n] for name, n in self.splits.items()]
        created = self.created_at.astimezone(UTC).isoformat(timespec="microseconds")
        return {**asdict(self), "splits": splits, "created_at": created, "format": FORMAT}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        fields = dict(value)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"not format {FORMAT}")
        fields["kind"] = SnapshotKind(fields["kind"])
        fields["splits"] = {name: int(n) for name, n in fields["splits"]}
        fields["created_at"] = datetime.fromisoformat(fields["created_at"])
        return cls(**fields)

    def range(self, split: str | None) -> tuple[int, int]:
        """First position of `split` and the one after its last; None means all.

        Raises ConfigError, naming the splits that there are.
        """
        if split is None:
            return 0, self.n_rows
        first = 0
        for name, n in self.splits.items():
            if name == split:
                return first, first + n
            first += n
        raise ConfigError(
            f"snapshot {self.name} has no split {split!r}",
            where="split", remedy=f"it has {', '.join(self.splits)}",
        )  # fmt: skip


def check_name(name: str) -> str:
    """Raises ConfigError where `name` could be taken for a path, an option or another name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a snapshot",
            where="NAME",
            remedy="use letters, digits, '-', '_' and '.', at most 100, a letter or digit first",
        )
    return name


def is_folder(name: str | Path) -> bool:
    """Whether an exported snapshot is meant: a Path, or a text with a slash, which no name has."""
    return isinstance(name, Path) or os.sep in name


def digest_of(kind: SnapshotKind, n_rows: int, lines: Iterable[bytes]) -> str:
    """SHA-256 (hex) of the manifest. `lines`: its text after the header, cut anywhere."""
    total = hashlib.sha256(f"tirgen-snapshot\t{FORMAT}\t{kind}\t{n_rows}\n".encode())
    for part in lines:
        total.update(part)
    return total.hexdigest()


def manifest(
    connection: psycopg.Connection[Any], snapshot_id: int, kind: SnapshotKind
) -> Iterator[bytes]:
    """The manifest's lines, as COPY writes them: names and hashes need no escapes."""
    statement = (
        f"COPY (SELECT {', '.join(COLUMNS[kind])} FROM snapshot_rows "
        f"WHERE snapshot_id = {snapshot_id:d} ORDER BY position) TO STDOUT"
    )
    with connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        for part in copy:
            yield bytes(part)


def verdicts_hash(verdicts: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over what verdicts say, in whatever order they come; not when, or how fast.

    Each has `check`, `passed`, `version`, `reason` and `evidence`, as they come from the database.
    """
    said = [{name: verdict[name] for name in SAID} for verdict in verdicts]
    return content_hash(sorted(said, key=lambda verdict: (verdict["check"], verdict["version"])))


def find(session: Session, name: str) -> tuple[int, Record]:
    """Id and record of the snapshot `name`.

    Raises InputError, naming those that there are, or DatabaseError if the record was altered.
    """
    row = session.scalar(select(SnapshotRow).where(SnapshotRow.name == name))
    if row is None:
        newest = select(SnapshotRow.name).order_by(SnapshotRow.id.desc()).limit(10)
        there = session.scalars(newest).all()
        raise InputError(
            f"there is no snapshot named {name!r}",
            remedy=f"newest snapshots: {', '.join(there)}" if there else "there is none yet: "
            "tirgen snapshot create NAME --where 'vetted'",
        )  # fmt: skip
    return row.id, _checked(row)


def records(session: Session) -> list[Record]:
    """Every snapshot, newest first. Raises DatabaseError as `find` does."""
    rows = session.scalars(select(SnapshotRow).order_by(SnapshotRow.id.desc()))
    return [_checked(row) for row in rows]


def of_run(session: Session, run: str) -> list[str]:
    """Names of the snapshots that hold something of that run: reasons not to delete it."""
    statement = (
        select(SnapshotRow.name)
        .join(SnapshotRunRow, SnapshotRunRow.snapshot_id == SnapshotRow.id)
        .join(RunRow, RunRow.id == SnapshotRunRow.run_id)
    )
    return list(session.scalars(statement.where(RunRow.name == run).order_by(SnapshotRow.name)))


def reserve(session: Session) -> int:
    """The id of a snapshot to come, under which its rows are written."""
    sequence = func.pg_get_serial_sequence("snapshots", "id")
    return int(session.execute(select(func.nextval(sequence))).scalar_one())


def seal(session: Session, snapshot_id: int, record: Record) -> None:
    """Write the record behind its rows; from here on nothing about the snapshot can change.

    Raises DatabaseError unless the rows are those of the digest, InputError if the name is taken.
    """
    lines = manifest(driver(session), snapshot_id, record.kind)
    if digest_of(record.kind, record.n_rows, lines) != record.digest:
        raise DatabaseError(
            "the rows that were written do not give the snapshot's digest",
            where=f"snapshot {record.name}",
            remedy="nothing was kept; try again, and report this if it happens twice",
        )
    row = {
        "id": snapshot_id, "name": record.name, "kind": record.kind, "digest": record.digest,
        "n_rows": record.n_rows, "splits": dict(record.splits), "lineage": dict(record.lineage),
        "created_by": record.created_by, "created_at": record.created_at,
        "checksum": record.checksum,
    }  # fmt: skip
    statement = insert(SnapshotRow).values(row).on_conflict_do_nothing().returning(SnapshotRow.id)
    try:
        id = session.execute(statement).scalar_one_or_none()
    except OperationalError as error:
        if not isinstance(error.orig, SerializationFailure):
            raise
        id = None  # taken since this transaction began
    if id is None:
        refuse_taken(record.name)


def refuse_taken(name: str) -> NoReturn:
    raise InputError(
        f"there is a snapshot named {name!r} already",
        remedy="choose another name; snapshots are never overwritten",
    )


def delete(session: Session, name: str) -> Record:
    """Remove the whole snapshot: its record and manifest, never its trajectories.

    Raises InputError if there is none.
    """
    snapshot_id, record = find(session, name)
    session.execute(select(func.set_config("tirgen.delete_snapshot", name, True)))
    session.execute(deletion(SnapshotRow).where(SnapshotRow.id == snapshot_id))
    return record


def driver(session: Session) -> psycopg.Connection[Any]:
    """psycopg's own connection under `session`, for COPY."""
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, psycopg.Connection)
    return connection


def _checked(row: SnapshotRow) -> Record:
    record = Record(
        row.name, SnapshotKind(row.kind), row.digest, row.n_rows, row.splits, row.lineage,
        row.created_by, row.created_at,
    )  # fmt: skip
    if record.checksum != row.checksum:
        raise DatabaseError(
            "the snapshot's record was altered: it does not match its checksum",
            where=f"snapshot {row.name}", remedy="restore it from a backup or an export",
        )  # fmt: skip
    return record
