"""Training jobs: what is recorded of them, that they end when they should, and survive the rest.

`tests/training_program.py` stands for the trainer: it uses rl.jobs and rl.metrics as trainers do.
All else is real: PostgreSQL, Celery workers, torchrun, kill -9. Slurm's and ssh's programs are
small ones that do what the real ones promise. Deaths are noticed by a minute of silence; tests age
the last heartbeat instead of waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from rl import job_rows, launch, worker
from rl.cli import app as tirgen_rl
from rl.job_file import load
from rl.job_rows import Hold, JobLost, NewJob
from rl.jobs import JOB, open_job
from rl.keeper import MARK
from rl.metrics import FILE, Sender, open_metrics
from shared.errors import ConfigError, DatabaseError, InputError, TirgenError
from shared.store import Database, EmbeddedPostgres, migrate, roles
from shared.store.models import JobPlace, JobRow, JobState
from shared.work.celery_app import Message, make_app, prepare_broker, send
from tests.processes import kill, kill_tree

ROOT = Path(__file__).parents[2]
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


def said(result: Result) -> str:
    assert result.exit_code == 0, result.output or result.exception
    return result.output


def error_of(result: Result) -> TirgenError:
    assert isinstance(result.exception, TirgenError), result.output
    return result.exception


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


# A trainer that was started directly


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


def test_a_job_records_itself(db: Database, out: Path) -> None:
    trained(db, out, {"optimizer": {"lr": 0.5}}, world_size=2)
    done = row(db, "out")
    assert (done.state, done.command, done.place) == ("done", "sft", "local")
    assert (done.config, done.world_size) == ({"optimizer": {"lr": 0.5}}, 2)
    assert done.pid == os.getpid()
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.finished_at >= done.started_at >= done.created_at
    assert recorded(db, "out") == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    with db.session() as session:
        (saved,) = job_rows.checkpoints(session, done.id)
    assert (saved.step, saved.path, saved.n_bytes, saved.digest) == (3, str(out / "c"), 5, "d")


@pytest.mark.parametrize(
    ("raised", "state", "error_class", "told"),
    [
        (ValueError("no\0"), "failed", "ValueError", "raise error\nValueError: no\ufffd"),
        (ConfigError("bad", where="a.b"), "failed", "ConfigError", "bad\n  where: a.b"),
        (MemoryError(), "failed", "MemoryError", "MemoryError"),
        (KeyboardInterrupt(), "cancelled", None, None),
        (SystemExit(0), "done", None, None),
        (SystemExit(3), "failed", "SystemExit", "SystemExit: 3"),
    ],
)
def test_how_a_job_ends_is_recorded(
    db: Database, out: Path, raised: BaseException, state: str, error_class: str | None,
    told: str | None,
) -> None:  # fmt: skip
    def fail(error: BaseException) -> None:
        with open_job("sft", {}, None, out, environ=environment(db)):
            raise error

    with pytest.raises(type(raised)):
        fail(raised)
    ended = row(db, "out")
    assert (ended.state, ended.error_class) == (state, error_class)
    assert told is None or (ended.error_text or "").strip().endswith(told)


def test_without_a_database_nothing_is_recorded_and_all_else_is_the_same(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot in Parquet at a trainer without PostgreSQL: nothing is started for it either."""
    environ = {"TIRGEN_HOME": str(tmp_path / "home")}
    with open_job("sft", {}, None, out, environ=environ) as job:
        metrics = open_metrics([], out, job, config={})
        metrics.log(1, {"loss": 1.0})
        job.checkpoint(1, out)
        assert not job.cancelled
        metrics.close()
    assert steps(out) == [1]
    assert "no database: the job is not recorded" in caplog.text
    assert not (tmp_path / "home").exists()


def test_a_configured_database_that_is_down_is_named_before_anything_starts(out: Path) -> None:
    environ = {"TIRGEN_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/x"}
    with pytest.raises(DatabaseError) as caught, open_job("sft", {}, None, out, environ=environ):
        raise AssertionError("must not begin")
    assert "secret" not in str(caught.value)


def test_jobs_are_called_after_their_folders_and_resumed_as_the_same_job(
    db: Database, out: Path, tmp_path: Path
) -> None:
    trained(db, out)
    trained(db, tmp_path / "other" / "out")
    assert [row(db, name).out for name in ("out", "out-2")] == [
        str(out), str(tmp_path / "other" / "out"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="there is a job named 'out' already"):
        trained(db, tmp_path / "third", name="out")
    with pytest.raises(InputError, match="is done: nothing to resume"):
        trained(db, out, resume=True)
    with pytest.raises(ValueError, match="no"), open_job(
        "sft", {}, None, tmp_path / "fourth", environ=environment(db)
    ):  # fmt: skip
        raise ValueError("no")
    trained(db, tmp_path / "fourth", resume=True)
    assert row(db, "fourth").state == "done"
    assert row(db, "fourth").error_class is None


def test_one_trainer_works_in_a_folder(db: Database, out: Path, start: Starter) -> None:
    """The second is refused; once the first was killed by kill -9, the folder is free."""
    first = start(PROGRAM, "sft", "--out", out, "--set", "hold=2")
    until(lambda: saved(out) == 1, "the first has begun")
    second = start(PROGRAM, "sft", "--out", out)
    assert second.wait(30) == 1
    assert steps(out) == [1]
    first.kill()
    first.wait()
    (out / "go").touch()
    assert start(PROGRAM, "sft", "--out", out).wait(30) == 0
    assert steps(out) == [1, 2, 3]


def test_a_trainer_that_was_killed_is_lost_and_goes_on(
    db: Database, out: Path, start: Starter, cli: Cli
) -> None:
    """kill -9 between two steps; a minute later it is noticed by whoever looks."""
    process = start(PROGRAM, "sft", "--out", out, "--set", "hold=3", "--set", "steps=5")
    until(lambda: saved(out) == 2, "two steps are done")
    process.kill()
    process.wait()
    assert json.loads(said(cli("jobs", "list", "--format", "json")))[0]["state"] == "running"
    age(db, "out")
    (listed,) = json.loads(said(cli("jobs", "list", "--format", "json")))
    assert (listed["state"], listed["error_class"]) == ("lost", "lost")
    assert "no heartbeat from" in listed["error_text"]
    (out / "go").touch()
    resumed = start(PROGRAM, "sft", "--out", out, "--set", "steps=5", "--resume")
    assert resumed.wait(30) == 0
    assert row(db, "out").state == "done"
    assert [start_[3] for start_ in starts(out)] == [1, 3]
    assert steps(out) == [step for step, _ in recorded(db, "out")] == [1, 2, 3, 4, 5]


def test_a_trainer_that_was_killed_here_goes_on_at_once(
    db: Database, out: Path, start: Starter
) -> None:
    """Nobody has to wait until a job whose process is gone has been silent for long. Control: one
    that lives is not taken over (its folder is locked)."""
    process = start(PROGRAM, "sft", "--out", out, "--set", "hold=2")
    until(lambda: saved(out) == 1, "one step is done")
    assert start(PROGRAM, "sft", "--out", out, "--resume").wait(30) != 0
    process.kill()
    process.wait()
    (out / "go").touch()
    assert start(PROGRAM, "sft", "--out", out, "--resume").wait(30) == 0
    assert row(db, "out").state == "done"
    assert steps(out) == [1, 2, 3]


def test_a_trainer_by_itself_ends_when_it_is_cancelled(
    db: Database, out: Path, start: Starter, cli: Cli
) -> None:
    process = start(PROGRAM, "sft", "--out", out, "--set", "hold=2")
    until(lambda: saved(out) == 1, "a step is done")
    assert "out: cancelled" in said(cli("jobs", "cancel", "out"))
    assert process.wait(30) == 130


def test_a_trainer_by_itself_that_hears_nothing_is_killed(
    db: Database, out: Path, start: Starter, cli: Cli
) -> None:
    deaf = ("--set", "hold=2", "--set", "stubborn=1")
    process = start(PROGRAM, "sft", "--out", out, *deaf)
    until(lambda: saved(out) == 1, "a step is done")
    assert "out: cancelled" in said(cli("jobs", "cancel", "out", "--grace", "0"))
    assert process.wait(30) == -signal.SIGKILL


def test_sigterm_ends_a_trainer_in_order(db: Database, out: Path, start: Starter) -> None:
    process = start(PROGRAM, "sft", "--out", out, "--set", "hold=2")
    until(lambda: saved(out) == 1, "a step is done")
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert (row(db, "out").state, row(db, "out").error_class) == ("failed", "terminated")


# The database may go away


def test_a_database_that_dies_costs_no_step(tmp_path: Path, out: Path) -> None:
    """kill -9 of PostgreSQL in mid-training: the file has each step at once, the database when it
    is back; the job is recorded as done."""
    server = EmbeddedPostgres(tmp_path / "home")
    db = Database(server.start())
    process = None
    try:
        migrate.upgrade(db)
        command = [sys.executable, str(PROGRAM), "sft", "--out", str(out)]
        settings = ["--set", "hold=3", "--set", "steps=6"]
        process = subprocess.Popen([*command, *settings], env=environment(db))
        until(lambda: saved(out) == 2, "two steps are done")
        until(lambda: len(recorded(db, "out")) == 2, "they are in the database")
        pid = server.status().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        (out / "go").touch()
        until(lambda: steps(out) == [1, 2, 3, 4, 5, 6], "it has gone on")
        assert process.poll() is None, "it waits with its end for the database"
        server.start()
        assert process.wait(40) == 0
        assert [step for step, _ in recorded(db, "out")] == [1, 2, 3, 4, 5, 6]
        assert row(db, "out").state == "done"
    finally:
        if process is not None:
            process.kill()
            process.wait()
        db.close()
        server.stop()


def test_steps_that_never_reached_the_database_are_sent_by_the_next_start(
    db: Database, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise DatabaseError("away")

    def fail() -> None:
        with open_job("sft", {}, None, out, environ=environment(db)) as job:
            metrics = open_metrics([], out, job, config={})
            metrics.log(1, {"loss": 1.0})
            metrics.log(2, {"loss": 0.5})
            metrics.close()
            raise ValueError("over")

    with monkeypatch.context() as patched:
        patched.setattr(Sender, "add", lambda *_: None)
        patched.setattr(job_rows, "undo_steps", lost)
        patched.setattr("rl.metrics.CLOSE_SECONDS", 0.1)
        with pytest.raises(ValueError, match="over"):
            fail()
    assert recorded(db, "out") == []
    with open_job("sft", {}, None, out, resume=True, environ=environment(db)) as job:
        metrics = open_metrics([], out, job, config={})
        metrics.log(3, {"loss": 0.25})
        metrics.close()
    assert recorded(db, "out") == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 0.25})]


# Rows: fencing


def new_job(db: Database, name: str = "job", place: JobPlace = JobPlace.LOCAL, **more: Any) -> int:
    queue = "train" if place is JobPlace.CELERY else None
    return job_rows.create(
        db, NewJob(name, "sft", place, spec={}, out="/o", code_version="c", queue=queue, **more)
    )


def taken(db: Database, job_id: int) -> Hold:
    hold = job_rows.take(db, job_id, "host", 1)
    assert hold is not None
    return hold


def test_a_job_is_taken_once_however_many_try(db: Database) -> None:
    job_id = new_job(db)
    with ThreadPoolExecutor(6) as pool:
        holds = list(pool.map(lambda i: job_rows.take(db, job_id, f"host {i}", i), range(12)))
    assert sum(hold is not None for hold in holds) == 1


def test_who_lost_a_job_can_do_nothing_to_it(db: Database) -> None:
    """Swept, and given to another by a restart: the first one's words are void."""
    stale = taken(db, new_job(db, place=JobPlace.CELERY, restarts=1))
    age(db)
    assert [(s.name, s.state) for s in job_rows.sweep(db)] == [("job", "queued")]
    held = taken(db, stale.id)
    with pytest.raises(JobLost, match="it is running, on host"):
        job_rows.beat(db, stale)
    assert job_rows.end(db, stale, JobState.DONE) is None
    job_rows.give_back(db, stale)
    job_rows.add_metrics(db, stale, [(1, "{}", 0.0)])
    job_rows.add_checkpoint(db, stale, 1, "/x", 1, None)
    assert row(db).state == "running"
    assert recorded(db) == []
    job_rows.add_metrics(db, held, [(1, '{"a": 1}', 0.0)])
    job_rows.undo_steps(db, stale, 0)
    assert recorded(db) == [(1, {"a": 1})]
    assert job_rows.end(db, held, JobState.DONE) is JobState.DONE


def test_what_is_made_anew_is_forgotten_and_what_was_just_made_is_not(db: Database) -> None:
    """Metrics reach the database late: by then the new start may have saved a checkpoint."""
    first = taken(db, new_job(db))
    job_rows.add_checkpoint(db, first, 1, "/old", 1, None)
    job_rows.add_checkpoint(db, first, 2, "/old", 1, None)
    job_rows.give_back(db, first)
    second = taken(db, first.id)
    job_rows.add_checkpoint(db, second, 3, "/new", 1, None)
    job_rows.undo_steps(db, second, 2)
    with db.session() as session:
        saved = job_rows.checkpoints(session, first.id)
    assert [(s.step, s.path) for s in saved] == [(1, "/old"), (3, "/new")]


def test_a_lost_job_is_running_again_if_it_was_only_out_of_reach(db: Database) -> None:
    hold = taken(db, new_job(db))
    assert job_rows.sweep(db) == [], "control: it has just been heard of"
    age(db)
    assert [s.state for s in job_rows.sweep(db)] == [JobState.LOST]
    assert job_rows.beat(db, hold).asked is None
    back = row(db)
    assert (back.state, back.error_class, back.finished_at) == ("running", None, None)


def test_restarts_are_counted(db: Database) -> None:
    job_id = new_job(db, place=JobPlace.CELERY, restarts=2)
    states = []
    for _ in range(3):
        taken(db, job_id)
        age(db)
        states += [s.state for s in job_rows.sweep(db)]
    assert states == ["queued", "queued", "lost"]


def test_what_dies_after_it_was_cancelled_is_cancelled(db: Database) -> None:
    hold = taken(db, new_job(db, place=JobPlace.CELERY, restarts=5))
    job_rows.ask_to_stop(db, "job", grace=7.0)
    order = job_rows.beat(db, hold)
    assert order.asked is not None
    assert order.grace == 7.0
    age(db)
    assert [s.state for s in job_rows.sweep(db)] == [JobState.CANCELLED]
    for name, end in (("two", JobState.FAILED), ("three", JobState.DONE)):
        hold = taken(db, new_job(db, name))
        job_rows.ask_to_stop(db, name, grace=0.0)
        job_rows.end(db, hold, end, "E", "text")
    assert [row(db, name).state for name in ("two", "three")] == ["cancelled", "done"]


def test_only_what_did_not_come_to_its_end_is_reopened_or_cancelled(db: Database) -> None:
    hold = taken(db, new_job(db))
    with pytest.raises(InputError, match="is running: nothing to resume"):
        job_rows.reopen(db, "job")
    job_rows.end(db, hold, JobState.FAILED, "E", "text")
    with pytest.raises(InputError, match="has ended already: failed"):
        job_rows.ask_to_stop(db, "job", 0.0)
    reopened = job_rows.reopen(db, "job")
    assert (reopened.state, reopened.token) == ("queued", hold.token + 1)
    with pytest.raises(InputError, match="is queued"):
        job_rows.reopen(db, "job")
    assert job_rows.ask_to_stop(db, "job", 0.0).state == "cancelled"
    assert job_rows.take(db, hold.id, "h", 1) is None
    with pytest.raises(InputError, match="newest jobs: job"):
        job_rows.reopen(db, "nope")


def test_a_local_job_that_nobody_started_is_lost(db: Database) -> None:
    new_job(db)
    new_job(db, "waits", JobPlace.CELERY)
    with db.begin() as session:
        session.execute(text("UPDATE jobs SET created_at = created_at - interval '2 minutes'"))
    assert [(s.name, s.state, s.why) for s in job_rows.sweep(db)] == [
        ("job", "lost", "nobody started it")
    ]
    job_rows.reopen(db, "job")
    assert job_rows.sweep(db) == []


def test_a_trainer_may_write_its_jobs_and_nothing_else(
    db: Database, out: Path, login: Callable[[str], Database]
) -> None:
    roles.create(db)
    trainer = login(roles.TRAINER)
    trained(trainer, out)
    assert row(db, "out").state == "done"
    for statement in ("DELETE FROM jobs", "UPDATE runs SET name = ''", "SELECT 1 FROM work_items"):
        with pytest.raises(Exception, match="permission denied"), trainer.begin() as session:
            session.execute(text(statement))


@pytest.fixture
def login(db: Database) -> Iterator[Callable[[str], Database]]:
    """A login that is a member of one role."""
    opened: list[Database] = []

    def make(role: str) -> Database:
        name = f"{role}_of_jobs"
        with db.begin() as session:
            session.execute(text(f"CREATE ROLE {name} LOGIN IN ROLE {role}"))
        opened.append(Database(db.url.set(username=name).render_as_string(hide_password=False)))
        return opened[-1]

    yield make
    for database in opened:
        database.close()
        with db.begin() as session:
            session.execute(text(f"DROP ROLE {database.url.username}"))


# Launched here


def test_launch_runs_a_job_to_its_end_and_shows_its_log(db: Database, out: Path, cli: Cli) -> None:
    (out.parent / "r.toml").write_text("epochs = 2")
    file = job_file(out, more='recipe = "r.toml"')
    told = said(cli("launch", file))
    assert "step 1\nstep 2\nstep 3\n" in told
    assert told.endswith("job: done\n")
    done = row(db)
    assert (done.state, done.world_size, done.error_class) == ("done", 1, None)
    assert (out / "recipe.toml").read_text() == "epochs = 2"
    assert "step 3" in (done.log_tail or "")
    assert [step for step, _ in recorded(db)] == [1, 2, 3]


def test_a_launch_that_fails_says_why(db: Database, out: Path, cli: Cli) -> None:
    result = cli("launch", job_file(out, fail=2))
    assert result.exit_code == 1
    failed = row(db)
    assert (failed.state, failed.error_class) == ("failed", "ValueError")
    shown = said(cli("jobs", "show", "job"))
    assert "ValueError: no step 2" in shown
    assert "\x1b" not in shown, "what a program wrote does not act on the terminal"
    assert "no step 2\\x1b[31m" in said(cli("jobs", "logs", "job"))


def test_a_trainer_that_is_killed_fails_at_once(
    db: Database, out: Path, start: Starter, cli: Cli
) -> None:
    start("-m", "rl.supervisor", launched(db, job_file(out, hold=2)).id)
    until(lambda: saved(out) == 1, "a step is done")
    os.kill(starts(out)[0][2], signal.SIGKILL)
    until(in_state(db, JobState.FAILED), "it has failed")
    failed = row(db)
    assert failed.error_class == "killed"
    assert "SIGKILL" in (failed.error_text or "")
    (out / "go").touch()
    assert said(cli("jobs", "resume", "job")).endswith("job: done\n")
    assert [started[3] for started in starts(out)] == [1, 2]
    assert steps(out) == [step for step, _ in recorded(db)] == [1, 2, 3]


def test_cancel_ends_every_rank(db: Database, out: Path, cli: Cli, start: Starter) -> None:
    """Two ranks that hear neither the record nor SIGTERM. Control: no session or process group
    holds them, which is why their mark does."""
    file = job_file(out, more="processes = 2", hold=2, stubborn=1)
    start("-m", "rl.supervisor", launched(db, file).id)
    until(lambda: len(starts(out)) == 2 and saved(out) == 1, "both ranks run")
    assert sorted(started[:2] for started in starts(out)) == [[0, 2], [1, 2]]
    ranks = [psutil.Process(started[2]) for started in starts(out)]
    assert len({os.getsid(rank.pid) for rank in ranks}) == 2
    assert said(cli("jobs", "cancel", "job", "--grace", "0")).endswith("job: cancelled\n")
    assert job_processes(out) == [], "when it says so, they are gone already"
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert rank.status() == psutil.STATUS_ZOMBIE


def test_a_job_whose_supervisor_is_killed_ends_with_it_and_goes_on(
    db: Database, out: Path, start: Starter, cli: Cli
) -> None:
    supervisor = start("-m", "rl.supervisor", launched(db, job_file(out, hold=2)).id)
    until(lambda: saved(out) == 1, "a step is done")
    supervisor.kill()
    supervisor.wait()
    until(lambda: not job_processes(out), "its processes have ended")
    (out / "go").touch()
    if row(db).state == "running":
        age(db)
    launch.refresh(db)
    assert row(db).state in ("lost", "failed")
    assert "job: started" in said(cli("jobs", "resume", "job", "--detach"))
    until(in_state(db, JobState.DONE), "it is done")
    assert steps(out) == [1, 2, 3]


def test_hosts_reached_by_ssh_make_one_job(
    db: Database, out: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts that are both this one, through an `ssh` that runs what it is told with an empty
    environment. One rank each; the one that stays deaf is killed with the other's job."""
    fake_program(tmp_path, "ssh", f'shift 3; exec env -i PYTHONPATH={ROOT} PATH="$PATH" "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    file = job_file(out, more='hosts = ["127.0.0.1", "127.0.0.2"]\nenv = {X = "y"}')
    assert said(cli("launch", file, "--set", f"job.master_port={free_port()}")).endswith("done\n")
    assert sorted(started[:2] for started in starts(out)) == [[0, 2], [1, 2]]
    assert row(db).world_size == 2


def fake_program(folder: Path, name: str, body: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# From a queue


@pytest.fixture
def ready(db: Database) -> Database:
    prepare_broker(db, make_app(db))
    return db


def start_worker(start: Starter, queue: str = "train") -> subprocess.Popen[bytes]:
    return start("-m", "rl.cli", "worker", "--queue", queue)


def test_a_worker_takes_a_job_once_though_its_message_is_doubled(
    ready: Database, out: Path, start: Starter, cli: Cli
) -> None:
    """Three messages for one job, before and while it runs; and one for a job that is none."""
    db = ready
    assert "waits for a worker of queue train" in said(
        cli("launch", job_file(out, "celery", hold=2))
    )
    job_id = row(db).id
    double = Message(worker.TASK, (job_id,), "train")
    send(make_app(db), [double, Message(worker.TASK, (job_id + 1,), "train")])
    start_worker(start)
    until(lambda: saved(out) == 1, "it runs")
    send(make_app(db), [double])
    (out / "go").touch()
    until(in_state(db, JobState.DONE), "it is done")
    queued = "SELECT count(*) FROM pgmq.q_train"
    with db.session() as session:
        until(lambda: session.scalar(text(queued)) == 0, "the doubles are consumed")
    assert len(starts(out)) == 1


def test_a_job_survives_its_worker_and_a_lost_message(
    ready: Database, out: Path, start: Starter
) -> None:
    """kill -9 of the worker: the training ends with it, and another worker goes on from its
    checkpoint, though nobody sends a message. The second death is one too many."""
    db = ready
    job = launched(db, job_file(out, "celery", more="[celery]\nrestarts = 1", hold=2))
    first = start_worker(start)
    until(lambda: saved(out) == 1, "it runs")
    assert row(db).id == job.id
    kill_worker(first)
    until(lambda: not job_processes(out), "the training has ended")
    age(db)
    second = start_worker(start)
    until(lambda: len(starts(out)) == 2, "another worker has taken it")
    assert starts(out)[1][3] == 2
    assert row(db).losses == 1
    kill_worker(second)
    until(lambda: not job_processes(out), "the training has ended again")
    age(db)
    launch.refresh(db)
    assert row(db).state == "lost"


def kill_worker(process: subprocess.Popen[bytes]) -> None:
    """Main process and pool, at once; keepers and training are left to themselves."""
    pool = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if os.getsid(child.pid) == process.pid
    ]
    kill(psutil.Process(process.pid), *pool)
    process.wait()


def test_a_worker_that_is_stopped_lets_its_job_save_and_gives_it_back(
    ready: Database, out: Path, start: Starter
) -> None:
    db = ready
    launched(db, job_file(out, "celery", hold=2))
    worker.ring(db, ["train"])
    first = start_worker(start)
    until(lambda: saved(out) == 1, "it runs")
    first.terminate()
    until(in_state(db, JobState.QUEUED), "it is given back")
    assert (row(db).losses, row(db).error_class) == (0, None)
    (out / "go").touch()
    start_worker(start)
    until(in_state(db, JobState.DONE), "another worker has done it")
    assert first.wait(40) == 0
    assert [started[3] for started in starts(out)] == [1, 2]
    assert steps(out) == [1, 2, 3]


def test_queues_part_hosts_of_different_kinds(ready: Database, out: Path) -> None:
    launched(ready, job_file(out, "celery", more='[celery]\nqueue = "large"'))
    assert job_rows.ring(ready, ["train"], 10) == []
    assert [queue for _, queue in job_rows.ring(ready, ["train", "large"], 10)] == ["large"]
    assert job_rows.ring(ready, ["large"], 10) == [], "its message is under way"


# By Slurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of one host. sbatch starts the script with Slurm's environment and says its
    number, which here is its process; scancel ends it as Slurm does."""
    started = tmp_path / "started"
    fake_program(
        tmp_path,
        "sbatch",
        f"""
        [ -e {tmp_path}/full ] && echo "sbatch: error: invalid partition" >&2 && exit 1
        SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 \\
            setsid bash -c 'export SLURM_JOB_ID=$$; exec bash "$0"' "$2" </dev/null \\
            >{tmp_path}/slurm.log 2>&1 &
        echo $! >> {started}
        echo "$!;cluster"
    """,
    )
    fake_program(tmp_path, "scontrol", "echo 127.0.0.1")
    fake_program(tmp_path, "srun", 'shift; exec "$@"')
    fake_program(tmp_path, "scancel", 'pkill -TERM -s "$1"')
    fake_program(
        tmp_path,
        "squeue",
        """
        [ -d /proc/$3 ] && echo RUNNING && exit
        echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1
    """,
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    pids = started.read_text().split() if started.exists() else []
    for pid in pids:
        if psutil.pid_exists(int(pid)):
            kill_tree(psutil.Process(int(pid)))


def test_slurm_runs_a_job_and_cancel_reaches_it(
    db: Database, out: Path, cli: Cli, slurm: Path
) -> None:
    """The script as it is, by bash, with torchrun in it. Cancelled, and gone on with."""
    file = job_file(out, "slurm", hold=2)
    assert "job: submitted" in said(cli("launch", file))
    until(lambda: saved(out) == 1, "it runs")
    running = row(db)
    assert running.external_id == (slurm / "started").read_text().strip()
    assert (running.state, running.world_size) == ("running", 1)
    assert said(cli("jobs", "cancel", "job")).endswith("job: cancelled\n")
    (out / "go").touch()
    assert "job: submitted" in said(cli("jobs", "resume", "job"))
    until(in_state(db, JobState.DONE), "it is done")
    assert [started[3] for started in starts(out)] == [1, 2]
    assert steps(out) == [1, 2, 3]


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (3, "failed")])
def test_slurm_runs_what_records_nothing_by_itself(
    db: Database, start: Starter, code: int, state: str
) -> None:
    """And what it starts again, after a preemption say, is the same job."""
    hold = Hold(new_job(db, place=JobPlace.SLURM), 0)
    command = ("-m", "rl.slurm", f"{hold.id}:{hold.token}", "bash", "-c", "exit $CODE")
    assert start(*command, CODE=str(code), SLURM_JOB_ID="77").wait(30) == code
    assert (row(db).state, row(db).external_id) == (state, "77")
    if code:
        assert start(*command, CODE="0").wait(30) == 0
        assert (row(db).state, row(db).error_class) == ("done", None)


def test_a_submission_that_was_replaced_runs_nothing(db: Database, start: Starter) -> None:
    hold = Hold(new_job(db, place=JobPlace.SLURM), 0)
    job_rows.ask_to_stop(db, "job", 0.0)
    job_rows.reopen(db, "job")
    assert start("-m", "rl.slurm", f"{hold.id}:{hold.token}", "true").wait(30) == 1
    assert row(db).state == "queued"


def test_what_slurm_refuses_or_loses_is_failed(
    db: Database, out: Path, cli: Cli, slurm: Path
) -> None:
    (slurm / "full").touch()
    assert "invalid partition" in str(error_of(cli("launch", job_file(out, "slurm"))))
    assert (row(db).state, row(db).error_class) == ("failed", "SlurmError")
    hold = Hold(new_job(db, "gone", JobPlace.SLURM), 0)
    job_rows.submitted(db, hold, "999999999")
    listed = json.loads(said(cli("jobs", "list", "--format", "json")))
    assert [(job["state"], job["error_class"]) for job in listed] == [
        ("failed", "lost"), ("failed", "SlurmError"),
    ]  # fmt: skip


def test_without_slurm_or_a_server_the_launch_says_so(
    db: Database, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    error = error_of(cli("launch", job_file(out, "slurm")))
    assert error.what == "sbatch is not there"
    file = load(job_file(out, "slurm"))
    with pytest.raises(ConfigError, match="other hosts cannot reach the embedded database"):
        launch.prepare(db, file, out.parent, environ={})


# What is checked before a launch


def test_a_launch_checks_snapshot_and_recipe(db: Database, out: Path, cli: Cli) -> None:
    """By the trainer's own rules; nothing is left in the database."""
    file = job_file(out)
    wrong = error_of(cli("launch", file, "--set", "job.snapshot=nope"))
    assert isinstance(wrong, InputError)
    own = ("--set", 'job.program=["-m", "rl.cli"]', "--set", "job.model=m")
    wrong = error_of(cli("launch", file, *own, "--set", "set.optimizer.l=1"))
    assert "optimizer.l: unknown key; did you mean 'lr'?" in str(wrong)
    with db.session() as session:
        assert session.scalar(text("SELECT count(*) FROM jobs")) == 0


def test_dry_run_prints_what_would_be_started(db: Database, out: Path, cli: Cli) -> None:
    told = said(cli("launch", job_file(out), "--dry-run", "--set", "job.processes=2"))
    assert "torch.distributed.run --nproc-per-node 2 --standalone" in told
    assert "#SBATCH --nodes=1" in said(cli("launch", job_file(out, "slurm"), "--dry-run"))
    assert not out.exists()
    with db.session() as session:
        assert session.scalar(text("SELECT count(*) FROM jobs")) == 0


# Looking


def test_list_and_show_fit_a_terminal_and_tell_all(
    db: Database, out: Path, cli: Cli, tmp_path: Path
) -> None:
    assert "No jobs yet" in said(cli("jobs", "list"))
    trained(db, out)
    hold = taken(db, new_job(db, "a-job-with-a-name-that-is-rather-long-and-more-than-that"))
    values = [(i, json.dumps({"loss": 1 / i, "kl": "NaN"}), 0.0) for i in range(1, 101)]
    job_rows.add_metrics(db, hold, values)
    listed = said(cli("jobs", "list"))
    assert max(map(len, listed.splitlines())) <= 80
    assert "out" in listed
    assert "done" in listed
    assert "100" in listed
    shown = said(cli("jobs", "show", "out"))
    assert max(map(len, shown.splitlines())) <= 80 + len(str(out))
    assert "█" in shown
    assert "5 B" in shown
    drawn = said(cli("jobs", "show", "out", "--metric", "loss", "--plot", tmp_path / "p.png"))
    assert "loss, steps 1 to 3" in drawn
    assert (tmp_path / "p.png").stat().st_size > 1000
    told = json.loads(said(cli("jobs", "show", "out", "--format", "json")))
    assert (told["metrics"], told["step"]) == ({"loss": pytest.approx(1 / 3)}, 3)
    assert told["checkpoints"][0]["n_bytes"] == 5
    wrong = error_of(cli("jobs", "show", "out", "--metric", "nope"))
    assert wrong.remedy == "there are: loss"
    assert isinstance(error_of(cli("jobs", "show", "nope")), InputError)


def test_logs_come_from_the_row_where_the_file_is_out_of_reach(
    db: Database, out: Path, cli: Cli
) -> None:
    """As on another host: all that is there is the end that the job reported."""
    hold = taken(db, new_job(db))
    job_rows.beat(db, hold, job_rows.Tail("one\ntwo\nthree \x1b[2J\n", 100))
    assert said(cli("jobs", "logs", "job", "--lines", "2")) == "two\nthree \\x1b[2J\n"
    job_rows.end(db, hold, JobState.DONE)
    assert said(cli("jobs", "logs", "job", "-f")).startswith("one\n")


def test_logs_are_followed_until_the_job_ends(
    db: Database, out: Path, cli: Cli, start: Starter
) -> None:
    start("-m", "rl.supervisor", launched(db, job_file(out, hold=2)).id)
    until(lambda: saved(out) == 1, "it runs")
    with ThreadPoolExecutor(1) as pool:
        followed = pool.submit(cli, "jobs", "logs", "job", "-f")
        (out / "go").touch()
        told = said(followed.result(30))
    assert told.endswith("step 1\nstep 2\nstep 3\n")
