"""The commands about training jobs: what they check, and what they show."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from rl import job_rows
from shared.errors import InputError
from shared.store import Database
from shared.store.models import JobState
from tests.cli import error_of, said
from tests.jobs import (
    Cli,
    Starter,
    job_file,
    launched,
    new_job,
    saved,
    taken,
    trained,
    until,
)

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
