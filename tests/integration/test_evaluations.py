"""An evaluation is a run: stored, resumed, killed, asked, compared. The policy is scripted."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from random import Random

import pytest
from sqlalchemy import func, select

from rl.evaluation import code, results, runs, worker
from rl.evaluation import config as configs
from rl.evaluation.analyses import correction_funnel, tool_success
from rl.evaluation.config import EvaluationConfig, differences
from rl.evaluation.figures import Settings, average, context, figures, pair
from rl.evaluation.results import Results
from shared.errors import ConfigError, InputError
from shared.policy import Tool
from shared.store import Database, ItemState
from shared.store.models import RunRow, TrajectoryRow, UsageRow, WorkItemRow
from shared.trajectory import Outcome
from tests import evaluated
from tests.scripted import ScriptedSandbox, ran
from tirgen.curation import freeze
from tirgen.query import count

WAITS = ("seconds of generation", "seconds of tool")


def evaluate(
    db: Database, name: str = "e", n: int = 8, samples: int = 3, **more: object
) -> Results:
    problems = evaluated.questions(n)
    config = evaluated.config(problems, samples, **more)
    run_id = runs.start(db, name, config, problems)
    evaluated.work(db, run_id)
    return load(db, name)[0]


def load(db: Database, name: str) -> list[Results]:
    return [results.load(db, run) for run in runs.find(db, name)]


def values(one: Results) -> dict[str, object]:
    """Every figure but those of the clock, with its interval."""
    return {f.name: asdict(f.interval) for f in figures(one) if f.name not in WAITS}


def hashes(db: Database, run_id: int) -> list[tuple[str, int, str]]:
    with db.session() as session:
        found = session.execute(
            select(TrajectoryRow.problem_key, WorkItemRow.sample_index, TrajectoryRow.content_hash)
            .join(WorkItemRow, WorkItemRow.id == TrajectoryRow.item_id)
            .where(TrajectoryRow.run_id == run_id)
        )
        return sorted((row[0], row[1], row[2]) for row in found)


def test_every_attempt_is_stored_with_what_figures_are_made_of(db: Database) -> None:
    """Items, trajectories, verdicts and usage; discarded calls and sampled tokens included."""
    one = evaluate(db)
    assert one.funnel.reconciles
    assert len(one.questions) == 8
    assert [len(q.attempts) for q in one.questions] == [3] * 8
    funnel = correction_funnel(one.attempts)
    assert funnel.n_corrected > 0
    by_name = {f.name: f.value for f in figures(one)}
    assert by_name["accuracy"] == pytest.approx(
        sum(a.right is True for a in one.attempts) / len(one.attempts)
    )
    assert by_name["call pass rate"] > by_name["first-try call pass rate"]  # type: ignore[operator]
    assert {"pass@2", "pass@3", "pass^3", "maj@3", "best-of-3"} <= by_name.keys()
    with db.session() as session:
        sampled = session.scalar(select(func.sum(UsageRow.completion_tokens)))
        corrections = session.scalar(select(func.sum(TrajectoryRow.n_corrections)))
    assert sampled == sum(a.n_generated for a in one.attempts)
    assert corrections == sum(a.n_retries for a in one.attempts) > 0
    said = dict(context(one))
    assert "suffix, L_suf 4, N_corr 2" in said["self-correction"]
    assert said["k"].startswith("3 ")


def test_a_resumed_evaluation_adds_what_is_missing(db: Database) -> None:
    """More samples: the earlier ones stay, the new ones are what they would have been at once."""
    few = evaluate(db, "few", samples=1)
    more = evaluate(db, "few", samples=3)
    at_once = evaluate(db, "once", samples=3)
    assert few.run_id == more.run_id
    assert set(hashes(db, few.run_id)) == set(hashes(db, at_once.run_id))
    assert values(more) == values(at_once)
    with pytest.raises(ConfigError, match="was begun with other settings") as error:
        evaluate(db, "few", seed=5)
    assert "seed: 0 and 5" in str(error.value)


def test_killed_at_ten_moments_it_gives_the_same_figures(db: Database, database_url: str) -> None:
    """kill -9 whenever so many attempts are stored, at random; then the same command again.

    Control: with another seed the figures are others.
    """
    problems = evaluated.questions(24)
    total = len(problems) * 4
    run_id = runs.start(db, "killed", evaluated.config(problems, 4), problems)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.evaluated"])
    for moment in sorted(Random(4).sample(range(1, total - 8), 10)):
        process = processes.Process(target=evaluated.work_at, args=(database_url, run_id))
        process.start()
        _until(db, run_id, moment, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    evaluated.work(db, run_id)
    undisturbed = evaluate(db, "whole", n=24, samples=4)
    [again] = load(db, "killed")
    assert len(again.attempts) == total
    assert hashes(db, run_id) == hashes(db, undisturbed.run_id)
    assert values(again) == values(undisturbed)
    with db.session() as session:
        of_run = select(func.sum(WorkItemRow.kills)).where(WorkItemRow.run_id == run_id)
        assert (session.scalar(of_run) or 0) > 0, "some attempts were under way as it was killed"
    assert values(evaluate(db, "other", n=24, samples=4, seed=1)) != values(again)


def _until(db: Database, run_id: int, moment: int, process: BaseProcess) -> None:
    """Wait until so many attempts are stored; the deadline is only for a test that has failed."""
    stored = select(func.count()).where(TrajectoryRow.run_id == run_id)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.is_alive():
        with db.session() as session:
            if (session.scalar(stored) or 0) >= moment:
                return
        time.sleep(0.005)
    raise AssertionError(f"{moment} attempts were never stored")


def test_two_evaluations_are_compared_on_the_same_questions(db: Database) -> None:
    """Self-correction against none: more calls succeed, for more sampled tokens."""
    without = evaluate(db, "none", n=20, correction={"strategy": "none"})
    corrected = evaluate(db, "suffix", n=20)
    found = pair(without, corrected, differences(without.config, corrected.config), Settings())
    assert found.n_common == 20
    assert any(line.startswith("correction: ") for line in found.differences)
    by_name = {c.name: c.comparison for c in found.figures}
    calls = by_name["call pass rate"]
    assert calls.p is not None
    assert calls.p < 0.01
    assert calls.low is not None
    assert calls.low > 0
    first = by_name["first-try call pass rate"].p
    assert first is not None
    assert first > 0.01, "first tries are the same policy's"
    with pytest.raises(InputError, match="no evaluation named"):
        runs.find(db, "nobody")


def test_whatever_can_be_asked_of_training_data_can_be_asked_of_an_evaluation(
    db: Database,
) -> None:
    one = evaluate(db)
    asked = 'run == "e/times" and kind == "evaluate" and n_corrections >= 1 and vetted'
    expected = [a for a in one.attempts if a.n_retries and a.right]
    assert count(db, asked) == len(expected) > 0
    assert tool_success(one.attempts).table.n == sum(a.n_calls > 0 for a in one.attempts)


def test_a_snapshot_takes_an_evaluation_only_if_told_to(db: Database) -> None:
    """Trained on by accident, the questions of a benchmark measure nothing any more."""
    evaluate(db)
    with pytest.raises(InputError, match=r"are evaluations \(e/times\)"):
        freeze.create(db, freeze.Request("accident", "vetted"))
    meant = freeze.create(db, freeze.Request("meant", "vetted and kind == 'evaluate'"))
    assert meant.n_rows > 0


def test_the_mean_of_benchmarks_draws_within_each(db: Database) -> None:
    problems = evaluated.questions(12)
    for name, part in (("a", problems[:4]), ("b", problems[4:])):
        config = evaluated.config(part, 2, name=name)
        evaluated.work(db, runs.start(db, "two", config, part))
    a, b = load(db, "two")
    mean = average([a, b]).value
    parts = [figures(one)[0].value for one in (a, b)]
    assert mean == pytest.approx(sum(p for p in parts if p is not None) / 2)


def test_a_failing_sandbox_is_no_wrong_answer(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items fail with a class, are counted apart, and are no part of any figure."""

    @asynccontextmanager
    async def broken(config: EvaluationConfig) -> AsyncIterator[Tool]:
        down = ran(Outcome.INFRASTRUCTURE_ERROR)
        yield ScriptedSandbox(
            lambda code, seed: down if "13 *" in code else evaluated.calculate(code, seed)
        )

    patient = EvaluationConfig.episode
    monkeypatch.setattr(
        EvaluationConfig, "episode", lambda self: replace(patient(self), infrastructure_wait=0.0)
    )
    problems = evaluated.questions(4)
    run_id = runs.start(db, "e", evaluated.config(problems), problems)
    evaluated.work(db, run_id, broken)
    [one] = load(db, "e")
    assert one.failures == {"infrastructure": 1}
    assert len(one.attempts) == 3
    assert one.funnel.items[ItemState.FAILED] == 1
    assert dict(context(one))["without an attempt"] == "1 infrastructure"


def test_a_run_of_another_kind_is_not_taken_over(db: Database) -> None:
    problems = evaluated.questions(2)
    runs.start(db, "e", evaluated.config(problems), problems)
    with db.begin() as session:
        session.scalars(select(RunRow)).one().kind = "generate"
    with pytest.raises(ConfigError, match="of another kind"):
        runs.start(db, "e", evaluated.config(problems), problems)


def test_code_tasks_end_to_end(db: Database) -> None:
    """The last program is judged by its tests; there is no majority of programs."""
    row = {"prompt": "What is 3 times 4?", "test": "print(1)", "test_list": []}
    problem = code.problem(row, "mbpp", "mbpp+", "row 1")
    values = evaluated.config([problem], 2).model_dump(mode="json")
    values["benchmark"] |= {"kind": "code", "name": "mbpp+"}
    run_id = runs.start(db, "c", configs.read(values, "the test"), [problem])
    evaluated.work(db, run_id, worker.open_tool)
    [one] = load(db, "c")
    by_name = {f.name: f.value for f in figures(one)}
    assert by_name["accuracy"] == 1
    assert "maj@2" not in by_name
    assert by_name["best-of-2"] == 1
