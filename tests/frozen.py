"""Trajectories by the hundred, and ways to alter what nobody may alter."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import insert, text

from shared.store import Completed, Database, ItemState, trajectories
from shared.store.models import RunRow, WorkItemRow
from shared.trajectory import Check, Verdict
from tests.stored import add_run, problem, trajectory
from tirgen.config import load

SAMPLES = 2  # of each problem


def config() -> dict[str, object]:
    return load("nano", base_url="http://127.0.0.1:1/v1").model_dump(mode="json")


def fill(db: Database, n: int, run: str = "many") -> None:
    """A finished run of n trajectories, no two alike, two of each problem, every fifth rejected."""
    with db.begin() as session:
        row: RunRow = add_run(session, run, n)
        row.config = config()
        trajectories.import_problems(session, [problem(i // SAMPLES) for i in range(n)])
        items = [
            {
                "run_id": row.id, "problem_key": problem(i // SAMPLES).key,
                "sample_index": i % SAMPLES, "fingerprint": "f", "idempotency_key": f"{run}/{i}",
                "state": ItemState.REJECTED if i % 5 == 4 else ItemState.VETTED,
                "reject_check": Check.ANSWER if i % 5 == 4 else None,
            }
            for i in range(n)
        ]  # fmt: skip
        statement = insert(WorkItemRow).returning(WorkItemRow.id, sort_by_parameter_order=True)
        ids = session.scalars(statement, items).all()
        made = [(id, _completed(i)) for i, id in enumerate(ids)]
        trajectories.write_trajectories(session, row.id, made)


def _completed(i: int) -> Completed:
    made = replace(
        trajectory(i % 20), problem_key=problem(i // SAMPLES).key, text=f"{i}: why? " * (1 + i % 9)
    )
    is_right = i % 5 != 4
    verdicts = (
        Verdict(Check.EXECUTED, True, "1", "1 executed tool call", {"calls": 1}),
        Verdict(Check.ANSWER, is_right, "1/g1", "equal as numbers", {"share": i / 7}),
    )
    return Completed(made, verdicts, None if is_right else Check.ANSWER, 1.5, "nano", None, "abc")


def alter(db: Database, statement: str, **values: object) -> None:
    """Do what triggers and foreign keys forbid."""
    with db.begin() as session:
        session.execute(text("SET LOCAL session_replication_role = replica"))
        assert session.execute(text(statement), values).rowcount, "nothing was altered"  # type: ignore[attr-defined]
