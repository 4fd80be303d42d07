"""What became of a run: the funnel, its rates, what it cost. Counted in one database snapshot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from shared.sandbox.result import Outcome
from shared.store import Database, ItemState
from shared.store.models import (
    CurationRow,
    CurationStageRow,
    ProblemRow,
    StepRow,
    TrajectoryRow,
    WorkItemRow,
    pass_rates,
)
from shared.store.queries import Funnel, UsageTotal, find_run, funnel, usage
from tirgen import agreement, budgets

QUEUE = 10  # majorities that differ from the reference, as many as are listed


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Sums over a run's trajectories. `duration` in seconds, of each from start to verdicts."""

    n: int
    n_vetted: int
    n_with_failed_call: int
    n_with_correction: int
    n_corrections: int
    n_tokens: int
    duration: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed item, a dead letter. `raw` is what the model or the server said."""

    error_class: str
    item: int
    problem_id: str
    attempts: int
    text: str
    raw: str | None


@dataclass(frozen=True, slots=True)
class Curation:
    """What a chain of filters last left of the run. `stages`: (filter, before, after) each."""

    name: str
    seed: int
    applied_at: datetime
    stages: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class RunStats:
    """`outcomes`: of the calls that stand. `subjects`: items by state. `elapsed`: seconds from the
    run's creation to its last finished item, pauses included."""

    funnel: Funnel
    trajectories: Trajectories
    ends: Mapping[str, int]
    outcomes: Mapping[str, int]
    subjects: Mapping[str | None, Mapping[ItemState, int]]
    usage: tuple[UsageTotal, ...]
    costs: tuple[float, ...]  # of each of `usage`, by the run's prices
    elapsed: float
    consensus: agreement.Summary  # all zero before `tirgen consensus`
    examples: tuple[Failure, ...] = ()  # one of each error class
    right: tuple[int, int] = (0, 0)  # trajectories with the right answer, of those decided
    curation: Curation | None = None

    @property
    def n_finished(self) -> int:
        """Items that came to an end by themselves: vetted, rejected or failed."""
        items = self.funnel.items
        return sum(items[s] for s in (ItemState.VETTED, ItemState.REJECTED, ItemState.FAILED))

    @property
    def n_vetted(self) -> int:
        return self.funnel.items[ItemState.VETTED]

    @property
    def n_attempts(self) -> int:
        """Calls that were made: those that stand and those that were taken back."""
        return sum(self.outcomes.values()) + self.trajectories.n_corrections

    @property
    def per_minute(self) -> float | None:
        return 60 * self.n_finished / self.elapsed if self.elapsed > 0 else None

    def discrepancies(self) -> list[str]:
        """Counts that should be equal and are not; a sound database has none."""
        items = self.funnel.items
        by_subject = sum(sum(states.values()) for states in self.subjects.values())
        pairs = [
            ("items of the run", self.funnel.n_items, "items by state", sum(items.values())),
            ("items of the run", self.funnel.n_items, "items by subject", by_subject),
            ("rejected items", items[ItemState.REJECTED], "rejections by check",
             sum(self.funnel.rejected.values())),
            ("failed items", items[ItemState.FAILED], "failures by class",
             sum(self.funnel.failed.values())),
            ("vetted items", self.n_vetted, "vetted trajectories", self.trajectories.n_vetted),
            ("rejected items", items[ItemState.REJECTED], "rejected trajectories",
             self.trajectories.n - self.trajectories.n_vetted),
        ]  # fmt: skip
        pairs += self._curated()
        return [f"{n} {a}, but {m} {b}" for a, n, b, m in pairs if n != m]

    def _curated(self) -> list[tuple[str, int, str, int]]:
        stages = self.curation.stages if self.curation else ()
        return [
            (f"left by filter {name}", after, f"seen by filter {following}", before)
            for (name, _, after), (following, before, _) in pairwise(stages)
        ]

    def to_json(self) -> dict[str, Any]:
        run, low_high = self.funnel, wilson(self.n_vetted, self.n_finished)
        made = self.trajectories
        return {
            "run": run.name,
            "kind": run.kind,
            "state": run.state,
            "created_at": run.created_at,
            "finished_at": run.finished_at,
            "n_items": run.n_items,
            "items": dict(run.items),
            "rejected": dict(run.rejected),
            "failed": dict(run.failed),
            "discrepancies": self.discrepancies(),
            "yield": self.n_vetted / self.n_finished if self.n_finished else None,
            "yield_interval": low_high,
            "ends": dict(self.ends),
            "outcomes": dict(self.outcomes),
            "n_corrections": made.n_corrections,
            "n_with_correction": made.n_with_correction,
            "n_with_failed_call": made.n_with_failed_call,
            "n_tokens": made.n_tokens,
            "seconds_per_trajectory": made.duration / made.n if made.n else None,
            "elapsed": self.elapsed,
            "finished_per_minute": self.per_minute,
            "subjects": [{"subject": s, **states} for s, states in self.subjects.items()],
            "usage": [
                {name: getattr(one, name) for name in UsageTotal.__slots__} | {"cost": cost}
                for one, cost in zip(self.usage, self.costs, strict=True)
            ],
            "consensus": self.consensus.to_json(),
            "right_answers": {"n": self.right[0], "of": self.right[1]},
            "curation": self._curation_json(),
            "failure_examples": [asdict(one) for one in self.examples],
        }

    def _curation_json(self) -> dict[str, Any] | None:
        if self.curation is None:
            return None
        stages = [dict(zip(("filter", "before", "after"), s, strict=True))
                  for s in self.curation.stages]  # fmt: skip
        return {**asdict(self.curation), "stages": stages}


def gather(db: Database, name: str) -> RunStats:
    """Raises InputError, naming the runs that there are, if there is none of that name."""
    with db.session() as session:
        # All counts from one moment, so that those of a running run agree with each other.
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        run = find_run(session, name)
        last = select(func.max(WorkItemRow.updated_at)).where(
            WorkItemRow.run_id == run.id,
            WorkItemRow.state.not_in((ItemState.QUEUED, ItemState.LEASED)),
        )
        ended = session.scalar(last)
        used = tuple(usage(session, run.id))
        return RunStats(
            funnel=funnel(session, run.id),
            trajectories=_trajectories(session, run.id),
            ends=_ends(session, run.id),
            outcomes=_outcomes(session, run.id),
            subjects=_subjects(session, run.id),
            usage=used,
            costs=tuple(budgets.cost(run.config, one) for one in used),
            elapsed=(ended - run.created_at).total_seconds() if ended else 0.0,
            consensus=agreement.summary(session, run.id, QUEUE),
            examples=tuple(_failures(session, run.id, one_per_class=True)),
            right=_right(session, run.id),
            curation=_curation(session, run.id),
        )


def failures(db: Database, name: str) -> list[Failure]:
    """All failed items of a run, by class. Raises InputError as `gather` does."""
    with db.session() as session:
        return _failures(session, find_run(session, name).id)


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float] | None:
    """95 % confidence interval of a rate k/n (Wilson 1927); None where nothing was counted."""
    if n == 0:
        return None
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def _trajectories(session: Session, run_id: int) -> Trajectories:
    row = TrajectoryRow
    statement = select(
        func.count(row.id),
        func.count(row.id).filter(row.vetted),
        func.count(row.id).filter(row.n_failed_calls > 0),
        func.count(row.id).filter(row.n_corrections > 0),
        func.coalesce(func.sum(row.n_corrections), 0),
        func.coalesce(func.sum(row.n_tokens), 0),
        func.coalesce(func.sum(row.duration), 0.0),
    ).where(row.run_id == run_id)
    return Trajectories(*session.execute(statement).one())


def _right(session: Session, run_id: int) -> tuple[int, int]:
    rate = pass_rates.c
    n = select(func.sum(rate.n_passed), func.sum(rate.n_samples)).where(rate.run_id == run_id)
    passed, samples = session.execute(n).one()
    return int(passed or 0), int(samples or 0)


def _curation(session: Session, run_id: int) -> Curation | None:
    """The funnel of the chain that was last applied to any of the run's trajectories."""
    stage = CurationStageRow
    of_run = select(stage.curation_id).where(stage.run_id == run_id)
    last = session.scalar(
        select(CurationRow)
        .where(CurationRow.id.in_(of_run))
        .order_by(CurationRow.applied_at.desc(), CurationRow.id.desc())
        .limit(1)
    )
    if last is None:
        return None
    rows = session.scalars(
        select(stage)
        .where(stage.curation_id == last.id, stage.run_id == run_id)
        .order_by(stage.position)
    )
    stages = tuple((row.name, row.n_before, row.n_after) for row in rows)
    return Curation(last.name, last.seed, last.applied_at, stages)


def _failures(session: Session, run_id: int, one_per_class: bool = False) -> list[Failure]:
    item = WorkItemRow
    statement = (
        select(item, ProblemRow.external_id)
        .join(ProblemRow, ProblemRow.key == item.problem_key)
        .where(item.run_id == run_id, item.state == ItemState.FAILED)
        .order_by(item.error_class, item.id)
    )
    if one_per_class:
        statement = statement.ext(distinct_on(item.error_class))
    return [
        Failure(
            error_class=row.error_class or "",
            item=row.id,
            problem_id=problem_id,
            attempts=row.attempt,
            text=row.error_text or "",
            raw=row.raw,
        )
        for row, problem_id in session.execute(statement)
    ]


def _ends(session: Session, run_id: int) -> dict[str, int]:
    statement = (
        select(TrajectoryRow.end_reason, func.count())
        .where(TrajectoryRow.run_id == run_id)
        .group_by(TrajectoryRow.end_reason)
        .order_by(func.count().desc())
    )
    return {end: int(n) for end, n in session.execute(statement)}


def _outcomes(session: Session, run_id: int) -> dict[str, int]:
    statement = (
        select(StepRow.outcome, func.count())
        .join(TrajectoryRow, TrajectoryRow.id == StepRow.trajectory_id)
        .where(TrajectoryRow.run_id == run_id, StepRow.has_call)
        .group_by(StepRow.outcome)
    )
    found = {outcome: int(n) for outcome, n in session.execute(statement)}
    return {outcome.value: found[outcome] for outcome in Outcome if outcome in found}


def _subjects(session: Session, run_id: int) -> dict[str | None, dict[ItemState, int]]:
    """Most frequent first."""
    statement = (
        select(ProblemRow.subject, WorkItemRow.state, func.count())
        .join(ProblemRow, ProblemRow.key == WorkItemRow.problem_key)
        .where(WorkItemRow.run_id == run_id)
        .group_by(ProblemRow.subject, WorkItemRow.state)
    )
    found: dict[str | None, dict[ItemState, int]] = {}
    for subject, state, n in session.execute(statement):
        found.setdefault(subject, dict.fromkeys(ItemState, 0))[ItemState(state)] = n
    return dict(sorted(found.items(), key=lambda pair: (-sum(pair[1].values()), pair[0] or "")))
