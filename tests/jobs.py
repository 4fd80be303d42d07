"""What the tests of training jobs share: a trainer to start, and how to look at its record.

`training_program.py` stands for the trainer: it uses rl.jobs and rl.metrics as trainers do. Deaths
are noticed by a minute of silence; tests age the last heartbeat instead of waiting.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import text
from typer.testing import Result

from rl import job_rows, launch
from rl.job_file import load
from rl.job_rows import Hold, NewJob
from rl.jobs import JOB, open_job
from rl.keeper import MARK
from rl.metrics import FILE, open_metrics
from shared.store import Database
from shared.store.models import JobPlace, JobRow, JobState

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "training_program.py"

Cli = Callable[..., Result]
Starter = Callable[..., subprocess.Popen[bytes]]


def until(condition: Callable[[], object], what: str, seconds: float = 45.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.05)


def environment(db: Database, **more: str) -> dict[str, str]:
    url = db.url.render_as_string(hide_password=False)
    plain = {k: v for k, v in os.environ.items() if k not in (JOB, MARK)}
    return {**plain, "TIRGEN_DATABASE_URL": url, "PYTHONPATH": str(ROOT), **more}


def row(db: Database, name: str = "job") -> JobRow:
    with db.session() as session:
        return job_rows.find(session, name)


def in_state(db: Database, state: JobState, name: str = "job") -> Callable[[], bool]:
    return lambda: row(db, name).state == state


def recorded(db: Database, name: str = "job") -> list[tuple[int, dict[str, Any]]]:
    with db.session() as session:
        return job_rows.metrics(session, job_rows.find(session, name).id)


def steps(out: Path) -> list[int]:
    if not (out / FILE).exists():
        return []
    return [json.loads(line)["step"] for line in (out / FILE).read_text().splitlines()]


def saved(out: Path) -> int:
    """Step of the newest checkpoint, which follows the step's line in the log."""
    latest = out / "checkpoints" / "latest"
    return int(latest.read_text() or 0) if latest.exists() else 0


def starts(out: Path) -> list[list[int]]:
    """Rank, world size, process and first step of each process that was started."""
    if not (out / "starts").exists():
        return []
    return [[int(n) for n in line.split()] for line in (out / "starts").read_text().splitlines()]


def age(db: Database, name: str = "job", seconds: float = 120.0) -> None:
    """As if nothing had been heard of the job for so long."""
    aged = "UPDATE jobs SET heartbeat_at = heartbeat_at - make_interval(secs => :s)"
    with db.begin() as session:
        session.execute(text(f"{aged} WHERE name = :name"), {"s": seconds, "name": name})


def job_processes(out: Path) -> list[psutil.Process]:
    """All that names this job's folder: trainers, torchrun."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def job_file(out: Path, where: str = "local", more: str = "", **settings: object) -> Path:
    file = out.parent / "job.toml"
    given = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    file.write_text(f"""
        [job]
        name = "job"
        command = "sft"
        where = "{where}"
        program = ["{PROGRAM}"]
        out = "{out}"
        {more}
        [set]
        {given}
    """)
    return file


def launched(db: Database, file: Path, detach: bool = True) -> JobRow:
    """The way of `tirgen-rl launch`."""
    new = launch.prepare(db, load(file), file.parent, environment(db))
    job_rows.create(db, new)
    return row(db, new.name)


def trained(db: Database, out: Path, config: dict[str, Any] | None = None, **more: Any) -> None:
    """Three steps, in this process."""
    with open_job("sft", config or {}, None, out, environ=environment(db), **more) as job:
        metrics = open_metrics([], out, job, config={})
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1 / step})
        (out / "c").mkdir(exist_ok=True)
        (out / "c" / "weights").write_bytes(b"12345")
        job.checkpoint(3, out / "c", digest="d")
        metrics.close()


def new_job(db: Database, name: str = "job", place: JobPlace = JobPlace.LOCAL, **more: Any) -> int:
    queue = "train" if place is JobPlace.CELERY else None
    return job_rows.create(
        db, NewJob(name, "sft", place, spec={}, out="/o", code_version="c", queue=queue, **more)
    )


def taken(db: Database, job_id: int) -> Hold:
    hold = job_rows.take(db, job_id, "host", 1)
    assert hold is not None
    return hold
