"""Launching a job where its file says, and the same again: cancel, resume.

The job's row is made first and is the truth from then on. Then: a supervisor on this host, a script
handed to Slurm, or a message to a queue that workers of GPU hosts consume.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rl import job_rows, slurm, worker
from rl.job_file import JobFile, Spec, make_spec, settings
from rl.job_rows import Hold, NewJob
from rl.logs import LOG
from rl.supervisor import supervise
from shared.errors import BrokerError, ConfigError, InputError
from shared.problems import NANO
from shared.store.database import Database
from shared.store.models import JobPlace, JobRow, JobState
from shared.store.snapshot_reader import Snapshot
from shared.store.snapshots import is_folder
from shared.version import code_version

log = logging.getLogger(__name__)


def prepare(
    db: Database, file: JobFile, cwd: Path, environ: Mapping[str, str] = os.environ
) -> NewJob:
    """Check all that can be checked before anything starts.

    Raises ConfigError for a recipe that the trainer would refuse, or a database that the job's
    hosts cannot reach; InputError where there is no such snapshot.
    """
    job = file.job
    spec = make_spec(file, cwd)
    embedded = not environ.get("TIRGEN_DATABASE_URL")
    elsewhere = job.where is JobPlace.SLURM or any(host.address for host in spec.hosts)
    if embedded and elsewhere:
        raise ConfigError(
            "other hosts cannot reach the embedded database",
            where="TIRGEN_DATABASE_URL",
            remedy="use a PostgreSQL server that this host and theirs can reach",
        )
    check_recipe(file, spec)
    name, digest = _snapshot(db, job.snapshot, cwd)
    return NewJob(
        name=job.name,
        command=job.command,
        place=job.where,
        queue=file.celery.queue if job.where is JobPlace.CELERY else None,
        restarts=file.celery.restarts if job.where is JobPlace.CELERY else 0,
        spec=spec.model_dump(mode="json"),
        out=spec.out,
        code_version=code_version(),
        snapshot_name=name,
        snapshot_digest=digest,
    )


def check_recipe(file: JobFile, spec: Spec) -> None:
    """Let the trainer's own rules judge the recipe with all that is put over it."""
    job = file.job
    if job.program != ("-m", "rl.cli") or job.command == "eval" or job.arguments:
        return
    from rl import config  # brings torch, which nothing else here needs

    recipe = Path(spec.cwd) / job.recipe if job.recipe else None
    over = list(settings(file.set))
    if job.command == "sft":
        config.load(config.SftConfig, job.preset, recipe, over, job.model, job.snapshot)
    else:
        config.load(config.TrainConfig, job.preset, recipe, over, job.model, job.snapshot)


def start(
    db: Database, row: JobRow, *, detach: bool = False, tick: Callable[[], object] = lambda: None
) -> JobState:
    """Bring a queued job to where it runs. Waits for its end where that is here and not detached.

    What cannot be started is failed, with the reason. Raises SlurmError for what Slurm refuses.
    A broker that is away is no failure: an idle worker looks for queued jobs by itself.
    """
    spec = Spec.model_validate(row.spec)
    hold = Hold(row.id, row.token)
    match spec.place:
        case JobPlace.LOCAL if detach:
            _detach(row)
        case JobPlace.LOCAL:
            state = supervise(db, row.id, tick=tick)
            if state is None:
                raise InputError(f"job {row.name!r} was taken by somebody else")
            return state
        case JobPlace.SLURM:
            try:
                number = slurm.submit(spec, row.name, hold)
            except slurm.SlurmError as error:
                job_rows.refuse(db, hold, type(error).__name__, str(error))
                raise
            job_rows.submitted(db, hold, number)
        case JobPlace.CELERY:
            try:
                worker.ring(db, [row.queue or worker.QUEUE])
            except BrokerError as error:
                log.warning("%s\nan idle worker will find the job by itself", error)
    return JobState.QUEUED


def cancel(db: Database, name: str, grace: float) -> JobRow:
    """Ask for the job's end within `grace` seconds; whoever runs it brings that about.

    Raises InputError where it has ended already, SlurmError where scancel cannot be asked.
    """
    job_rows.sweep(db)
    row = job_rows.ask_to_stop(db, name, grace)
    if row.place == JobPlace.SLURM and row.external_id is not None:
        slurm.cancel(row.external_id)
    return row


def refresh(db: Database) -> None:
    """Notice the dead: no heartbeat for long, or gone from Slurm's queue without a word."""
    for swept in job_rows.sweep(db):
        log.warning("job %s is %s: %s", swept.name, swept.state, swept.why)
    for job_id, token, external_id in job_rows.waiting_for_slurm(db):
        if slurm.is_known(external_id) is False:
            why = f"Slurm no longer has job {external_id}, which never began"
            job_rows.refuse(db, Hold(job_id, token), "lost", why)


def _detach(row: JobRow) -> None:
    out = Path(row.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("ab") as output:
        subprocess.Popen(
            [sys.executable, "-m", "rl.supervisor", str(row.id)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # survives the terminal
        )


def _snapshot(db: Database, name: str | None, cwd: Path) -> tuple[str | None, str | None]:
    """Name and digest, so that the job trains on this snapshot or not at all."""
    if name is None or name == NANO:  # whose demonstrations are made as they are needed
        return None, None
    if is_folder(name):
        snapshot = Snapshot.open(cwd / name)
    else:
        snapshot = Snapshot.open(name, db.url.render_as_string(hide_password=False))
    return snapshot.record.name, snapshot.digest
