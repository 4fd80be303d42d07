"""Celery: the broker's settings, publishing, and the worker. The broker only rings the bell.

Messages name a slot of a run (or a program's own kind of work) and nothing else, and are
acknowledged as work on it begins. Any of them may be lost or doubled: the ringer of any worker
replaces lost ones (shared/work/slots.py), and sweeps leases of the dead. Hence no result backend,
no late acknowledgement, no broker-side retries.

Brokers: PostgreSQL itself by default (kombu's pgmq: no server of its own), RabbitMQ or Redis by
TIRGEN_BROKER_URL.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import mmap
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psycopg
from celery import Celery, signals
from celery.exceptions import SecurityWarning
from celery.worker import state as worker_state
from kombu import pools
from kombu.exceptions import OperationalError
from pgmq.install import install_pgmq_from_sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import func, select

from shared.errors import BrokerError, ConfigError, DatabaseError
from shared.store.database import KEEPALIVE, Database
from shared.work import items, slots
from shared.work.slices import OpenHandler, RunInfo, SliceSettings, slice_in_process
from shared.work.slots import Bell

VISIBILITY_TIMEOUT = 600  # seconds; far above the time from delivery to acknowledgement
RING_SECONDS = 5.0
IDLE_TRANSACTION_SECONDS = 60.0  # a worker's last no time; those of a host that vanished end then
DRAIN_SECONDS = 30.0  # after the signal to stop: above SliceSettings.grace_seconds
IDLE_SECONDS = 10.0  # after the last slice has ended; an orderly shutdown takes less
PUBLISH_RETRIES: Mapping[str, float] = {
    "max_retries": 2,
    "interval_start": 0.2,
    "interval_step": 0.5,
    "interval_max": 1.0,
}
BROKERS = ("amqp", "amqps", "pyamqp", "redis", "rediss")
INSTALL_LOCK = 0x7469_7267_0002

log = logging.getLogger(__name__)

# Later, an interpreter that ends waits in vain for the threads of pgmq's clients: 5 s for each.
atexit.register(pools.reset)

# Shared with the pool's processes, which inherit it when they are forked. They get no signal when
# the worker is told to stop; they look at this byte.
_stopping = mmap.mmap(-1, 1)


def make_app(db: Database, environ: Mapping[str, str] = os.environ) -> Celery:
    """The Celery application of one process. Connects to nothing yet.

    Raises ConfigError for a broker that is not supported or whose client is not installed.
    """
    url, options = _broker(db, environ.get("TIRGEN_BROKER_URL"))
    app = Celery("tirgen", set_as_current=False)
    app.conf.update(
        broker_url=url,
        broker_transport_options=options,
        broker_connection_timeout=4,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=2,
        task_ignore_result=True,
        task_acks_late=False,
        # On a cluster of RabbitMQ the queue outlives the node that it was declared on.
        task_create_missing_queue_type="quorum"
        if url.startswith(("amqp", "pyamqp"))
        else "classic",
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_proc_alive_timeout=60.0,  # a busy machine may take long to fork and start
        worker_hijack_root_logger=False,
    )
    return app


def prepare_broker(db: Database, app: Celery) -> None:
    """Install what the default broker needs into the database; once, whoever comes first."""
    if not app.conf.broker_url.startswith("pgmq"):
        return
    with db.begin() as session:
        session.execute(select(func.pg_advisory_xact_lock(INSTALL_LOCK)))
        if session.scalar(select(func.to_regnamespace("pgmq"))) is None:
            # On a connection of its own, which pgmq wants; the lock is held until it is done.
            with psycopg.connect(db.conninfo) as connection:
                install_pgmq_from_sql(conn=connection)


def check_broker(app: Celery) -> None:
    """Raise BrokerError unless the broker answers, within seconds."""

    def connect() -> None:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)

    _within_broker(app, connect)


@dataclass(frozen=True, slots=True)
class Message:
    """What a worker of `queue` is asked to do."""

    task: str
    arguments: tuple[int, ...]
    queue: str


def publish(app: Celery, bells: Iterable[Bell]) -> None:
    """Send each bell to the queue of its kind. Raises BrokerError, after few and short retries."""
    send(
        app,
        (Message(task_name(b.kind), (b.run_id, b.slot, b.token), b.kind) for b in bells),
    )


def send(app: Celery, messages: Iterable[Message]) -> None:
    """Raises BrokerError, after few and short retries."""

    def deliver() -> None:
        for message in messages:
            app.send_task(
                message.task,
                args=list(message.arguments),
                queue=message.queue,
                retry=True,
                retry_policy=dict(PUBLISH_RETRIES),
            )

    _within_broker(app, deliver)


def task_name(kind: str) -> str:
    return f"{kind}.slice"


def register_slices(
    app: Celery,
    db: Database,
    kind: str,
    open_handler: OpenHandler,
    settings_of: Callable[[RunInfo], SliceSettings],
) -> None:
    """Make this application's workers able to work on runs of `kind`."""

    def slice_task(run_id: int, slot: int, token: int) -> None:
        bell = Bell(kind, run_id, slot, token)
        successor = slice_in_process(db, bell, open_handler, settings_of, stopping)
        if successor is not None:
            publish(app, [successor])

    app.task(slice_task, name=task_name(kind))


def stopping() -> bool:
    """Has the worker that this process belongs to been told to stop?"""
    return _stopping[0] != 0


Upkeep = Callable[[int], Iterable[Message]]


def run_worker(
    app: Celery,
    db: Database,
    queues: Sequence[str],
    concurrency: int,
    *,
    loglevel: str = "WARNING",
    upkeep: Upkeep = lambda idle: (),
    drain_seconds: float = DRAIN_SECONDS,
    events: bool = False,
) -> NoReturn:
    """Work on these queues with so many processes until SIGTERM or SIGINT, then end this process.

    On the first of these, slices stop leasing, finish or give back what they hold, and end; what
    has not ended after `drain_seconds` is killed. `upkeep` is called every few seconds with the
    number of idle processes, and returns what is to be sent. `events`: tell Flower and its like
    what happens, and answer their questions; a broker with fanout is needed.
    """
    _stopping[0] = 0
    db.end_idle_transactions(IDLE_TRANSACTION_SECONDS)
    warnings.simplefilter("ignore", SecurityWarning)  # of root and pickle; we accept JSON only
    app.conf.worker_enable_remote_control = events
    ringer = _Ringer(app, db, lambda: upkeep(concurrency - len(worker_state.active_requests)))

    def stop(**_: Any) -> None:
        _stopping[0] = 1
        threading.Thread(
            target=_see_to_the_end, args=(drain_seconds,), name="last-resort", daemon=True
        ).start()

    def ready(**_: Any) -> None:
        ringer.start()

    signals.worker_shutting_down.connect(stop, weak=False)
    signals.worker_ready.connect(ready, weak=False)
    worker = app.Worker(
        pool="prefork",
        concurrency=concurrency,
        queues=list(queues),
        loglevel=loglevel,
        quiet=True,
        hostname=f"{queues[0]}-{os.getpid()}@{socket.gethostname()}",
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=not events,
        task_events=events,
    )
    try:
        worker.start()
    finally:
        ringer.end()
        signals.worker_shutting_down.disconnect(stop)
        signals.worker_ready.disconnect(ready)
    # All work is done or given back; the pool's threads and the interpreter would take two seconds
    # to come apart.
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(worker.exitcode or 0))


def _see_to_the_end(drain_seconds: float) -> None:
    """End this process where Celery's own shutdown does not come to an end.

    It waits for ever where a process of the pool dies, or is just being forked, as the shutdown
    begins. Nothing is lost by ending: what is still leased is swept.
    """
    began = idle_since = time.monotonic()
    while time.monotonic() < began + drain_seconds:
        if worker_state.active_requests:
            idle_since = time.monotonic()
        elif time.monotonic() > idle_since + IDLE_SECONDS:
            break
        time.sleep(0.1)
    log.warning("the shutdown did not come to an end; the worker is ended now")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
    os._exit(0)


class _Ringer(threading.Thread):
    """In every worker: sweeps expired leases, and rings for runs that nobody works on."""

    def __init__(self, app: Celery, db: Database, upkeep: Callable[[], Iterable[Message]]) -> None:
        super().__init__(name="ringer", daemon=True)
        self.app, self.db, self.upkeep = app, db, upkeep
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            try:
                items.sweep(self.db)
                publish(self.app, slots.ring(self.db))
                send(self.app, self.upkeep())
            except (DatabaseError, BrokerError) as error:
                log.warning("%s", error)
            except Exception:  # without this thread nothing is recovered any more
                log.exception("the ringer goes on in spite of an error")
            self._end.wait(RING_SECONDS)

    def end(self) -> None:
        self._end.set()


def _broker(db: Database, given: str | None) -> tuple[str, dict[str, Any]]:
    """Broker URL and transport options: what each transport needs so that nothing hangs or waits.

    `max_retries` and the intervals bound kombu's own connecting, which else never gives up.
    """
    bounded = dict(PUBLISH_RETRIES)
    if not given:
        return "pgmq://localhost", bounded | {
            "conn_string": _pgmq_conninfo(db.conninfo),
            "init_extension": False,  # `prepare_broker` installs plain SQL, needing no extension
            "visibility_timeout": VISIBILITY_TIMEOUT,
            "use_notify": True,
            "notify_throttle_interval_ms": 0,
            "wait_time_seconds": 0,
            "pool_size": 2,
            "pool_timeout": 3,
        }
    scheme = given.split(":", 1)[0]
    if "://" not in given or scheme not in BROKERS:
        what = f"TIRGEN_BROKER_URL must begin with one of {', '.join(f'{b}://' for b in BROKERS)}"
        remedy = "name a RabbitMQ or Redis server, or leave it out to use the database"
        raise ConfigError(what, where="TIRGEN_BROKER_URL", remedy=remedy)
    if scheme.startswith("redis"):
        if importlib.util.find_spec("redis") is None:
            what = "the client for Redis is not installed"
            remedy = "pip install 'tirgen[redis]'"
            raise ConfigError(what, where="TIRGEN_BROKER_URL", remedy=remedy)
        return given, bounded | {
            "visibility_timeout": VISIBILITY_TIMEOUT,
            "unacked_restore_interval": 2,  # kombu's defaults look only every 100 s
            "unacked_restore_throttle": 1,
            "socket_connect_timeout": 4,
            "socket_keepalive": True,
        }
    return given, bounded | {"confirm_publish": True}


def _pgmq_conninfo(conninfo: str) -> str:
    """`conninfo` in the form that survives pgmq's handling.

    pgmq keeps five of its keys and pastes their values, unquoted, into a new string. So each value
    is escaped once more, and all other keys (sslmode, ...) travel behind the database's name.
    """
    options = {key: str(value) for key, value in conninfo_to_dict(conninfo).items()}
    quoted = {key: re.sub(r"([\\' ])", r"\\\1", value) for key, value in options.items()}
    kept = {key: quoted.pop(key) for key in ("host", "port", "user", "password") if key in quoted}
    database = quoted.pop("dbname", "")
    others = [f"{key}={value}" for key, value in quoted.items()]
    patience = [f"{key}={value}" for key, value in (KEEPALIVE | {"connect_timeout": 4}).items()]
    return make_conninfo(**kept, dbname=" ".join([database, *others, *patience]))


def _within_broker(app: Celery, action: Callable[[], object]) -> None:
    try:
        action()
    except (OperationalError, psycopg.Error, OSError) as error:
        raise BrokerError(
            f"the broker does not answer: {error or type(error).__name__}",
            where=_location(app),
            remedy="start it, or correct TIRGEN_BROKER_URL; `tirgen doctor` tells more",
        ) from error


def _location(app: Celery) -> str:
    """Where the broker is, without its password."""
    conninfo = app.conf.broker_transport_options.get("conn_string")
    if conninfo is None:
        return str(app.connection_for_write().as_uri())
    options = conninfo_to_dict(conninfo)
    return f"PostgreSQL at {options.get('host')}/{str(options['dbname']).split()[0]}"
