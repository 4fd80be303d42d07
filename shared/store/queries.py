"""Questions about whole runs: which there are, how far they are, where their items ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import BigInteger, case, cast, func, select
from sqlalchemy.orm import Session

from shared.errors import InputError
from shared.store.models import ItemState, RunRow, RunState, UsageRow, WorkItemRow


@dataclass(frozen=True, slots=True)
class Funnel:
    """Where the items of a run stand. `reconciles` is false only if an item went missing."""

    run_id: int
    name: str
    kind: str
    state: RunState
    created_at: datetime
    finished_at: datetime | None
    n_items: int
    items: Mapping[ItemState, int]
    rejected: Mapping[str, int]  # by the check that failed
    failed: Mapping[str, int]  # by error class
    stop_reason: str | None = None

    @property
    def n_open(self) -> int:
        return self.items[ItemState.QUEUED] + self.items[ItemState.LEASED]

    @property
    def reconciles(self) -> bool:
        return (
            self.n_items == sum(self.items.values())
            and self.items[ItemState.REJECTED] == sum(self.rejected.values())
            and self.items[ItemState.FAILED] == sum(self.failed.values())
        )


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """Sums over a run. `duration` in seconds."""

    role: str
    model: str
    endpoint: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    retries: int
    duration: float


def find_run(session: Session, name: str) -> RunRow:
    """Raises InputError, naming the runs that there are."""
    run = session.scalar(select(RunRow).where(RunRow.name == name))
    if run is None:
        newest = session.scalars(select(RunRow.name).order_by(RunRow.id.desc()).limit(10)).all()
        there = f"newest runs: {', '.join(newest)}" if newest else "there is no run yet"
        raise InputError(f"there is no run named {name!r}", remedy=there)
    return run


def funnel(session: Session, run_id: int) -> Funnel:
    """Counts of one run, all from one statement, hence of one moment."""
    return _funnels(session, [run_id])[0]


def funnels(session: Session) -> list[Funnel]:
    """Every run, newest first."""
    return _funnels(session, session.scalars(select(RunRow.id).order_by(RunRow.id.desc())).all())


def usage(session: Session, run_id: int) -> list[UsageTotal]:
    """What the run has cost so far, by role, model and endpoint."""
    return usages(session, [run_id])[run_id]


def usages(session: Session, run_ids: Sequence[int]) -> dict[int, list[UsageTotal]]:
    """`usage` of several runs at once."""
    key = (UsageRow.role, UsageRow.model, UsageRow.endpoint)
    counts = ("requests", "prompt_tokens", "completion_tokens", "retries")
    sums = [cast(func.sum(getattr(UsageRow, name)), BigInteger).label(name) for name in counts]
    duration = func.sum(UsageRow.duration).label("duration")
    statement = select(UsageRow.run_id, *key, *sums, duration)
    statement = statement.where(UsageRow.run_id.in_(run_ids)).group_by(UsageRow.run_id, *key)
    found: dict[int, list[UsageTotal]] = {run_id: [] for run_id in run_ids}
    for row in session.execute(statement.order_by(*key)).mappings():
        fields = dict(row)
        found[fields.pop("run_id")].append(UsageTotal(**fields))
    return found


def _funnels(session: Session, run_ids: Sequence[int]) -> list[Funnel]:
    """Runs and counts in one statement: a run that is growing still reconciles."""
    item = WorkItemRow
    error = case((item.state == ItemState.FAILED, item.error_class))
    statement = (
        select(RunRow, item.state, item.reject_check, error, func.count(item.id))
        .outerjoin(item, item.run_id == RunRow.id)
        .where(RunRow.id.in_(run_ids))
        .group_by(RunRow.id, item.state, item.reject_check, error)
    )
    runs: dict[int, RunRow] = {}
    items: dict[int, Counter[ItemState]] = defaultdict(Counter)
    rejected: dict[int, Counter[str]] = defaultdict(Counter)
    failed: dict[int, Counter[str]] = defaultdict(Counter)
    for run, state, check, error_class, count in session.execute(statement):
        runs[run.id] = run
        if state is not None:
            items[run.id][ItemState(state)] += count
        if check is not None:
            rejected[run.id][check] += count
        if error_class is not None:
            failed[run.id][error_class] += count
    return [
        Funnel(
            run_id=run.id,
            name=run.name,
            kind=run.kind,
            state=RunState(run.state),
            created_at=run.created_at,
            finished_at=run.finished_at,
            n_items=run.n_items,
            items={state: items[run.id][state] for state in ItemState},
            rejected=dict(rejected[run.id].most_common()),
            failed=dict(failed[run.id].most_common()),
            stop_reason=run.stop_reason,
        )
        for run in (runs[run_id] for run_id in run_ids)
    ]
