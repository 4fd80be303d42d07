"""A snapshot's rows between source and reader: as they are stored, checked and handed out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple, Protocol

import zstandard

from shared.errors import DatabaseError
from shared.store.snapshots import Record
from shared.store.trajectories import decode
from shared.trajectory import Problem, Trajectory

PAGE = 256  # rows that are read at a time: unpacked about 4 MB
UNPACK_LIMIT = 64 << 20  # bytes of a page that are unpacked at once, ahead of their use

UNREADABLE = (zstandard.ZstdError, ValueError, KeyError, TypeError)  # what `decode` may raise


class StoredRow(NamedTuple):
    """One row as a database or a folder holds it, nothing of it checked yet."""

    position: int
    split: str
    problem_key: str
    problem: str
    reference: str
    source: str
    external_id: str
    subject: str | None
    level: str | None
    content_hash: str | None
    body_hash: str | None
    body: bytes | None
    n_passed: int | None
    n_samples: int | None


@dataclass(frozen=True, slots=True)
class TrajectoryEntry:
    """A row of a snapshot of trajectories."""

    position: int
    split: str
    problem: Problem
    trajectory: Trajectory
    content_hash: str


@dataclass(frozen=True, slots=True)
class ProblemEntry:
    """A row of a snapshot of problems: `n_passed` of `n_samples` measured answers were right."""

    position: int
    split: str
    problem: Problem
    n_passed: int
    n_samples: int

    @property
    def pass_rate(self) -> float | None:
        """Between 0 and 1; None where nothing was measured."""
        return self.n_passed / self.n_samples if self.n_samples else None


@dataclass(frozen=True, slots=True)
class Shard:
    """The positions p in [start, stop) with p % of == index."""

    index: int
    of: int
    start: int
    stop: int

    def positions(self) -> range:
        first = self.start + (self.index - self.start) % self.of
        return range(first, self.stop, self.of)


class Source(Protocol):
    """Where a snapshot lies."""

    @property
    def record(self) -> Record: ...

    def pages(self, shard: Shard, stop: Event) -> Iterator[list[StoredRow]]:
        """The shard's rows in order, the manifest's digest checked before the first.

        Once `stop` is set, nothing is waited for any more. Raises DatabaseError or InputError
        where rows are damaged or cannot be read.
        """
        ...


def unpack(page: Sequence[StoredRow]) -> list[bytes | None]:
    """The page's bodies, unpacked in one call that lets other threads run.

    None for all where that has to wait until a hash was checked: one is damaged, or together they
    are larger than UNPACK_LIMIT.
    """
    later: list[bytes | None] = [None] * len(page)
    bodies: list[bytes | bytearray | memoryview] = [r.body for r in page if r.body is not None]
    if not bodies:
        return later
    try:
        if sum(map(zstandard.frame_content_size, bodies)) > UNPACK_LIMIT:
            return later
        plain = zstandard.ZstdDecompressor().multi_decompress_to_buffer(bodies)
    except zstandard.ZstdError:
        return later
    return [plain[i].tobytes() for i in range(len(plain))]


def trajectory_entry(row: StoredRow, where: str, plain: bytes | None = None) -> TrajectoryEntry:
    """The checked row; `plain` is its body, if it was unpacked already.

    Raises DatabaseError for a body or a problem that is not the frozen one.
    """
    problem = _problem(row, where)
    body = row.body or b""
    if hashlib.sha256(body).hexdigest() != row.body_hash:
        raise _altered("its trajectory", row, where)
    try:
        made = decode(body) if plain is None else Trajectory.from_json(plain)
    except UNREADABLE as error:
        raise _altered("its trajectory", row, where) from error
    return TrajectoryEntry(row.position, row.split, problem, made, row.content_hash or "")


def problem_entry(row: StoredRow, where: str, plain: bytes | None = None) -> ProblemEntry:
    """The checked row. Raises DatabaseError for a problem that is not the frozen one."""
    problem = _problem(row, where)
    return ProblemEntry(row.position, row.split, problem, row.n_passed or 0, row.n_samples or 0)


def _problem(row: StoredRow, where: str) -> Problem:
    problem = Problem(
        row.problem, row.reference, row.source, row.external_id, row.subject, row.level
    )
    if problem.key != row.problem_key:
        raise _altered("its problem", row, where)
    return problem


def _altered(what: str, row: StoredRow, where: str) -> DatabaseError:
    return DatabaseError(
        f"row {row.position} was altered: {what} is not what was frozen",
        where=where,
        remedy="restore it from a backup or an export; `tirgen snapshot verify` finds all of them",
    )
