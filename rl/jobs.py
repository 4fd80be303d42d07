"""A trainer's record of itself: what it is, that it lives, how it ended, and whether it should.

    with open_job("sft", config, snapshot, out) as job:
        metrics = open_metrics(trackers, out, job, config=config)
        for step in steps:
            if job.cancelled:
                break

Rank 0 alone has a job. It is recorded in the database where there is one: as the job that
`tirgen-rl launch` made (TIRGEN_JOB), else as one of its own. Where there is none, nothing is
recorded and nothing else differs.

A thread sends heartbeats and learns from them whether somebody asked for the end. A trainer that
does not end within the grace it was given is killed by that thread, if need be: of a launched one
that is the launcher's business. A database that goes away ends no training.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select

from rl import job_rows
from rl.job_file import Host, Spec
from rl.job_rows import TERMINATED, Begun, Hold, JobLost, NewJob
from rl.logs import LOG, read_tail
from shared.errors import ConfigError, DatabaseError, TirgenError
from shared.store import migrate
from shared.store.database import Database, resolve_url, tirgen_home
from shared.store.embedded import EmbeddedPostgres
from shared.store.models import JobPlace, JobRow, JobState
from shared.store.snapshot_reader import Snapshot
from shared.trajectory import clean, content_hash
from shared.version import code_version

JOB = "TIRGEN_JOB"  # id:token, for a trainer that somebody launched

BEAT_SECONDS = 1.0
END_SECONDS = 30.0  # how long the end waits for a database that is away
LAUNCHER_SECONDS = 60.0  # beyond the grace: who launched the trainer should have killed it
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_CANCELLED = 128 + signal.SIGINT
TRACEBACK_CHARS = 20_000

log = logging.getLogger(__name__)


class Job:
    """A job that nobody records. `db` and `hold` are there where somebody does."""

    db: Database | None = None
    hold: Hold | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self._early = False

    @property
    def cancelled(self) -> bool:
        """Has somebody asked for the end? Cheap. Once told so, leaving the block is obeying."""
        return False

    def stopped(self) -> None:
        """The training ends early, in order, because a signal asked for it."""
        self._early = True

    @property
    def early(self) -> bool:
        return self._early

    def checkpoint(self, step: int, path: Path, digest: str | None = None) -> None:
        """Record that a checkpoint has been written."""


class RecordedJob(Job):
    def __init__(self, name: str, db: Database, hold: Hold, out: Path, launched: bool) -> None:
        super().__init__(name)
        self.db: Database = db
        self.hold: Hold = hold
        self.launched = launched
        self.heart = _Heart(self, out / LOG)

    @property
    def cancelled(self) -> bool:
        if self.heart.asked or self.heart.lost:
            self._early = True
            return True
        return False

    def checkpoint(self, step: int, path: Path, digest: str | None = None) -> None:
        files = path.rglob("*") if path.is_dir() else [path]
        n_bytes = sum(file.stat().st_size for file in files if file.is_file())
        try:
            job_rows.add_checkpoint(self.db, self.hold, step, str(path), n_bytes, digest)
        except DatabaseError as error:
            log.warning("the checkpoint of step %d is not recorded: %s", step, error.what)


@contextmanager
def open_job(
    command: str,
    config: Mapping[str, Any],
    snapshot: Snapshot | None,
    out: Path,
    *,
    name: str | None = None,
    resume: bool = False,
    world_size: int = 1,
    url: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Job]:
    """Rank 0's job while the block runs: launched, recorded, or neither. `url`: as for `Snapshot`.

    Leaving the block ends the job: done; failed, if it raises; cancelled, if it had been told so.
    What ended early leaves by SystemExit: 130 if it was cancelled, 143 if it was terminated.
    Raises ConfigError where another trainer works in `out`, JobLost where the launched job is no
    longer to be run, DatabaseError where the configured database cannot be used.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        db = database(url, environ)
        if db is None:
            log.warning("no database: the job is not recorded, metrics go to %s only", out)
            with _ended(Job(name or out.name)) as job:
                yield job
            return
        try:
            given = environ.get(JOB)
            if given is None:
                with record(
                    db, name, command, config, snapshot, out, resume=resume, world_size=world_size
                ) as job:
                    yield job
            else:
                with adopt(db, given, config, snapshot, out, world_size=world_size) as job:
                    yield job
        finally:
            db.close()


def database(url: str | None, environ: Mapping[str, str] = os.environ) -> Database | None:
    """The configured database, or the embedded one if it runs; None where there is neither.

    Raises DatabaseError where it cannot be used or has another schema.
    """
    embedded = EmbeddedPostgres(tirgen_home(environ))
    if not url and not environ.get("TIRGEN_DATABASE_URL") and not embedded.status().running:
        return None
    db = Database(url or resolve_url(environ))
    migrate.require_head(db)
    return db


@contextmanager
def record(
    db: Database,
    name: str | None,
    command: str,
    config: Mapping[str, Any],
    snapshot: Snapshot | None,
    out: Path,
    *,
    resume: bool = False,
    world_size: int = 1,
    arguments: Sequence[str] = tuple(sys.argv[1:]),
) -> Iterator[Job]:
    """A job that was started directly. With `resume` it is the one that worked in `out` before.

    Without a name it is called after `out`. Raises InputError if a given name is taken, or if the
    job to resume is done or still runs.
    """
    job_rows.sweep(db)
    name, job_id = _enter(db, name, command, out, resume, world_size, arguments)
    hold = job_rows.take(db, job_id, socket.gethostname(), os.getpid())
    if hold is None:
        raise JobLost(f"job {name!r} was taken by somebody else this moment")
    job_rows.begin(db, hold, _begun(config, snapshot, world_size))
    with _log_file(out), _living(RecordedJob(name, db, hold, out, launched=False)) as job:
        yield job


@contextmanager
def adopt(
    db: Database,
    given: str,
    config: Mapping[str, Any],
    snapshot: Snapshot | None,
    out: Path,
    *,
    world_size: int = 1,
) -> Iterator[Job]:
    """The job that was launched; `given` is what TIRGEN_JOB says.

    Raises JobLost where it is somebody else's by now, or cancelled; ConfigError where the snapshot
    is not the one that it was launched with.
    """
    job_id, _, token = given.partition(":")
    hold = Hold(int(job_id), int(token))
    with db.session() as session:
        row = session.get(JobRow, hold.id)
    if row is None:
        raise JobLost(f"there is no job {hold.id}", where=db.location)
    digest = snapshot.digest if snapshot else None
    if row.snapshot_digest not in (None, digest):
        raise ConfigError(
            f"snapshot {row.snapshot_name} is not the one that the job was launched with",
            where=f"job {row.name}",
            remedy="launch a new job for the new snapshot",
        )
    job_rows.begin(db, hold, _begun(config, snapshot, world_size))
    with _living(RecordedJob(row.name, db, hold, out, launched=True)) as job:
        yield job


def _enter(
    db: Database,
    name: str | None,
    command: str,
    out: Path,
    resume: bool,
    world_size: int,
    arguments: Sequence[str],
) -> tuple[str, int]:
    """Name and id of a queued row: the old one of this folder, or a new one."""
    with db.session() as session:
        before = session.scalar(
            select(JobRow).where(JobRow.out == str(out)).order_by(JobRow.id.desc()).limit(1)
        )
        names = set(session.scalars(select(JobRow.name)))
    if resume and before is not None:
        if _is_dead_here(before):
            job_rows.end(db, Hold(before.id, before.token), JobState.LOST, None, "it was killed")
        row = job_rows.reopen(db, before.name)
        return row.name, row.id
    free = name or next(n for n in _numbered(out.name) if n not in names)
    spec = Spec(
        place=JobPlace.LOCAL,
        python=sys.executable,
        program=("-m", "rl.cli"),
        arguments=tuple(a for a in arguments if a != "--resume"),
        out=str(out),
        cwd=str(Path.cwd()),
        hosts=(Host(processes=world_size),),
    )
    new = NewJob(
        name=free,
        command=command,
        place=JobPlace.LOCAL,
        spec=spec.model_dump(mode="json"),
        out=str(out),
        code_version=code_version(),
    )
    return free, job_rows.create(db, new)


def _is_dead_here(row: JobRow) -> bool:
    """Was the trainer of this folder, whose lock we hold, killed before it could say so?

    On this host nobody has to wait until it has been silent for long.
    """
    here = row.host == socket.gethostname() and row.state == JobState.RUNNING
    return here and row.pid is not None and not Path(f"/proc/{row.pid}").exists()


def _numbered(name: str) -> Iterator[str]:
    yield name
    n = 2
    while True:
        yield f"{name}-{n}"
        n += 1


def _begun(config: Mapping[str, Any], snapshot: Snapshot | None, world_size: int) -> Begun:
    plain = clean(config)[0]
    return Begun(
        host=socket.gethostname(),
        pid=os.getpid(),
        world_size=world_size,
        config=plain,
        config_digest=content_hash(plain)[:16],
        snapshot_name=snapshot.record.name if snapshot else None,
        snapshot_digest=snapshot.digest if snapshot else None,
    )


@contextmanager
def _living(job: RecordedJob) -> Iterator[Job]:
    job.heart.start()
    try:
        with _ended(job):
            yield job
    finally:
        job.heart.end()


@contextmanager
def _ended(job: Job) -> Iterator[Job]:
    """Record how the block ends, and leave with an exit status that tells it."""
    try:
        yield job
    except BaseException as error:
        _close(job, *_failure(error))
        raise
    if not job.early:
        _close(job, JobState.DONE)
        return
    asked = isinstance(job, RecordedJob) and (job.heart.asked or job.heart.lost)
    if asked:
        _close(job, JobState.CANCELLED)
    else:
        _close(job, JobState.FAILED, TERMINATED, "ended early by a signal, in order")
    raise SystemExit(EXIT_CANCELLED if asked else EXIT_TERMINATED)


def _failure(error: BaseException) -> tuple[JobState, str | None, str | None]:
    match error:
        case KeyboardInterrupt():
            return JobState.CANCELLED, None, None
        case SystemExit(code=0 | None):
            return JobState.DONE, None, None
        case TirgenError():
            return JobState.FAILED, type(error).__name__, str(error)
    told = "".join(traceback.format_exception(error))[-TRACEBACK_CHARS:]
    return JobState.FAILED, type(error).__name__, told


def _close(
    job: Job, state: JobState, error_class: str | None = None, error_text: str | None = None
) -> None:
    """Patiently: a database that restarts this moment must not leave a finished job running.

    Done is done. Of other ends a launched trainer says why; who launched it says when, once the
    last of its processes has ended.
    """
    if not isinstance(job, RecordedJob):
        return
    job.heart.end()
    tail = read_tail(job.heart.file)
    deadline = time.monotonic() + END_SECONDS
    while True:
        try:
            if state is JobState.DONE or not job.launched:
                job_rows.end(job.db, job.hold, state, error_class, error_text, tail)
            elif error_class is not None:
                job_rows.note(job.db, job.hold, error_class, error_text or "")
        except DatabaseError as error:
            if time.monotonic() > deadline:
                log.warning("that job %s is %s is not recorded: %s", job.name, state, error.what)
                return
            time.sleep(1.0)
        else:
            return


class _Heart(threading.Thread):
    """Beats until `end`. `asked`: somebody wants the end. `lost`: the job is another's."""

    def __init__(self, job: RecordedJob, file: Path) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.job, self.file = job, file
        self.asked = self.lost = False
        self._end = threading.Event()
        self._warned = False
        self._known: int | None = None

    def end(self) -> None:
        """Beat no more."""
        self._end.set()
        if self.is_alive():
            self.join(BEAT_SECONDS)

    def run(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                self._beat()
            except JobLost as error:
                log.error("%s: the training ends", error.what)  # noqa: TRY400 (no news in it)
                self.lost = True
                return
            except DatabaseError as error:
                if not self._warned:
                    log.warning("no heartbeat: %s", error.what)
                self._warned = True
            else:
                self._warned = False

    def _beat(self) -> None:
        tail = read_tail(self.file, self._known)
        order = job_rows.beat(self.job.db, self.job.hold, tail)
        self._known = tail.n_bytes if tail else self._known
        if order.over:
            raise JobLost(f"job {self.job.name!r} was ended by somebody else")
        if order.asked is None:
            return
        self.asked = True
        if order.asked > order.grace + LAUNCHER_SECONDS * self.job.launched:
            log.error("not ended within %.0f s of being asked to: killed", order.asked)
            for handler in logging.getLogger().handlers:
                handler.flush()
            job_rows.end(self.job.db, self.job.hold, JobState.CANCELLED)
            # The other ranks end with this one: torchrun sees to that.
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """One trainer works in a folder. The lock goes with its process, however that ends."""
    file = out / ".lock"
    with file.open("a+") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "another trainer is working in this folder",
                where=str(out),
                remedy="wait for it or cancel it (tirgen-rl jobs list), or name another --out",
            ) from error
        except OSError as error:
            log.warning("%s: this file system has no locks (%s)", file, error.strerror)
        yield


@contextmanager
def _log_file(out: Path) -> Iterator[None]:
    """What is logged goes to OUT/log.txt, too."""
    handler = logging.FileHandler(out / LOG, encoding="utf-8", errors="replace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
