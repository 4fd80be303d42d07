"""An evaluation that is left to `tirgen-rl worker --queue evaluate`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from typer.testing import CliRunner

from rl.cli import app
from rl.evaluation import results, runs
from shared.store import Database
from tests.processes import kill_tree


@pytest.fixture
def worker(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setenv("TIRGEN_DATABASE_URL", database_url)
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.cli", "worker", "--queue", "evaluate"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    yield process
    kill_tree(psutil.Process(process.pid))
    process.wait()


def test_a_worker_does_what_was_left_to_it(db: Database, worker: subprocess.Popen[bytes]) -> None:
    """`--detach` returns at once; slices of the worker open the engine and make every attempt."""
    told = CliRunner().invoke(
        app,
        ["eval", "--model", "nano", "--benchmark", "nano", "--limit", "3", "--strategy", "suffix",
         "--run", "w", "--detach"],
        catch_exceptions=False,
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    [run] = runs.find(db, "w")
    ended = runs.wait(db, run.id, lambda now: None)
    assert worker.poll() is None
    assert ended.n_open == 0
    assert ended.reconciles
    made = results.load(db, run)
    assert len(made.attempts) == 3
    assert any(attempt.right for attempt in made.attempts)
