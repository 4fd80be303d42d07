"""Judge stored trajectories again with the current verifier, and say what has changed.

Contract: trajectories are never touched; a new verdict is a new row, and the newest of each check
counts (view `current_verdicts`). A check whose newest verdict has the current version is skipped,
so a broken-off run of this goes on where it stopped, and a second run does nothing. Memory does not
grow with the number of trajectories: they pass in batches, one transaction each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session
from zstandard import ZstdError

from shared.endpoints import Usage
from shared.errors import ConfigError, DatabaseError, InputError, SandboxError
from shared.grading import Grader
from shared.sandbox import Sandbox, Tier
from shared.store import Database
from shared.store.models import (
    ManifestRow,
    ProblemRow,
    RunRow,
    SnapshotKind,
    SnapshotRow,
    TrajectoryRow,
    VerdictRow,
)
from shared.store.trajectories import add_verdicts, read
from shared.trajectory import Check, Problem, Trajectory, Verdict
from tirgen.agents.verifier import RULES, Verifier, version_of
from tirgen.runs import stored_config

BATCH = 64  # trajectories in memory at once

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Scope:
    """What is judged again. `condition` is over the trajectories."""

    name: str
    kind: str  # run, snapshot
    n_trajectories: int
    condition: ColumnElement[bool]


@dataclass(frozen=True, slots=True)
class Rejudged:
    """Counts of trajectories. `failures`: why some could not be judged, by id."""

    n_judged: int
    n_skipped: int  # nothing to do: every check has its current version
    failures: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Transition:
    """How often the newest verdict of a check is `new` where the one before it was `old`."""

    check: Check
    old_version: str
    old: bool | None
    new_version: str
    new: bool | None
    n: int

    @property
    def changed(self) -> bool:
        return self.old is not self.new


@dataclass(frozen=True, slots=True)
class Change:
    """A trajectory of which a check thinks otherwise now."""

    id: int
    check: Check
    old: bool | None
    new: bool | None
    reason: str
    answer: str | None
    reference: str


def chosen(names: Iterable[str]) -> tuple[Check, ...]:
    """Checks by name; all that rules decide where none is named. Raises ConfigError."""
    known = {check.value: check for check in RULES}
    unknown = [name for name in names if name not in known]
    if unknown:
        what = f"there is no check {unknown[0]!r} that can be made again"
        raise ConfigError(what, where="--checks", remedy=f"choose from {', '.join(known)}")
    return tuple(known[name] for name in names) or RULES


def find(db: Database, name: str) -> Scope:
    """The run or the snapshot of that name; `run:NAME` and `snapshot:NAME` say which.

    Raises InputError if there is none, if both are there, or if a snapshot holds no trajectories.
    """
    kind, colon, rest = name.partition(":")
    wanted, name = (kind, rest) if colon and kind in ("run", "snapshot") else ("", name)
    with db.session() as session:
        run = session.scalar(select(RunRow).where(RunRow.name == name))
        snapshot = session.scalar(select(SnapshotRow).where(SnapshotRow.name == name))
        if run and snapshot and not wanted:
            remedy = f"say run:{name} or snapshot:{name}"
            raise InputError(f"a run and a snapshot are named {name!r}", remedy=remedy)
        if run and wanted != "snapshot":
            return _scope(session, name, "run", TrajectoryRow.run_id == run.id)
        if snapshot and wanted != "run":
            if snapshot.kind != SnapshotKind.TRAJECTORIES:
                raise InputError(f"snapshot {name!r} holds problems, not trajectories")
            of_it = select(ManifestRow.trajectory_id).where(ManifestRow.snapshot_id == snapshot.id)
            return _scope(session, name, "snapshot", TrajectoryRow.id.in_(of_it))
    raise InputError(
        f"there is no {wanted or 'run or snapshot'} named {name!r}",
        remedy="`tirgen runs` and `tirgen snapshot list` show what there is",
    )


async def rejudge(
    db: Database,
    scope: Scope,
    checks: Sequence[Check],
    *,
    force: bool = False,
    advance: Advance = lambda n: None,
) -> Rejudged:
    """Make every check of `checks` again that is not up to date, or all of them by `force`.

    `advance` is told of every batch. Raises SandboxError where no sandbox can be made.
    """
    n_judged = n_skipped = 0
    failures: dict[int, str] = {}
    async with AsyncExitStack() as stack:
        verifiers = _Verifiers(db, stack, checks)
        last = 0
        while batch := await asyncio.to_thread(_batch, db, scope, checks, force, last):
            last = batch[-1].id
            due = [one for one in batch if one.checks]
            judged = await asyncio.gather(*(_judge(verifiers, one) for one in due))
            found = {
                one.id: v for one, v in zip(due, judged, strict=True) if not isinstance(v, str)
            }
            failed = {one.id: v for one, v in zip(due, judged, strict=True) if isinstance(v, str)}
            if len(failed) == BATCH:  # not a damaged row, but the sandbox or the database
                raise SandboxError(f"No trajectory can be judged: {next(iter(failed.values()))}")
            await asyncio.to_thread(_write, db, found)
            failures |= failed
            n_judged, n_skipped = n_judged + len(found), n_skipped + len(batch) - len(due)
            advance(len(batch))
    return Rejudged(n_judged, n_skipped, failures)


def confusion(session: Session, scope: Scope, checks: Sequence[Check]) -> list[Transition]:
    """The newest verdict of each check beside the one before it, counted; by check and version.

    Read from the rows themselves, so it is the same whether they were made at one go or not. A
    check that was made once only is not in it.
    """
    newest = _newest(scope, checks)
    key = (newest.c.check_name, newest.c.old_version, newest.c.old, newest.c.version, newest.c.new)
    rows = session.execute(select(*key, func.count()).group_by(*key).order_by(*key))
    return [Transition(Check(row[0]), *row[1:]) for row in rows]


def changes(session: Session, scope: Scope, checks: Sequence[Check], limit: int) -> list[Change]:
    """Some of those whose newest verdict differs from the one before it."""
    newest = _newest(scope, checks)
    statement = (
        select(
            newest.c.trajectory_id, newest.c.check_name, newest.c.old, newest.c.new,
            newest.c.reason, TrajectoryRow.answer, ProblemRow.answer,
        )
        .join(TrajectoryRow, TrajectoryRow.id == newest.c.trajectory_id)
        .join(ProblemRow, ProblemRow.key == TrajectoryRow.problem_key)
        .where(newest.c.old.is_distinct_from(newest.c.new))
        .order_by(newest.c.check_name, newest.c.trajectory_id)
        .limit(limit)
    )  # fmt: skip
    return [Change(row[0], Check(row[1]), *row[2:]) for row in session.execute(statement)]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A trajectory of a batch and the checks that it is due.

    `trajectory`: why it cannot be read, where it cannot; None where no check is due.
    """

    id: int
    run_id: int
    problem: Problem
    checks: tuple[Check, ...]
    trajectory: Trajectory | str | None


class _Verifiers:
    """The verifier of each run, with that run's own settings. Sandboxes open when first needed."""

    def __init__(self, db: Database, stack: AsyncExitStack, checks: Collection[Check]) -> None:
        self._db, self._stack, self._runs_code = db, stack, Check.REPRODUCED in checks
        self._tools: dict[Tier, tuple[Sandbox, Grader]] = {}
        self._of_run: dict[int, Verifier] = {}
        self._lock = asyncio.Lock()

    async def of(self, run_id: int) -> Verifier:
        """Raises ConfigError for a run whose configuration this version cannot read."""
        async with self._lock:
            if run_id not in self._of_run:
                config = stored_config(await asyncio.to_thread(self._run, run_id))
                tier = config.tool.minimum_tier
                if tier not in self._tools:
                    self._tools[tier] = await self._open(tier)
                self._of_run[run_id] = Verifier(config, *self._tools[tier])
            return self._of_run[run_id]

    def _run(self, run_id: int) -> RunRow:
        with self._db.session() as session:
            return session.get_one(RunRow, run_id)

    async def _open(self, tier: Tier) -> tuple[Sandbox, Grader]:
        sandbox = Sandbox(minimum_tier=tier)
        if self._runs_code:
            await self._stack.enter_async_context(sandbox)
        return sandbox, await self._stack.enter_async_context(Grader(minimum_tier=tier))


def _scope(session: Session, name: str, kind: str, condition: ColumnElement[bool]) -> Scope:
    n = session.scalar(select(func.count(TrajectoryRow.id)).where(condition))
    return Scope(name, kind, n or 0, condition)


def _batch(
    db: Database, scope: Scope, checks: Sequence[Check], force: bool, after: int
) -> list[_Stored]:
    """The next trajectories by id, whether anything is due or not."""
    with db.session() as session:
        statement = (
            select(TrajectoryRow.id, TrajectoryRow.run_id, ProblemRow)
            .join(ProblemRow, ProblemRow.key == TrajectoryRow.problem_key)
            .where(scope.condition, TrajectoryRow.id > after)
            .order_by(TrajectoryRow.id)
            .limit(BATCH)
        )
        rows = session.execute(statement).all()
        v = VerdictRow
        newest = (
            select(v.trajectory_id, v.check_name, v.version)
            .where(v.trajectory_id.in_([row.id for row in rows]))
            .order_by(v.trajectory_id, v.check_name, v.id.desc())
            .ext(distinct_on(v.trajectory_id, v.check_name))
        )
        made = {(i, name): version for i, name, version in session.execute(newest)}

        batch = []
        for i, run_id, p in rows:
            due = tuple(c for c in checks if force or made.get((i, c.value)) != version_of(c))
            problem = Problem(p.text, p.answer, p.source, p.external_id)
            batch.append(_Stored(i, run_id, problem, due, _read(session, i) if due else None))
        return batch


async def _judge(verifiers: _Verifiers, one: _Stored) -> tuple[Verdict, ...] | str:
    """Its verdicts, or why it cannot be judged: one bad row does not stop the others."""
    if not isinstance(one.trajectory, Trajectory):
        return one.trajectory or ""
    verifier = await verifiers.of(one.run_id)
    try:
        return await verifier.verify(one.problem, one.trajectory, Usage(), one.checks)
    except SandboxError as error:
        return str(error)


def _read(session: Session, id: int) -> Trajectory | str:
    try:
        return read(session, id)
    except (DatabaseError, ZstdError) as error:
        return str(error)


def _write(db: Database, found: Mapping[int, Sequence[Verdict]]) -> None:
    with db.begin() as session:
        add_verdicts(session, ((i, verdict) for i, made in found.items() for verdict in made))


def _newest(scope: Scope, checks: Sequence[Check]) -> Any:
    """Sub-query: each check's newest verdict with the one before it, where there is one."""
    v = VerdictRow
    window: dict[str, Any] = {
        "partition_by": (v.trajectory_id, v.check_name), "order_by": v.id.desc(),
    }  # fmt: skip
    ranked = (
        select(
            v.trajectory_id, v.check_name, v.version, v.reason,
            v.passed.label("new"),
            func.row_number().over(**window).label("age"),
            func.lead(v.passed).over(**window).label("old"),
            func.lead(v.version).over(**window).label("old_version"),
        )
        .join(TrajectoryRow, TrajectoryRow.id == v.trajectory_id)
        .where(scope.condition, v.check_name.in_(checks))
        .subquery()
    )  # fmt: skip
    first = select(ranked).where(ranked.c.age == 1, ranked.c.old_version.is_not(None))
    return first.subquery()
