"""What is recorded of a training job, whoever started it: start, steps, end, loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from rl import job_rows
from rl.job_rows import JobLost
from rl.jobs import open_job
from rl.metrics import Sender, open_metrics
from shared.errors import ConfigError, DatabaseError, InputError
from shared.store import Database, EmbeddedPostgres, migrate, roles
from shared.store.models import JobPlace, JobState
from tests.cli import said
from tests.jobs import (
    PROGRAM,
    Cli,
    Starter,
    age,
    environment,
    new_job,
    recorded,
    row,
    saved,
    starts,
    steps,
    taken,
    trained,
    until,
)

# A trainer that was started directly


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
