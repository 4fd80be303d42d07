"""The results of a run, read back from the database: questions with their attempts.

Whatever made the run, its trajectories and newest verdicts are all that is looked at; so an
evaluation that is still going on, was resumed, or was judged again, gives the figures of what is
stored. Failed items have no attempt; they are counted by class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text

from rl.evaluation import code
from rl.evaluation.attempts import Attempt, attempt
from rl.evaluation.config import EvaluationConfig, read
from shared.grading import Grader, Value
from shared.grading.consensus import Consensus, consensus
from shared.store.database import Database
from shared.store.models import ProblemRow, RunRow, TrajectoryRow, WorkItemRow
from shared.store.queries import Funnel, funnel
from shared.store.trajectories import decode
from shared.trajectory import Check, Trajectory, Verdict

THREADS = 8  # questions compared at once; the grader's own processes are the limit
BATCH = 500  # trajectories in memory at once

_VERDICTS = text("""
    SELECT trajectory_id, check_name, passed, version, reason FROM current_verdicts
    WHERE trajectory_id = ANY(:ids) AND check_name = ANY(:checks)
""")


@dataclass(frozen=True, slots=True)
class Question:
    """One problem of a benchmark. `attempts` by sample; `agreement` over their answers, in the same
    order (None for code, which has no answers to compare)."""

    key: str
    external_id: str
    subject: str | None
    level: str | None
    attempts: tuple[Attempt, ...]
    agreement: Consensus | None


@dataclass(frozen=True, slots=True)
class Results:
    """`n_expected`: items of the run; those without an attempt failed or are still open.

    graders: versions of the verifier whose verdicts count. seconds: from the run's creation to its
    last attempt, pauses included.
    """

    run: str
    run_id: int
    config: EvaluationConfig
    questions: tuple[Question, ...]
    funnel: Funnel
    graders: tuple[str, ...]
    code_versions: tuple[str, ...]
    seconds: float

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        return tuple(one for question in self.questions for one in question.attempts)

    @property
    def failures(self) -> Mapping[str, int]:
        """Items without an attempt, by error class; `open` are not finished."""
        still = {"open": self.funnel.n_open} if self.funnel.n_open else {}
        return {**self.funnel.failed, **still}


def load(db: Database, run: RunRow) -> Results:
    """Everything that figures are made of. Raises SandboxError where answers cannot be compared."""
    config = read(run.config, f"run {run.name}")
    is_code = config.benchmark.kind == "code"
    found: dict[str, list[Attempt]] = defaultdict(list)
    graders, versions = set[str](), set[str]()
    with db.session() as session:
        items = (
            select(TrajectoryRow.id, TrajectoryRow.problem_key, WorkItemRow.sample_index,
                   TrajectoryRow.body, TrajectoryRow.code_version)
            .join(WorkItemRow, WorkItemRow.id == TrajectoryRow.item_id)
            .where(TrajectoryRow.run_id == run.id)
            .order_by(WorkItemRow.id)
        )  # fmt: skip
        for rows in session.execute(items).yield_per(BATCH).partitions():
            checks = [Check.ANSWER, Check.JUDGE]
            values = {"ids": [row.id for row in rows], "checks": checks}
            verdicts: dict[int, list[Verdict]] = defaultdict(list)
            for v in session.execute(_VERDICTS, values):
                verdict = Verdict(Check(v.check_name), v.passed, v.version, v.reason)
                verdicts[v.trajectory_id].append(verdict)
                if verdict.check is Check.ANSWER:
                    graders.add(v.version)
            for row in rows:
                trajectory = decode(row.body)
                versions.add(row.code_version)
                one = attempt(
                    row.problem_key, row.sample_index, trajectory, verdicts[row.id], row.id,
                    answer=_program(trajectory) if is_code else trajectory.answer,
                )  # fmt: skip
                found[row.problem_key].append(one)
        problems = session.scalars(select(ProblemRow).where(ProblemRow.key.in_(found))).all()
        now = funnel(session, run.id)
        seconds = session.scalar(
            text("SELECT extract(epoch FROM max(created_at) - CAST(:made AS timestamptz)) "
                 "FROM trajectories WHERE run_id = :id"),
            {"id": run.id, "made": run.created_at},
        )  # fmt: skip
    by_key = {problem.key: problem for problem in problems}
    attempts = {key: tuple(sorted(each, key=lambda one: one.sample)) for key, each in found.items()}
    agreed = {} if is_code else agreements(attempts)
    questions = tuple(
        Question(
            key, by_key[key].external_id, by_key[key].subject, by_key[key].level, each,
            agreed.get(key),
        )
        for key, each in attempts.items()
    )  # fmt: skip
    return Results(
        run.name, run.id, config, questions, now, tuple(sorted(graders)),
        tuple(sorted(versions)), float(seconds or 0),
    )  # fmt: skip


def agreements(attempts: Mapping[str, Sequence[Attempt]]) -> dict[str, Consensus]:
    """What the answers of each question agree on, by the grader's equality."""

    def of(key: str) -> tuple[str, Consensus]:
        def equal(one: str, other: str) -> bool:
            return grader.grade(one, other).value is Value.EQUAL

        return key, consensus([one.answer for one in attempts[key]], equal)

    with Grader() as grader, ThreadPoolExecutor(THREADS) as threads:
        return dict(threads.map(of, attempts))


def _program(trajectory: Trajectory) -> str | None:
    return code.last_program(trajectory.text)


def trajectory_of(db: Database, trajectory_id: int) -> tuple[Trajectory, list[dict[str, Any]]]:
    """A trajectory with its current verdicts, for a page to show."""
    verdicts = text("""
        SELECT check_name, passed, reason, version FROM current_verdicts
        WHERE trajectory_id = :id ORDER BY id
    """)
    with db.session() as session:
        body = session.scalars(
            select(TrajectoryRow.body).where(TrajectoryRow.id == trajectory_id)
        ).one()
        rows = session.execute(verdicts, {"id": trajectory_id}).mappings()
        return decode(body), [dict(row) for row in rows]
