"""What the samples of each problem of a run agree on, and where that is not the reference.

Contract: one row a problem and run in `consensus`, derived from the trajectories and replaced when
their number or the grader's version has changed; so a broken-off comparison goes on, and memory
does not grow with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import aggregate_order_by, insert
from sqlalchemy.orm import Session

from shared.errors import SandboxError
from shared.grading import Grader, Value
from shared.grading.consensus import Consensus
from shared.grading.consensus import consensus as agree
from shared.grading.grader import VERSION
from shared.store import Database
from shared.store.models import ConsensusRow, ProblemRow, TrajectoryRow, WorkItemRow
from shared.store.queries import find_run

BATCH = 64  # problems in memory at once
THREADS = 8  # problems compared at once; the grader's own processes are the limit
VOTES = 2  # that a majority needs before it is held against the reference

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Found:
    run_id: int
    n_problems: int


@dataclass(frozen=True, slots=True)
class Compared:
    """Counts of problems. `failures`: why some could not be compared, by problem key."""

    n_compared: int
    n_skipped: int  # nothing new
    failures: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Doubtful:
    """A problem whose majority differs from the reference."""

    problem_key: str
    problem_id: str
    answer: str | None
    reference: str
    votes: int
    n_samples: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of problems of a run; `queue`: the doubtful ones, most votes first."""

    n_problems: int
    n_majority: int
    n_tied: int
    n_disagree: int
    n_undecided: int  # a majority that the grader can neither equate with the reference nor not
    queue: tuple[Doubtful, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Problem:
    """`answers`: of its samples, in the order of their ids."""

    key: str
    reference: str
    answers: tuple[str | None, ...]


def find(db: Database, name: str) -> Found:
    """Raises InputError, naming the runs that there are."""
    with db.session() as session:
        run = find_run(session, name)
        of_run = select(func.count(WorkItemRow.problem_key.distinct()))
        n = session.scalar(of_run.where(WorkItemRow.run_id == run.id))
        return Found(run.id, n or 0)


def compare(
    db: Database, found: Found, *, force: bool = False, advance: Advance = lambda n: None
) -> Compared:
    """Bring the rows of a run up to date. Raises SandboxError where no sandbox can be made."""
    n_compared = n_skipped = 0
    failures: dict[str, str] = {}
    last = ""
    with Grader() as grader, ThreadPoolExecutor(THREADS) as threads:
        while keys := _keys(db, found.run_id, last):
            last = keys[-1]
            problems = _due(db, found.run_id, keys, force)
            rows = list(threads.map(lambda one: _row(grader, found.run_id, one), problems))
            failed = {
                one.key: r for one, r in zip(problems, rows, strict=True) if isinstance(r, str)
            }
            if len(failed) == BATCH:
                raise SandboxError(f"No problem can be compared: {next(iter(failed.values()))}")
            _write(db, [row for row in rows if not isinstance(row, str)])
            failures |= failed
            n_compared += len(rows) - len(failed)
            n_skipped += len(keys) - len(rows)
            advance(len(keys))
    return Compared(n_compared, n_skipped, failures)


def summary(session: Session, run_id: int, limit: int) -> Summary:
    """Of the rows that there are; all counts are zero where nothing was compared."""
    row = ConsensusRow
    n_majority = func.count().filter(row.answer.is_not(None))
    undecided = row.disagrees.is_(None) & row.answer.is_not(None) & (row.votes >= VOTES)
    counts = session.execute(
        select(
            func.count(),
            n_majority,
            func.count().filter(row.tied),
            func.count().filter(row.disagrees.is_(True)),
            func.count().filter(undecided),
        ).where(row.run_id == run_id)
    ).one()
    queue = (
        select(
            row.problem_key, ProblemRow.external_id, row.answer, ProblemRow.answer,
            row.votes, row.n_samples,
        )
        .join(ProblemRow, ProblemRow.key == row.problem_key)
        .where(row.run_id == run_id, row.disagrees.is_(True))
        .order_by(row.share.desc(), row.votes.desc(), row.problem_key)
        .limit(limit)
    )  # fmt: skip
    return Summary(*counts, queue=tuple(Doubtful(*one) for one in session.execute(queue)))


def _keys(db: Database, run_id: int, after: str) -> Sequence[str]:
    with db.session() as session:
        item = WorkItemRow
        statement = select(item.problem_key).where(item.run_id == run_id, item.problem_key > after)
        return session.scalars(statement.distinct().order_by(item.problem_key).limit(BATCH)).all()


def _due(db: Database, run_id: int, keys: Sequence[str], force: bool) -> list[_Problem]:
    """Those of the problems that have trajectories which were not all compared by this version."""
    row = TrajectoryRow
    with db.session() as session:
        answers = func.array_agg(aggregate_order_by(row.answer, row.id))
        samples = session.execute(
            select(row.problem_key, ProblemRow.answer, answers)
            .join(ProblemRow, ProblemRow.key == row.problem_key)
            .where(row.run_id == run_id, row.problem_key.in_(keys))
            .group_by(row.problem_key, ProblemRow.answer)
            .order_by(row.problem_key)
        ).all()
        known = select(ConsensusRow.problem_key, ConsensusRow.n_samples).where(
            ConsensusRow.run_id == run_id,
            ConsensusRow.problem_key.in_(keys),
            ConsensusRow.version == VERSION,
        )
        compared = {row.problem_key: row.n_samples for row in session.execute(known)}
    return [
        _Problem(key, reference, tuple(of_each))
        for key, reference, of_each in samples
        if force or compared.get(key) != len(of_each)
    ]


def _row(grader: Grader, run_id: int, problem: _Problem) -> dict[str, Any] | str:
    """The row of a problem, or why it cannot be compared."""
    try:
        found = agree(
            problem.answers, lambda one, other: grader.grade(one, other).value is Value.EQUAL
        )
        disagrees = _disagrees(grader, found, problem.reference)
    except SandboxError as error:
        return str(error)
    return {
        "run_id": run_id,
        "problem_key": problem.key,
        "n_samples": found.n_samples,
        "n_answers": found.n_answers,
        "votes": found.clusters[0].votes if found.clusters else 0,
        "answer": found.majority.answer if found.majority else None,
        "share": found.share,
        "tied": len(found.leaders) > 1,
        "disagrees": disagrees,
        "version": VERSION,
    }


def _disagrees(grader: Grader, found: Consensus, reference: str) -> bool | None:
    """Whether the majority differs from the reference in every spelling; None: cannot tell."""
    leader = found.majority
    if leader is None or leader.votes < VOTES:
        return None
    different = True
    for spelling in leader.spellings:
        match grader.grade(spelling, reference).value:
            case Value.EQUAL:
                return False
            case Value.UNDECIDED:
                different = False
    return True if different else None


def _write(db: Database, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    statement = insert(ConsensusRow)
    changing = {name: statement.excluded[name] for name in rows[0]} | {"created_at": func.now()}
    key = [ConsensusRow.run_id, ConsensusRow.problem_key]
    with db.begin() as session:
        session.execute(statement.on_conflict_do_update(index_elements=key, set_=changing), rows)
