"""Runs made of examples, as `tirgen.curation.base.Given` describes them, for tests of curation."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from shared.fences import action, observation
from shared.nano.world import Solved, solved
from shared.store import Completed, Database, RunState, trajectories
from shared.store.models import RunRow, WorkItemRow
from shared.trajectory import Check, Problem, Verdict
from tirgen.curation.base import Given

REASONER = {"endpoint": {"model": "model"}}


def add_run(
    db: Database, name: str, givens: Sequence[Given], calls: int = 5, model: str = "model"
) -> list[int]:
    """A finished run with one trajectory of each; their ids. `calls` 0: without the tool."""
    with db.begin() as session:
        config = {"budgets": {"calls": calls}, "reasoner": {"endpoint": {"model": model}}}
        run = RunRow(
            name=name, kind="generate", config=config, fingerprint="f", code_version="c",
            created_by="u", host="h", n_items=len(givens), state=RunState.DONE,
        )  # fmt: skip
        session.add(run)
        session.flush()
        ids = []
        for i, given in enumerate(givens):
            row = given.row(i)
            trajectories.import_problems(session, [Problem(given.problem, "", "test")])
            item = WorkItemRow(
                run_id=run.id, problem_key=row.problem_key, sample_index=i, fingerprint="f",
                idempotency_key=f"{name}/{i}", state="vetted" if given.correct else "rejected",
                reject_check=None if given.correct else Check.ANSWER,
            )  # fmt: skip
            session.add(item)
            session.flush()
            verdict = Verdict(Check.ANSWER, given.correct, "1", "as the example says")
            rejected = None if given.correct else Check.ANSWER
            done = Completed(row.body, (verdict,), rejected, 1.0, model, "model", "c")
            ids.append(trajectories.write_trajectory(session, run.id, item.id, done))
    return ids


def solution(one: Solved) -> Given:
    """A problem of nano's world with its reference solution as a trajectory."""
    parts = [one.plan]
    for calc in one.calcs:
        parts.append(f"\n{calc.thought}{action(calc.code)}{observation(calc.value)}")
    return Given(problem=one.text, text=f"{''.join(parts)}It is \\boxed{{{one.answer}}}.")


def world(n: int, seed: int = 1) -> list[Solved]:
    """n distinct problems of nano's world."""
    rng, found = Random(seed), dict[str, Solved]()
    while len(found) < n:
        one = solved(rng)
        found.setdefault(one.text, one)
    return list(found.values())
