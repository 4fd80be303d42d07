"""Where a training job runs: here, on hosts reached by ssh, from a queue, by Slurm.

PostgreSQL, Celery workers, torchrun and kill -9 are real; Slurm's and ssh's programs are small ones
that do what the real ones promise.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from rl import job_rows, launch, worker
from rl.job_file import load
from rl.job_rows import Hold
from shared.errors import ConfigError
from shared.store import Database
from shared.store.models import JobPlace, JobState
from shared.work.celery_app import Message, make_app, prepare_broker, send
from tests.cli import error_of, said
from tests.jobs import (
    ROOT,
    Cli,
    Starter,
    age,
    in_state,
    job_file,
    job_processes,
    launched,
    new_job,
    recorded,
    row,
    saved,
    starts,
    steps,
    until,
)
from tests.processes import kill, kill_tree

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
