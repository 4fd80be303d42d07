"""Snapshots of nano's world for the trainer: solved problems as `tirgen generate` stores them."""

from __future__ import annotations

from random import Random

from sqlalchemy import insert

from shared.fences import action, observation
from shared.nano.teacher import sabotage
from shared.nano.world import Solved, stream
from shared.sandbox.result import Outcome, RunResult, Tier
from shared.store import Completed, Database, ItemState, trajectories
from shared.store.models import WorkItemRow
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict
from tests.frozen import config
from tests.stored import add_run
from tirgen.curation.snapshots import Snapshots

SPLITS = {"train": 0.8, "valid": 0.2}


def solved(n: int, seed: int = 11) -> list[tuple[Problem, Trajectory]]:
    """The first n problems of a stream, each once, with a trajectory; some calls fail first."""
    found: dict[str, tuple[Problem, Trajectory]] = {}
    random = Random(seed)
    for item in stream(seed, "train"):
        problem = Problem(item.text, item.answer, "nano")
        found.setdefault(problem.key, (problem, _trajectory(random, problem, item)))
        if len(found) == n:
            break
    return list(found.values())


def freeze(db: Database, name: str, n: int, kind: str = "trajectories") -> None:
    """A finished run of `solved(n)`, and a snapshot of it with splits train and valid."""
    pairs = solved(n)
    with db.begin() as session:
        run = add_run(session, f"run-{name}", n)
        run.config = config()
        trajectories.import_problems(session, [problem for problem, _ in pairs])
        items = [
            {
                "run_id": run.id, "problem_key": problem.key, "sample_index": 0,
                "fingerprint": "f", "idempotency_key": f"{name}/{i}", "state": ItemState.VETTED,
            }
            for i, (problem, _) in enumerate(pairs)
        ]  # fmt: skip
        statement = insert(WorkItemRow).returning(WorkItemRow.id, sort_by_parameter_order=True)
        ids = session.scalars(statement, items).all()
        verdict = Verdict(Check.ANSWER, True, "1/g1", "equal")
        made = [
            (id, Completed(trajectory, (verdict,), None, 1.0, "nano", None, "abc"))
            for id, (_, trajectory) in zip(ids, pairs, strict=True)
        ]
        trajectories.write_trajectories(session, run.id, made)
    Snapshots(db).create(name, where=f'run == "run-{name}"', kind=kind, seed=3, splits=SPLITS)


def _trajectory(random: Random, problem: Problem, item: Solved) -> Trajectory:
    steps: list[Step] = []
    for calc in item.calcs:
        thought = calc.thought
        if random.random() < 0.3:
            broken, error = sabotage(random, calc.code)
            steps.append(Step(thought, _call(broken, error, Outcome.MODEL_ERROR)))
            thought = "The code failed, so we write it again."
        steps.append(Step(thought, _call(calc.code, calc.value, Outcome.OK)))
    steps.append(Step(f"The answer is \\boxed{{{item.answer}}}."))
    text = "".join(_text(step) for step in steps)
    key, answer = problem.key, item.answer
    return Trajectory(key, tuple(steps), text, End.ANSWERED, answer, False, 0, len(text) // 3)


def _call(code: str, output: str, outcome: Outcome) -> ToolCall:
    result = RunResult(outcome, output, "", None, Tier.A, 0.01, 0.01, 1 << 20, 0)
    return ToolCall(code, output, result)


def _text(step: Step) -> str:
    if step.call is None:
        return step.thought
    return step.thought + action(step.call.code) + observation(step.call.observation)
