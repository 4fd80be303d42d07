"""Trajectories into rows and back; problems into the database.

The body codec: `clean` (the one place where text is altered) -> canonical JSON -> zstd. The content
hash is taken of the cleaned identity, before compression, and checked again at every read.
"""

from __future__ import annotations

import hashlib
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import psycopg
import zstandard
from psycopg import pq, sql
from psycopg.adapt import Dumper
from sqlalchemy import select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.errors import DatabaseError
from shared.store.models import (
    Base,
    ProblemRow,
    StepRow,
    TrajectoryRow,
    UsageRow,
    VerdictRow,
)
from shared.trajectory import Check, Problem, Step, Trajectory, Verdict, clean, clean_json
from shared.trajectory import content_hash as hash_of

IMPORT_BATCH = 1000  # problems per statement
LEVEL = 1  # of zstd: takes two thirds of the default's time, for a few per cent more bytes

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]
_TEXT_OID = 25
_local = threading.local()

_NEXT_IDS = text("SELECT nextval('trajectories_id_seq') FROM generate_series(1, :n)")

_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+(\w+)|import[ \t]+([\w.,\t ]+))", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class RoleUsage:
    """What one role's model calls cost within one attempt. `duration` in seconds."""

    role: str
    model: str
    endpoint: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    retries: int
    duration: float


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished trajectory as the worker hands it over: vetted unless `rejected_by` a check."""

    trajectory: Trajectory
    verdicts: tuple[Verdict, ...]
    rejected_by: Check | None
    duration: float  # seconds, start to verdicts
    reasoner_model: str
    extractor_model: str | None
    code_version: str
    usage: tuple[RoleUsage, ...] = ()
    stored: Encoded | None = None  # by another database, to the byte; or ahead of its turn


@dataclass(frozen=True, slots=True)
class Encoded:
    """A trajectory ready for its row. `size` is the body's length in bytes before compression."""

    body: bytes
    size: int
    content_hash: str
    cleaned: bool


def encode(trajectory: Trajectory) -> Encoded:
    plain, cleaned = clean_json(trajectory)
    identity, _ = clean_json(trajectory.identity())
    packed = _compressor().compress(plain)
    return Encoded(packed, len(plain), hashlib.sha256(identity).hexdigest(), cleaned)


def decode(body: bytes) -> Trajectory:
    """Inverse of `encode`, up to what was cleaned. Raises zstandard.ZstdError for damaged bytes."""
    return Trajectory.from_json(zstandard.ZstdDecompressor().decompress(body))


def write_trajectory(session: Session, run_id: int, item_id: int, done: Completed) -> int:
    """`write_trajectories` for one; returns its id."""
    return write_trajectories(session, run_id, [(item_id, done)])[0]


def write_trajectories(
    session: Session, run_id: int, made: Sequence[tuple[int, Completed]]
) -> list[int]:
    """Write trajectories, steps and verdicts, each with its item's id; return their ids, in order.

    Part of the caller's transaction, which must hold the items' leases (shared/work/items.py).
    A trajectory is encoded while the server inserts the one before it.
    """
    ids = [int(i) for i in session.scalars(_NEXT_IDS, {"n": len(made)})]
    steps: list[dict[str, Any]] = []

    def rows() -> Iterator[dict[str, Any]]:
        for id, (item_id, done) in zip(ids, made, strict=True):
            its_steps = [_step_row(id, i, step) for i, step in enumerate(done.trajectory.steps)]
            yield _trajectory_row(id, run_id, item_id, done, its_steps)
            steps.extend(its_steps)

    copy_in(session, TrajectoryRow, rows())
    copy_in(session, StepRow, steps)
    of_each = zip(ids, (done.verdicts for _, done in made), strict=True)
    add_verdicts(session, ((id, verdict) for id, verdicts in of_each for verdict in verdicts))
    return ids


def add_verdicts(session: Session, verdicts: Iterable[tuple[int, Verdict]]) -> None:
    """Append verdicts, each with its trajectory's id.

    The newest of each check is the current one (view `current_verdicts`).
    """
    rows = (
        {
            "trajectory_id": trajectory_id,
            "check_name": verdict.check,
            "passed": verdict.passed,
            "version": verdict.version,
            "reason": clean(verdict.reason)[0],
            "evidence": verdict.evidence,
            "duration": verdict.duration,
        }
        for trajectory_id, verdict in verdicts
    )
    copy_in(session, VerdictRow, rows)


def write_usage(session: Session, run_id: int, spent: Iterable[tuple[int, int, RoleUsage]]) -> None:
    """What attempts cost: (item, attempt, usage) each."""
    rows = (
        {"run_id": run_id, "item_id": item_id, "attempt": attempt, **_fields(usage)}
        for item_id, attempt, usage in spent
    )
    copy_in(session, UsageRow, rows)


def copy_in(session: Session, table: type[Base], rows: Iterable[Mapping[str, Any]]) -> None:
    """Insert rows by COPY, in the session's transaction: several times as fast as INSERT.

    Every row has the same keys, in the same order. JSON is cleaned, texts must be clean already.
    Raises psycopg's errors, unwrapped.
    """
    listed = iter(rows)
    first = next(listed, None)
    if first is None:
        return
    statement, types = _copy_of(table, tuple(first))
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, psycopg.Connection)
    with connection.cursor() as cursor:
        cursor.adapters.register_dumper(None, _TextArray)
        cursor.adapters.register_dumper(None, _Json)
        with cursor.copy(statement) as copy:
            copy.set_types(types)
            copy.write_row(tuple(first.values()))
            for row in listed:
                copy.write_row(tuple(row.values()))


def read(session: Session, trajectory_id: int) -> Trajectory:
    """The trajectory as it was generated.

    Raises DatabaseError if there is none, or if its content hash does not match its body.
    """
    columns = select(TrajectoryRow.body, TrajectoryRow.content_hash)
    row = session.execute(columns.where(TrajectoryRow.id == trajectory_id)).one_or_none()
    where = f"trajectory {trajectory_id}"
    if row is None:
        remedy = "look the id up with `tirgen query`"
        raise DatabaseError("there is no such trajectory", where=where, remedy=remedy)
    trajectory = decode(row.body)
    if hash_of(trajectory.identity()) != row.content_hash:
        what = "the stored trajectory does not match its content hash"
        raise DatabaseError(what, where=where, remedy="restore this row from a backup")
    return trajectory


def import_problems(session: Session, problems: Iterable[Problem]) -> int:
    """Insert those problems that are not there yet; return how many were new."""
    rows = ({"key": p.key, **clean(asdict(p))[0]} for p in problems)
    statement = upsert(ProblemRow).on_conflict_do_nothing().returning(ProblemRow.key)
    new = 0
    while batch := list(islice(rows, IMPORT_BATCH)):
        new += len(session.execute(statement, batch).all())
    return new


def imported_modules(code: str) -> list[str]:
    """Top-level modules that `code` seems to import, sorted.

    By pattern, not by parser: a deep enough expression can crash Python's own.
    """
    names: set[str] = set()
    for source, listed in _IMPORT.findall(code):
        parts = [source] if source else listed.split(",")
        names.update(part.split(".")[0].split()[0] for part in parts if part.strip(" \t."))
    return sorted(names)


def _trajectory_row(
    id: int, run_id: int, item_id: int, done: Completed, steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    trajectory = done.trajectory
    encoded = done.stored or encode(trajectory)
    results = [call.result for call in trajectory.calls]
    return {
        "id": id,
        "run_id": run_id,
        "item_id": item_id,
        "problem_key": trajectory.problem_key,
        "content_hash": encoded.content_hash,
        "end_reason": trajectory.end,
        "answer": clean(trajectory.answer)[0],
        "vetted": done.rejected_by is None,
        "reject_check": done.rejected_by,
        "thinking": trajectory.thinking,
        "seed": trajectory.seed,
        "n_steps": len(trajectory.steps),
        "n_calls": trajectory.n_calls,
        "n_failed_calls": trajectory.n_failed_calls,
        "n_corrections": sum(len(step.discarded) for step in trajectory.steps),
        "n_tokens": trajectory.n_tokens,
        "duration": done.duration,
        "imports": sorted({name for step in steps for name in step["imports"]}),
        "outcomes": sorted({str(result.outcome) for result in results}),
        "error_types": sorted({step["error_type"] for step in steps} - {None}),
        "sandbox_tier": max((result.tier for result in results), default=None),
        "reasoner_model": done.reasoner_model,
        "extractor_model": done.extractor_model,
        "code_version": done.code_version,
        "cleaned": encoded.cleaned,
        "body": encoded.body,
        "body_bytes": encoded.size,
    }


def _step_row(trajectory_id: int, position: int, step: Step) -> dict[str, Any]:
    call = step.call
    if call is None:
        facts = dict.fromkeys(
            ("outcome", "error_type", "duration", "cpu_time", "peak_memory", "sandbox_tier",
             "replayed", "bytes_cut", "code_chars")
        )  # fmt: skip
        imports: list[str] = []
    else:
        result = call.result
        facts = {
            "outcome": result.outcome,
            "error_type": clean(result.error.type)[0] if result.error else None,
            "duration": result.duration,
            "cpu_time": result.cpu_time,
            "peak_memory": result.peak_memory,
            "sandbox_tier": result.tier,
            "replayed": result.replayed,
            "bytes_cut": result.bytes_cut,
            "code_chars": len(call.code),
        }
        imports = imported_modules(call.code)
    return {
        "trajectory_id": trajectory_id,
        "position": position,
        "has_call": call is not None,
        "imports": imports,
        **facts,
    }


def _fields(usage: RoleUsage) -> dict[str, Any]:
    return {name: getattr(usage, name) for name in RoleUsage.__slots__}


@lru_cache
def _copy_of(table: type[Base], names: tuple[str, ...]) -> tuple[sql.Composed, list[str]]:
    """The COPY statement, and PostgreSQL's names for the columns' types."""
    columns = [table.__table__.columns[name] for name in names]
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(table.__tablename__), sql.SQL(", ").join(map(sql.Identifier, names))
    )
    return statement, [str(column.type.compile(_DIALECT)).lower() for column in columns]


class _Json(Dumper):
    """jsonb for COPY: its version, then the text."""

    format = pq.Format.BINARY
    oid = 3802

    def dump(self, obj: Mapping[str, Any]) -> bytes:
        return b"\x01" + clean_json(obj)[0]


class _TextArray(Dumper):
    """text[] for COPY. The same few lists come again and again, and psycopg's own takes long."""

    format = pq.Format.BINARY
    oid = 1009

    def dump(self, obj: list[str]) -> bytes:
        return _text_array(tuple(obj))


@lru_cache(maxsize=1024)
def _text_array(values: tuple[str, ...]) -> bytes:
    """PostgreSQL's array_send: dimensions, no NULLs, element type; then length and lower bound."""
    if not values:
        return struct.pack("!iii", 0, 0, _TEXT_OID)
    parts = [struct.pack("!iiiii", 1, 0, _TEXT_OID, len(values), 1)]
    for value in map(str.encode, values):
        parts.append(struct.pack("!i", len(value)) + value)
    return b"".join(parts)


def _compressor() -> zstandard.ZstdCompressor:
    """One per thread: making one costs as much as using it, and threads must not share it."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(LEVEL, write_checksum=True)
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor
