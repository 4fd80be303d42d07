"""A database with two finished runs, one running and one empty, for what reads it."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy.orm import Session

from shared.sandbox.result import CodeError, Outcome, RunResult, Tier
from shared.store import Completed, Database, ItemState, RoleUsage, RunState, trajectories
from shared.store.models import RunRow, WorkItemRow
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict

SUBJECTS = ("Algebra", "Geometry", None)
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07 \x9b2J [bold]bold[/bold] [link=http://x]x[/link] \u202eevil\r"
)


def result(outcome: Outcome = Outcome.OK, tier: Tier = Tier.B) -> RunResult:
    error = CodeError("ValueError", "no", 1, "") if outcome is Outcome.MODEL_ERROR else None
    return RunResult(outcome, "42\n", "", error, tier, 0.25, 0.125, 1 << 20, 0)


def problem(i: int) -> Problem:
    return Problem(f"Problem {i}: 6 times 7?", "42", "world", f"w{i}", SUBJECTS[i % 3], str(i % 5))


def trajectory(i: int, text: str = "Multiply. ") -> Trajectory:
    failed = ToolCall("print(6 * '7' * x)", "NameError: x", result(Outcome.MODEL_ERROR))
    call = ToolCall("from math import prod\nprint(prod([6, 7]))", "42", result())
    steps = [Step(text, call, original="6 * 7 = 41", discarded=(failed,) * (i % 2))]
    if i % 4 == 3:
        steps.append(Step("Once more.", failed))
    steps.append(Step("So \\boxed{42}."))
    answer = None if i % 6 == 5 else "42" if i % 3 else "41"
    end = End.STEP_BUDGET if answer is None else End.ANSWERED
    return Trajectory(
        problem(i).key, tuple(steps), text * i, end, answer, False, i, 10 * (i % 7), {"i": i}
    )


def add_run(session: Session, name: str, n_items: int, state: RunState = RunState.DONE) -> RunRow:
    run = RunRow(
        name=name, kind="generate", config={}, fingerprint="f", code_version="c",
        created_by="u", host="h", n_items=n_items, state=state,
    )  # fmt: skip
    session.add(run)
    session.flush()
    return run


def add_item(
    session: Session, run: RunRow, i: int, state: ItemState, made: Trajectory | None = None
) -> int | None:
    """One item in its end state, with its trajectory if it has one; the trajectory's id."""
    trajectories.import_problems(session, [problem(i)])
    item = WorkItemRow(
        run_id=run.id, problem_key=problem(i).key, sample_index=i // 12, fingerprint="f",
        idempotency_key=f"{run.name}/{i}", state=state,
        reject_check=Check.ANSWER if state is ItemState.REJECTED else None,
        error_class="timeout" if state is ItemState.FAILED else None,
    )  # fmt: skip
    session.add(item)
    session.flush()
    usage = [
        RoleUsage(role, "nano", "http://127.0.0.1:1/v1", 3, 100, 50, 1, 0.5)
        for role in ("reasoner", "extractor")
    ]
    trajectories.write_usage(session, run.id, ((item.id, 1, one) for one in usage))
    if state not in (ItemState.VETTED, ItemState.REJECTED):
        return None
    made = made or trajectory(i)
    rejected = Check.ANSWER if state is ItemState.REJECTED else None
    verdicts = (
        Verdict(Check.EXECUTED, True, "1", "1 executed tool call"),
        Verdict(Check.ANSWER, rejected is None, "1/g1", "equal as numbers", {"stage": "number"}),
        Verdict(Check.JUDGE, None, "1", "perhaps"),
    )
    done = Completed(
        replace(made, problem_key=problem(i).key), verdicts, rejected, 1.5, "nano",
        "nano" if i % 2 else None, "abc",
    )  # fmt: skip
    return trajectories.write_trajectory(session, run.id, item.id, done)


def fill(db: Database) -> None:
    """Run `one`: 24 items, of which 12 vetted, 8 rejected, 4 failed. `two`: running. `none`."""
    with db.begin() as session:
        one = add_run(session, "one", 24)
        for i in range(24):
            state = (ItemState.VETTED, ItemState.REJECTED, ItemState.VETTED, ItemState.FAILED,
                     ItemState.REJECTED, ItemState.VETTED)[i % 6]  # fmt: skip
            add_item(session, one, i, state)
        two = add_run(session, "two", 3, RunState.RUNNING)
        add_item(session, two, 0, ItemState.VETTED)
        add_item(session, two, 1, ItemState.QUEUED)
        add_item(session, two, 2, ItemState.QUEUED)
        add_run(session, "none", 0)
