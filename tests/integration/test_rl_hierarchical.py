"""Hierarchical RL end to end on nano: real sandbox, real grader, the local engine, the database.

Claim. A job that is killed in mid-step goes on bit for bit, with the rollout that was being sampled
meanwhile and all (trainer.md 4.3 H 32-34, I 36). What it logs is what it did.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sqlalchemy import select

from shared.store import Database
from shared.store.models import JobMetricRow, JobRow, JobState, SnapshotKind
from tests import nano_frozen, ranks
from tests.integration.test_rl_resume import same, steps, wait_for
from tirgen.stack import WEIGHTS

ROLLOUTS = 3
TIMES = ("time", "speed", "memory", "heldout/time")


@dataclass(frozen=True)
class Place:
    url: str
    folder: Path

    def arguments(self, name: str, *more: str) -> list[str]:
        settings = (
            f"schedule.rollouts={ROLLOUTS}", "schedule.prompts=3", "schedule.group=4",
            "schedule.step_group=4", "rollout.temperature=1.4", "rollout.tokens=120",
            "rollout.context=320", "rollout.slots=12", "checkpoint.every=1", "checkpoint.keep=9",
            "rollout.overlap=true", "data.split=train", "optimizer.lr=1e-3",
            'heldout={split="valid", limit=2, every=2}', *more,
        )  # fmt: skip
        arguments = ["train", "--preset", "rl-nano", "--model", str(WEIGHTS), "--snapshot", "rl"]
        arguments += [part for one in settings for part in ("--set", one)]
        return [*arguments, "--out", str(self.folder / name), "--name", name]

    @property
    def env(self) -> dict[str, str]:
        return {"TIRGEN_DATABASE_URL": self.url}

    def run(self, name: str, *more: str, world: int = 1, resume: bool = False) -> Path:
        arguments = [*self.arguments(name, *more), *(["--resume"] if resume else [])]
        ranks.run("rl.cli", arguments, world, self.env)
        return self.folder / name


@pytest.fixture(scope="module")
def place(
    new_database: Callable[[], AbstractContextManager[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    with new_database() as url:
        db = Database(url)
        nano_frozen.freeze(db, "rl", 20, kind=SnapshotKind.PROBLEMS)
        db.close()
        yield Place(url, tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    return place.run("whole")


def computed(out: Path) -> list[dict[str, float]]:
    """The metrics without what a clock says."""
    return [{k: v for k, v in step.items() if not k.startswith(TIMES)} for step in steps(out)]


def test_rounds_are_logged_with_what_they_did(place: Place, whole: Path) -> None:
    logged = steps(whole)
    assert [step["step"] for step in logged] == list(range(ROLLOUTS + 1))
    assert logged[0].keys() >= {"heldout/reward/episode", "heldout/calls/first_try"}
    rounds = logged[1:]
    assert [step["staleness"] for step in rounds] == [0, 1, 1]
    for step in rounds:
        assert step["episodes"] == 12
        assert step["calls"] > 0
        assert step["steps/groups"] <= 3
        assert step["time/update"] > 0
        if step["rows"]:
            assert step["ratio/mean"] == 1.0, "one step per rollout: pi_old is the policy itself"
            assert step["mismatch/abs"] < 0.2
    assert sum(step["rows"] > 0 for step in rounds) >= 2, "control: something was trained on"
    assert rounds[0]["rows"] > 0
    assert rounds[0]["mismatch/abs"] < 1e-4, "sampler and trainer have the same weights"
    shown = (whole / "rollouts" / "000001.jsonl").read_text().splitlines()
    assert json.loads(shown[0])["outcomes"], "somebody can read what was sampled"


def test_the_database_has_the_job_and_every_step(place: Place, whole: Path) -> None:
    db = Database(place.url)
    with db.session() as session:
        job = session.scalars(select(JobRow).where(JobRow.name == "whole")).one()
        assert job.state == JobState.DONE
        rows = session.scalars(select(JobMetricRow).where(JobMetricRow.job_id == job.id)).all()
        assert sorted(row.step for row in rows) == list(range(ROLLOUTS + 1))
    db.close()


@pytest.fixture(scope="module")
def killed(place: Place) -> Path:
    """Killed after its second round, with the third rollout sampled and not yet trained on."""
    out = place.folder / "killed"
    processes = ranks.start("rl.cli", place.arguments("killed"), 1, place.env)
    latest = out / "checkpoints" / "latest"
    wait_for(lambda: latest.exists() and latest.read_text() == "step-000002", processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].wait()
    return out


def test_a_job_that_is_killed_has_no_model(killed: Path) -> None:
    assert not (killed / "model").exists()
    assert len(steps(killed)) == ROLLOUTS


def test_a_killed_job_goes_on_bit_for_bit(place: Place, whole: Path, killed: Path) -> None:
    """The rollout that was sampled meanwhile is trained on, not sampled again. Control: training
    has changed the weights at all."""
    place.run("killed", resume=True)
    assert computed(killed) == computed(whole)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    same(a, b)
    with pytest.raises(AssertionError):
        same(a, load_file(WEIGHTS / "model.safetensors"))


def test_two_ranks_share_the_prompts(place: Place, whole: Path) -> None:
    """Each prompt's episodes are those that one rank samples alone, so the first round's counts
    are the same; sums are added in another order."""
    out = place.run("two", "schedule.rollouts=1", world=2)
    (_, alone, *_), (_, shared) = steps(whole), steps(out)
    for name in ("episodes", "calls", "tokens/generated", "steps/failed", "reward/episode"):
        assert shared[name] == alone[name], name
    assert shared["rows"] == alone["rows"]
    if alone["rows"]:
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-3, abs=1e-6)
