"""Trajectories into rows and back; problems into the database.

The body codec: `clean` (the one place where text is altered) -> canonical JSON -> zstd. The content
hash is taken of the cleaned identity, before compression, and checked again at every read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import zstandard
from sqlalchemy import insert, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.errors import DatabaseError
from shared.store.models import ProblemRow, StepRow, TrajectoryRow, UsageRow, VerdictRow
from shared.trajectory import Check, Problem, Step, Trajectory, Verdict, canonical_json, clean
from shared.trajectory import content_hash as hash_of

IMPORT_BATCH = 1000  # problems per statement

# Plain tables, statements built once: the object mapper costs more than the inserts themselves.
_INSERT_TRAJECTORY = insert(TrajectoryRow.__table__).returning(TrajectoryRow.id)  # type: ignore[arg-type]
_INSERT_STEP, _INSERT_VERDICT, _INSERT_USAGE = (
    insert(row.__table__)  # type: ignore[arg-type]
    for row in (StepRow, VerdictRow, UsageRow)
)

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


@dataclass(frozen=True, slots=True)
class Encoded:
    """A trajectory ready for its row. `size` is the body's length in bytes before compression."""

    body: bytes
    size: int
    content_hash: str
    cleaned: bool


def encode(trajectory: Trajectory) -> Encoded:
    body, cleaned = clean(trajectory.body())
    plain = canonical_json(body)
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(plain)
    return Encoded(packed, len(plain), hash_of(clean(trajectory.identity())[0]), cleaned)


def decode(body: bytes) -> Trajectory:
    """Inverse of `encode`, up to what was cleaned. Raises zstandard.ZstdError for damaged bytes."""
    return Trajectory.from_body(json.loads(zstandard.ZstdDecompressor().decompress(body)))


def write_trajectory(session: Session, run_id: int, item_id: int, done: Completed) -> int:
    """Write trajectory, steps and verdicts; return the trajectory's id.

    Part of the caller's transaction, which must hold the item's lease (shared/work/items.py).
    """
    trajectory = done.trajectory
    encoded = encode(trajectory)
    calls = trajectory.calls
    row = {
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
        "imports": sorted({name for call in calls for name in imported_modules(call.code)}),
        "outcomes": sorted({call.result.outcome for call in calls}),
        "error_types": sorted(
            {clean(call.result.error.type)[0] for call in calls if call.result.error}
        ),
        "sandbox_tier": max((call.result.tier for call in calls), default=None),
        "reasoner_model": done.reasoner_model,
        "extractor_model": done.extractor_model,
        "code_version": done.code_version,
        "cleaned": encoded.cleaned,
        "body": encoded.body,
        "body_bytes": encoded.size,
    }
    trajectory_id = int(session.execute(_INSERT_TRAJECTORY, row).scalar_one())
    if trajectory.steps:
        steps = [_step_row(trajectory_id, i, step) for i, step in enumerate(trajectory.steps)]
        session.execute(_INSERT_STEP, steps)
    add_verdicts(session, trajectory_id, done.verdicts)
    return trajectory_id


def add_verdicts(session: Session, trajectory_id: int, verdicts: Sequence[Verdict]) -> None:
    """Append verdicts; the newest of each check is the current one (view `current_verdicts`)."""
    rows = [
        {
            "trajectory_id": trajectory_id,
            "check_name": verdict.check,
            "passed": verdict.passed,
            "version": verdict.version,
            "reason": clean(verdict.reason)[0],
            "evidence": clean(verdict.evidence)[0],
            "duration": verdict.duration,
        }
        for verdict in verdicts
    ]
    if rows:
        session.execute(_INSERT_VERDICT, rows)


def write_usage(
    session: Session, run_id: int, item_id: int, attempt: int, usage: Sequence[RoleUsage]
) -> None:
    key = {"run_id": run_id, "item_id": item_id, "attempt": attempt}
    if usage:
        session.execute(_INSERT_USAGE, [{**key, **asdict(one)} for one in usage])


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


def _step_row(trajectory_id: int, position: int, step: Step) -> dict[str, Any]:
    call = step.call
    if call is None:
        facts = dict.fromkeys(
            ("outcome", "error_type", "duration", "cpu_time", "peak_memory", "code_chars")
        )
        imports: list[str] = []
    else:
        result = call.result
        facts = {
            "outcome": result.outcome,
            "error_type": clean(result.error.type)[0] if result.error else None,
            "duration": result.duration,
            "cpu_time": result.cpu_time,
            "peak_memory": result.peak_memory,
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
