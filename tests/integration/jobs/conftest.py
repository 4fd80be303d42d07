"""A job's folder, programs on its database, and the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from rl.cli import app as tirgen_rl
from shared.store import Database
from tests.jobs import (
    ROOT,
    Cli,
    Starter,
    environment,
    job_processes,
)
from tests.processes import kill, kill_tree


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "out"
    yield folder
    kill(*job_processes(folder))


@pytest.fixture
def start(db: Database) -> Iterator[Starter]:
    """Starts a program in a session of its own; ends it with all its children."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: object, **env: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment(db, **env),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            kill_tree(psutil.Process(process.pid))
        process.wait()


@pytest.fixture
def cli(db: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.setenv("TIRGEN_DATABASE_URL", environment(db)["TIRGEN_DATABASE_URL"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(tirgen_rl, [str(a) for a in arguments])

    return run
