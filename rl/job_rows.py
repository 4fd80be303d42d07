"""The rows of training jobs: who works on one, how it ends, and how its death is noticed.

Contract. Time is the database's clock; a change is one statement, guarded by token and state.

    queued --take--> running --end--------> done | failed | cancelled     (Slurm's: --start-->)
      ^ |               |------give_back--> queued      (its worker was told to stop)
      | '-ask_to_stop-> | cancelled
      |                 '------sweep------> lost, cancelled if that was asked for,
      |                                     queued where a worker may take it again
      '--reopen-- failed | cancelled | lost

What Slurm refuses, or loses before it began, goes from queued to failed (`refuse`).

`token` grows with every `take` and `reopen` and never shrinks: whoever holds an older one has lost
the job, whatever it still does. A holder that was swept while it was only out of reach comes back
with its next heartbeat, unless somebody else has the job by then.
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, select, text
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session

from shared.errors import InputError, TirgenError
from shared.store.database import Database
from shared.store.models import JobCheckpointRow, JobMetricRow, JobPlace, JobRow, JobState
from shared.trajectory import clean

LOST_SECONDS = 60.0  # without a heartbeat; one comes every second
RING_SECONDS = 30.0  # a message that nobody took in this time is sent again
TERMINATED = "terminated"  # error class of a job that a signal ended, asked for by nobody here

_NOW = "clock_timestamp()"
_HELD = "id = :id AND token = :token AND state IN ('running', 'lost')"


class JobLost(TirgenError):
    """Somebody else works on the job by now, or ended it."""


@dataclass(frozen=True, slots=True)
class Hold:
    """The right to work on a job."""

    id: int
    token: int


@dataclass(frozen=True, slots=True)
class Order:
    """What a heartbeat brings back. `asked`: seconds since somebody asked for the job's end.
    `over`: it has ended already, by the trainer's own word for instance."""

    asked: float | None = None
    grace: float = 0.0
    over: bool = False


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a job is from its first moment."""

    name: str
    command: str
    place: JobPlace
    spec: Mapping[str, Any]
    out: str
    code_version: str
    queue: str | None = None
    restarts: int = 0
    snapshot_name: str | None = None
    snapshot_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What a trainer knows once it has started."""

    host: str
    pid: int
    world_size: int
    config: Mapping[str, Any]
    config_digest: str
    snapshot_name: str | None
    snapshot_digest: str | None


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a log: `text`, and how many bytes the whole log had."""

    text: str
    n_bytes: int


_TAKE = text(f"""
    UPDATE jobs SET state = 'running', token = token + 1, host = :host, pid = :pid,
        started_at = {_NOW}, heartbeat_at = {_NOW}, finished_at = NULL
    WHERE id = :id AND state = 'queued' RETURNING token
""")

# What Slurm starts a second time comes here with the same token, whatever became of the first.
_START = text(f"""
    UPDATE jobs SET state = 'running', host = :host, pid = :pid,
        external_id = coalesce(:external_id, external_id), started_at = {_NOW},
        heartbeat_at = {_NOW}, finished_at = NULL, error_class = NULL, error_text = NULL
    WHERE id = :id AND token = :token AND state <> 'done' AND cancel_at IS NULL RETURNING id
""")

_BEGIN = text(f"""
    UPDATE jobs SET state = 'running', host = :host, pid = :pid, world_size = :world_size,
        config = :config, config_digest = :config_digest, snapshot_name = :snapshot_name,
        snapshot_digest = :snapshot_digest, heartbeat_at = {_NOW}, finished_at = NULL,
        error_class = NULL, error_text = NULL
    WHERE {_HELD} AND cancel_at IS NULL RETURNING id
""").bindparams(bindparam("config", type_=JSONB))

_BEAT = text(f"""
    UPDATE jobs SET state = 'running', heartbeat_at = {_NOW}, finished_at = NULL,
        error_class = CASE WHEN state = 'running' THEN error_class END,
        error_text = CASE WHEN state = 'running' THEN error_text END,
        log_tail = coalesce(:log_tail, log_tail), log_bytes = coalesce(:log_bytes, log_bytes)
    WHERE {_HELD} RETURNING extract(epoch FROM {_NOW} - cancel_at) AS asked, cancel_grace
""")

_NOTE = text(f"""
    UPDATE jobs SET error_class = :error_class, error_text = :error_text WHERE {_HELD}
""")

# What fails once its end was asked for was ended. The first to say why it failed knew best.
_END = text(f"""
    UPDATE jobs SET finished_at = {_NOW}, heartbeat_at = {_NOW},
        state = CASE WHEN :state = 'failed' AND cancel_at IS NOT NULL
            THEN 'cancelled' ELSE :state END,
        error_class = CASE WHEN :state = 'failed' AND cancel_at IS NULL
            THEN coalesce(error_class, :error_class) END,
        error_text = CASE WHEN :state = 'failed' AND cancel_at IS NULL
            THEN coalesce(error_text, :error_text) END,
        log_tail = coalesce(:log_tail, log_tail), log_bytes = coalesce(:log_bytes, log_bytes)
    WHERE {_HELD} RETURNING state
""")

_GIVE_BACK = text(f"""
    UPDATE jobs SET heartbeat_at = NULL, pid = NULL, error_class = NULL, error_text = NULL,
        state = CASE WHEN cancel_at IS NULL THEN 'queued' ELSE 'cancelled' END,
        finished_at = CASE WHEN cancel_at IS NULL THEN NULL ELSE {_NOW} END,
        log_tail = coalesce(:log_tail, log_tail), log_bytes = coalesce(:log_bytes, log_bytes)
    WHERE {_HELD} RETURNING state
""")

_SWEEP = text(f"""
    UPDATE jobs SET
        state = CASE WHEN cancel_at IS NOT NULL THEN 'cancelled'
            WHEN losses < restarts THEN 'queued' ELSE 'lost' END,
        finished_at = CASE WHEN cancel_at IS NULL AND losses < restarts THEN NULL ELSE {_NOW} END,
        losses = losses + 1, heartbeat_at = NULL, pid = NULL, error_class = 'lost',
        error_text = CASE WHEN state = 'queued' THEN 'nobody started it'
            ELSE format('no heartbeat from %s since %s', host, heartbeat_at) END
    WHERE id IN (
        SELECT id FROM jobs WHERE (state = 'running' OR state = 'queued' AND place = 'local')
            AND coalesce(heartbeat_at, created_at) < {_NOW} - make_interval(secs => :seconds)
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id, name, state, error_text
""")

_ASK = text(f"""
    UPDATE jobs SET cancel_at = coalesce(cancel_at, {_NOW}), cancel_grace = :grace,
        state = CASE WHEN state = 'running' THEN state ELSE 'cancelled' END,
        finished_at = CASE WHEN state = 'running' THEN finished_at ELSE {_NOW} END
    WHERE name = :name AND state IN ('queued', 'running', 'lost') RETURNING id
""")

_REOPEN = text("""
    UPDATE jobs SET state = 'queued', token = token + 1, losses = 0, cancel_at = NULL,
        cancel_grace = NULL, finished_at = NULL, external_id = NULL, pid = NULL,
        error_class = NULL, error_text = NULL,
        heartbeat_at = CASE WHEN place = 'celery' THEN NULL ELSE clock_timestamp() END
    WHERE name = :name AND state IN ('failed', 'cancelled', 'lost') RETURNING id
""")

# What never began: refused by Slurm, or lost in its queue.
_REFUSE = text(f"""
    UPDATE jobs SET state = 'failed', finished_at = {_NOW},
        error_class = :error_class, error_text = :error_text
    WHERE id = :id AND token = :token AND state = 'queued'
""")

_WAITING = text("""
    SELECT id, token, external_id FROM jobs
    WHERE state = 'queued' AND place = 'slurm' AND external_id IS NOT NULL
""")

_RING = text(f"""
    UPDATE jobs SET heartbeat_at = {_NOW} WHERE id IN (
        SELECT id FROM jobs WHERE state = 'queued' AND place = 'celery' AND queue = ANY(:queues)
            AND coalesce(heartbeat_at < {_NOW} - make_interval(secs => :seconds), true)
        ORDER BY id LIMIT :n FOR UPDATE SKIP LOCKED
    )
    RETURNING id, queue
""")

_CHECKPOINT = text("""
    INSERT INTO job_checkpoints (job_id, step, path, n_bytes, digest)
    SELECT :id, :step, :path, :n_bytes, :digest
    WHERE EXISTS (SELECT FROM jobs WHERE id = :id AND token = :token)
    ON CONFLICT (job_id, step) DO UPDATE SET path = excluded.path, n_bytes = excluded.n_bytes,
        digest = excluded.digest, saved_at = clock_timestamp()
""")

_LOG = text("""
    INSERT INTO job_metrics (job_id, step, metrics, logged_at)
    SELECT :id, step, CAST(metrics AS jsonb), to_timestamp(at)
    FROM unnest(CAST(:steps AS int[]), CAST(:metrics AS text[]), CAST(:times AS float8[]))
        AS logged (step, metrics, at)
    WHERE EXISTS (SELECT FROM jobs WHERE id = :id AND token = :token)
    ON CONFLICT (job_id, step) DO NOTHING
""")

# A checkpoint may be written before this comes: metrics are sent by a thread that takes its time.
_UNDO = (
    text("""
        DELETE FROM job_metrics WHERE job_id = :id AND step >= :step
            AND EXISTS (SELECT FROM jobs WHERE id = :id AND token = :token)
    """),
    text("""
        DELETE FROM job_checkpoints WHERE job_id = :id AND step >= :step
            AND saved_at < (SELECT started_at FROM jobs WHERE id = :id AND token = :token)
    """),
)


def create(db: Database, job: NewJob) -> int:
    """Queue a new job; its id. Raises InputError if the name is taken."""
    row = {
        "name": job.name,
        "command": job.command,
        "place": job.place,
        "queue": job.queue,
        "spec": clean(job.spec)[0],
        "out": job.out,
        "snapshot_name": job.snapshot_name,
        "snapshot_digest": job.snapshot_digest,
        "code_version": job.code_version,
        "created_by": getpass.getuser(),
        "restarts": job.restarts,
    }
    statement = insert(JobRow).values(row).on_conflict_do_nothing().returning(JobRow.id)
    with db.begin() as session:
        job_id = session.execute(statement).scalar_one_or_none()
    if job_id is None:
        remedy = f"go on with it: tirgen-rl jobs resume {job.name}; or choose another name"
        raise InputError(f"there is a job named {job.name!r} already", remedy=remedy)
    return job_id


def take(db: Database, job_id: int, host: str, pid: int) -> Hold | None:
    """Start to work on a queued job; None if somebody else was first, or it was cancelled."""
    with db.begin() as session:
        values = {"id": job_id, "host": host, "pid": pid}
        token = session.execute(_TAKE, values).scalar_one_or_none()
    return None if token is None else Hold(job_id, token)


def start(db: Database, hold: Hold, host: str, pid: int, external_id: str | None) -> JobRow:
    """Slurm has started the job, or started it again: only one instance of it runs at a time.

    Raises JobLost where it is done, cancelled, or another submission's.
    """
    values = {"host": host, "pid": pid, "external_id": external_id}
    with db.begin() as session:
        if session.execute(_START, _hold(hold) | values).first() is None:
            raise _lost(session, hold)
        return session.get_one(JobRow, hold.id)


def begin(db: Database, hold: Hold, begun: Begun) -> None:
    """The trainer itself has started. Raises JobLost where the job is no longer `hold`'s, or is to
    end already."""
    values = {
        "id": hold.id,
        "token": hold.token,
        "host": begun.host,
        "pid": begun.pid,
        "world_size": begun.world_size,
        "config": clean(begun.config)[0],
        "config_digest": begun.config_digest,
        "snapshot_name": begun.snapshot_name,
        "snapshot_digest": begun.snapshot_digest,
    }
    with db.begin() as session:
        if session.execute(_BEGIN, values).first() is None:
            raise _lost(session, hold)


def beat(db: Database, hold: Hold, tail: Tail | None = None) -> Order:
    """A sign of life; returns what is asked of the holder. Raises JobLost."""
    with db.begin() as session:
        row = session.execute(_BEAT, _hold(hold) | _tail(tail)).one_or_none()
        if row is None:
            ended = session.get(JobRow, hold.id)
            if ended is None or ended.token != hold.token or ended.state == JobState.QUEUED:
                raise _lost(session, hold)
            return Order(over=True)
    return Order(None if row.asked is None else float(row.asked), float(row.cancel_grace or 0.0))


def note(db: Database, hold: Hold, error_class: str, error_text: str) -> None:
    """Say why the job fails, ahead of the `end` by whoever waits for all its processes."""
    values = {"error_class": error_class, "error_text": clean(error_text)[0]}
    with db.begin() as session:
        session.execute(_NOTE, _hold(hold) | values)


def end(
    db: Database,
    hold: Hold,
    state: JobState,
    error_class: str | None = None,
    error_text: str | None = None,
    tail: Tail | None = None,
) -> JobState | None:
    """Close the job; the state it came to. None where it is no longer `hold`'s."""
    values = {
        "state": state,
        "error_class": error_class,
        "error_text": clean(error_text)[0],
    }
    with db.begin() as session:
        found = session.execute(_END, _hold(hold) | _tail(tail) | values).scalar_one_or_none()
    return None if found is None else JobState(found)


def give_back(db: Database, hold: Hold, tail: Tail | None = None) -> None:
    """Queue the job again in an orderly stop; nothing happens where it is no longer `hold`'s."""
    with db.begin() as session:
        session.execute(_GIVE_BACK, _hold(hold) | _tail(tail))


@dataclass(frozen=True, slots=True)
class Swept:
    id: int
    name: str
    state: JobState
    why: str


def sweep(db: Database, seconds: float = LOST_SECONDS) -> list[Swept]:
    """Notice the dead: jobs that have given no sign of life for so long."""
    with db.begin() as session:
        rows = session.execute(_SWEEP, {"seconds": seconds}).all()
    return [Swept(row.id, row.name, JobState(row.state), row.error_text) for row in rows]


def ask_to_stop(db: Database, name: str, grace: float) -> JobRow:
    """Ask for the end of a job within `grace` seconds; what is not running ends at once.

    Asked again, the new grace counts, from the first time. Raises InputError for an unknown job,
    and for one that has ended.
    """
    with db.begin() as session:
        asked = session.execute(_ASK, {"name": name, "grace": grace}).first()
        row = find(session, name)
        if asked is None:
            raise InputError(f"job {name!r} has ended already: {row.state}")
        session.refresh(row)
    return row


def reopen(db: Database, name: str) -> JobRow:
    """Queue a job again that did not come to its end. Raises InputError for any other."""
    with db.begin() as session:
        reopened = session.execute(_REOPEN, {"name": name}).first()
        row = find(session, name)
        if reopened is None:
            remedy = {
                JobState.DONE: "start another job from its model, under another name",
                JobState.QUEUED: f"it waits to be started: tirgen-rl jobs show {name}",
                JobState.RUNNING: f"cancel it first: tirgen-rl jobs cancel {name}",
            }[JobState(row.state)]
            raise InputError(f"job {name!r} is {row.state}: nothing to resume", remedy=remedy)
        session.refresh(row)
    return row


def submitted(db: Database, hold: Hold, external_id: str) -> None:
    """Note under which number Slurm has the job."""
    statement = text("UPDATE jobs SET external_id = :external WHERE id = :id AND token = :token")
    with db.begin() as session:
        session.execute(statement, _hold(hold) | {"external": external_id})


def refuse(db: Database, hold: Hold, error_class: str, error_text: str) -> None:
    """Fail a job that never began."""
    values = {"error_class": error_class, "error_text": clean(error_text)[0]}
    with db.begin() as session:
        session.execute(_REFUSE, _hold(hold) | values)


def waiting_for_slurm(db: Database) -> list[tuple[int, int, str]]:
    """(id, token, Slurm's number) of jobs that have been submitted and have not begun."""
    with db.session() as session:
        return [(row.id, row.token, row.external_id) for row in session.execute(_WAITING)]


def ring(db: Database, queues: Sequence[str], n: int) -> list[tuple[int, str]]:
    """(id, queue) of up to `n` jobs that wait for a worker; the caller sends their messages."""
    values = {"queues": list(queues), "n": n, "seconds": RING_SECONDS}
    with db.begin() as session:
        return [(row.id, row.queue) for row in session.execute(_RING, values)]


def add_checkpoint(
    db: Database, hold: Hold, step: int, path: str, n_bytes: int, digest: str | None
) -> None:
    values = {"step": step, "path": path, "n_bytes": n_bytes, "digest": digest}
    with db.begin() as session:
        session.execute(_CHECKPOINT, _hold(hold) | values)


def add_metrics(db: Database, hold: Hold, logged: Sequence[tuple[int, str, float]]) -> None:
    """(step, JSON, time) of each step. Steps that are there already stay as they are."""
    steps, metrics, times = zip(*logged, strict=True)
    values = {"steps": list(steps), "metrics": list(metrics), "times": list(times)}
    with db.begin() as session:
        session.execute(_LOG, _hold(hold) | values)


def undo_steps(db: Database, hold: Hold, step: int) -> None:
    """Forget the steps from `step` on, which the job makes anew.

    Older checkpoints stay, and those that the holder has written itself.
    """
    with db.begin() as session:
        for statement in _UNDO:
            session.execute(statement, _hold(hold) | {"step": step})


def find(session: Session, name: str) -> JobRow:
    """Raises InputError, naming the jobs that there are."""
    row = session.scalar(select(JobRow).where(JobRow.name == name))
    if row is None:
        newest = session.scalars(select(JobRow.name).order_by(JobRow.id.desc()).limit(10)).all()
        there = f"newest jobs: {', '.join(newest)}" if newest else "there is no job yet"
        raise InputError(f"there is no job named {name!r}", remedy=there)
    return row


def metrics(session: Session, job_id: int) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) in order of steps."""
    columns = (JobMetricRow.step, JobMetricRow.metrics)
    query = select(*columns).where(JobMetricRow.job_id == job_id).order_by(JobMetricRow.step)
    return [(step, values) for step, values in session.execute(query)]


def checkpoints(session: Session, job_id: int) -> list[JobCheckpointRow]:
    query = select(JobCheckpointRow).where(JobCheckpointRow.job_id == job_id)
    return list(session.scalars(query.order_by(JobCheckpointRow.step)))


def last_steps(session: Session, job_ids: Sequence[int]) -> dict[int, int]:
    """Newest step by job."""
    newest = func.max(JobMetricRow.step)
    query = select(JobMetricRow.job_id, newest).where(JobMetricRow.job_id.in_(job_ids))
    return {job: step for job, step in session.execute(query.group_by(JobMetricRow.job_id))}  # noqa: C416 (rows are no pairs to mypy)


def _hold(hold: Hold) -> dict[str, Any]:
    return {"id": hold.id, "token": hold.token}


def _tail(tail: Tail | None) -> dict[str, Any]:
    if tail is None:
        return {"log_tail": None, "log_bytes": None}
    return {"log_tail": clean(tail.text)[0], "log_bytes": tail.n_bytes}


def _lost(session: Session, hold: Hold) -> JobLost:
    row = session.get(JobRow, hold.id)
    now = "it is gone" if row is None else f"it is {row.state}, on {row.host}"
    return JobLost(f"job {hold.id} is no longer this process's: {now}")
