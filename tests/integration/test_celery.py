"""A real Celery worker on the default broker: what a stop and a kill cost, and what they do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from shared.errors import BrokerError, ConfigError
from shared.store import Database, EmbeddedPostgres, ItemState, RunState, migrate, queries
from shared.store.trajectories import import_problems
from shared.trajectory import Problem
from shared.work import items, slots
from shared.work.celery_app import (
    Message,
    _Ringer,
    check_broker,
    make_app,
    prepare_broker,
    publish,
)
from shared.work.runs import create_run
from shared.work.slots import Bell
from tests.processes import kill, kill_tree

PROGRAM = Path(__file__).with_name("worker_program.py")
ROOT = PROGRAM.parents[2]


class Worker:
    """A worker in a process of its own; its log is shown if a test fails."""

    def __init__(
        self,
        db: Database,
        processes: int = 1,
        in_flight: int = 4,
        slice_seconds: float = 60.0,
        grace_seconds: float = 20.0,
        drain_seconds: float = 30.0,
    ) -> None:
        url = db.url.render_as_string(hide_password=False)
        arguments = [processes, in_flight, slice_seconds, grace_seconds, drain_seconds]
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, arguments)],
            env={**os.environ, "TIRGEN_DATABASE_URL": url, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """The whole tree, at once."""
        if self.process.poll() is None:
            kill_tree(psutil.Process(self.process.pid))
            self.process.wait()


@pytest.fixture
def start_worker() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def start(db: Database, **options: float) -> Worker:
        started.append(Worker(db, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


def make_run(db: Database, texts: list[str], samples: int = 1, n_slots: int = 1) -> int:
    problems = [Problem(text, "0") for text in texts]
    with db.begin() as session:
        import_problems(session, problems)
        run_id = create_run(
            session, name="run", kind="generate", config={}, fingerprint="f", code_version="c"
        )
        items.create_items(session, run_id, [p.key for p in problems], samples, "f")
        slots.open_slots(session, run_id, n_slots)
    return run_id


def until(condition: Callable[[], bool], what: str, seconds: float = 45.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.05)


def funnel(db: Database, run_id: int) -> queries.Funnel:
    with db.session() as session:
        return queries.funnel(session, run_id)


def in_state(db: Database, run_id: int, state: ItemState, n: int) -> Callable[[], bool]:
    return lambda: funnel(db, run_id).items[state] == n


def assert_complete(db: Database, run_id: int, n: int) -> None:
    until(lambda: funnel(db, run_id).state is RunState.DONE, "the run is done")
    found = funnel(db, run_id)
    assert found.reconciles
    assert found.items[ItemState.VETTED] == n
    with db.session() as session:
        query = "SELECT count(*), count(DISTINCT item_id) FROM trajectories"
        assert tuple(session.execute(text(query)).one()) == (n, n)


def total(db: Database, column: str) -> int:
    with db.session() as session:
        return int(session.execute(text(f"SELECT sum({column}) FROM work_items")).scalar_one())


def test_slices_follow_one_another_until_the_run_is_done(
    db: Database, start_worker: Callable[..., Worker]
) -> None:
    """Slices of a tenth of a second in two processes: dozens of messages, each item once."""
    run_id = make_run(db, [f"{i}" for i in range(100)], samples=3, n_slots=2)
    worker = start_worker(db, processes=2, in_flight=2, slice_seconds=0.1)
    assert_complete(db, run_id, 300)
    assert total(db, "attempt") == 300
    assert worker.stop() == 0


def test_sigterm_lets_work_in_flight_finish(
    db: Database, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    """Four items end after the signal; those for which there is no time left are given back."""
    gate, never = tmp_path / "gate", tmp_path / "never"
    run_id = make_run(db, [f"{gate if i < 4 else never} {i}" for i in range(10)])
    worker = start_worker(db, grace_seconds=5.0)
    until(in_state(db, run_id, ItemState.LEASED, 4), "four items are in flight")
    worker.process.send_signal(signal.SIGTERM)
    gate.touch()
    assert worker.process.wait(40) == 0
    found = funnel(db, run_id)
    assert (found.items[ItemState.VETTED], found.items[ItemState.QUEUED]) == (4, 6)
    assert total(db, "kills") == total(db, "failures") == 0


def test_sigterm_gives_back_what_cannot_finish(
    db: Database, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run_id = make_run(db, [f"{gate} {i}" for i in range(6)])
    worker = start_worker(db, grace_seconds=0.5)
    until(in_state(db, run_id, ItemState.LEASED, 4), "four items are in flight")
    assert worker.stop() == 0
    assert funnel(db, run_id).items[ItemState.QUEUED] == 6
    assert total(db, "kills") == total(db, "failures") == 0
    gate.touch()
    start_worker(db)
    assert_complete(db, run_id, 6)


def test_a_worker_ends_inside_its_deadline_though_a_process_of_it_hangs(
    db: Database, start_worker: Callable[..., Worker]
) -> None:
    """One that hears no signal is killed, and its items are another worker's."""
    run_id = make_run(db, ["hang"])
    worker = start_worker(db, grace_seconds=0.1, drain_seconds=1.0)
    until(in_state(db, run_id, ItemState.LEASED, 1), "it hangs")
    family = [psutil.Process(worker.process.pid), *worker.children()]
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began >= 1.0, "control: it would not have ended by itself"
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert funnel(db, run_id).items[ItemState.LEASED] == 1
    until(lambda: items.sweep(db) == 1, "its lease has run out")
    assert funnel(db, run_id).items[ItemState.QUEUED] == 1


def test_sigterm_to_the_whole_process_group_loses_nothing(
    db: Database, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    """As systemd and terminals do it: the pool's processes get the signal, too."""
    gate = tmp_path / "gate"
    run_id = make_run(db, [f"{gate} {i}" for i in range(4)])
    worker = start_worker(db, grace_seconds=0.5)
    until(in_state(db, run_id, ItemState.LEASED, 4), "four items are in flight")
    os.killpg(worker.process.pid, signal.SIGTERM)
    worker.process.wait(40)
    assert funnel(db, run_id).items[ItemState.QUEUED] == 4
    assert total(db, "kills") == 0


def test_killed_worker_tree_costs_only_time(
    db: Database, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run_id = make_run(db, ["quick", *[f"{gate} {i}" for i in range(5)]])
    worker = start_worker(db)
    until(in_state(db, run_id, ItemState.VETTED, 1), "something is finished")
    until(in_state(db, run_id, ItemState.LEASED, 4), "four items are in flight")
    worker.kill()
    gate.touch()
    start_worker(db)
    assert_complete(db, run_id, 6)
    assert total(db, "kills") == 4
    assert total(db, "failures") == 0


def test_killed_pool_process_is_replaced_and_its_items_recovered(
    db: Database, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run_id = make_run(db, [f"{gate} {i}" for i in range(4)])
    worker = start_worker(db)
    until(in_state(db, run_id, ItemState.LEASED, 4), "four items are in flight")
    kill(*worker.children())
    gate.touch()
    assert_complete(db, run_id, 4)
    assert total(db, "kills") == 4
    assert worker.stop() == 0


def test_the_ringer_survives_what_nobody_thought_of(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what sweeps and rings: a worker without it would look healthy and recover nothing."""
    calls = threading.Semaphore(0)

    def upkeep() -> list[Message]:
        calls.release()
        raise KeyError("unforeseen")

    monkeypatch.setattr("shared.work.celery_app.RING_SECONDS", 0.01)
    app = make_app(db, {})
    prepare_broker(db, app)
    ringer = _Ringer(app, db, upkeep)
    ringer.start()
    try:
        assert all(calls.acquire(timeout=30) for _ in range(3))
    finally:
        ringer.end()
        ringer.join()


def test_cancel_reaches_a_worker_through_the_database(
    db: Database, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    run_id = make_run(db, [f"{tmp_path / 'never'} {i}" for i in range(4)])
    worker = start_worker(db)
    until(in_state(db, run_id, ItemState.LEASED, 4), "four items are in flight")
    assert items.cancel(db, run_id) == 4
    until(lambda: not leasing(db), "the slice has ended")
    assert worker.stop() == 0
    assert funnel(db, run_id).items[ItemState.CANCELLED] == 4


def test_killed_postgres_does_not_end_a_run(
    tmp_path: Path, start_worker: Callable[..., Worker]
) -> None:
    """The same worker goes on once somebody starts the server again. The home has a space."""
    server = EmbeddedPostgres(tmp_path / "tirgen's home")
    db = Database(server.start())
    try:
        migrate.upgrade(db)
        run_id = make_run(db, [f"{i}" for i in range(60)])
        worker = start_worker(db, in_flight=2, slice_seconds=1.0)
        until(lambda: funnel(db, run_id).items[ItemState.VETTED] > 5, "some items are vetted")
        pid = server.status().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        server.start()
        assert_complete(db, run_id, 60)
        assert worker.stop() == 0
    finally:
        db.close()
        server.stop()


def leasing(db: Database) -> bool:
    """Is a slice at work that would still extend its slot by two seconds?"""
    with db.session() as session:
        query = "SELECT count(*) FROM run_slots WHERE alive_until > clock_timestamp()"
        return bool(session.execute(text(query)).scalar_one())


# The broker's settings


def test_broker_that_is_down_is_named_without_its_password(db: Database) -> None:
    app = make_app(db, {"TIRGEN_BROKER_URL": "amqp://user:secret@127.0.0.1:1//"})
    for action in (
        lambda: publish(app, [Bell("generate", 1, 0, 1)]),
        lambda: check_broker(app),
    ):
        with pytest.raises(BrokerError) as caught:
            action()
        assert "127.0.0.1:1" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_default_broker_that_is_down_is_a_broker_error() -> None:
    app = make_app(Database("postgresql://user:secret@127.0.0.1:1/nowhere"), {})
    with pytest.raises(BrokerError) as caught:
        publish(app, [Bell("generate", 1, 0, 1)])
    assert "secret" not in str(caught.value)


def test_default_broker_answers_once_it_is_prepared(db: Database) -> None:
    app = make_app(db, {})
    with pytest.raises(BrokerError):
        check_broker(app)
    prepare_broker(db, app)
    prepare_broker(db, app)
    check_broker(app)


@pytest.mark.parametrize("url", ["sqs://x", "localhost", "filesystem://", "pgmq://h/d"])
def test_unsupported_broker_is_a_config_error(db: Database, url: str) -> None:
    with pytest.raises(ConfigError, match="TIRGEN_BROKER_URL"):
        make_app(db, {"TIRGEN_BROKER_URL": url})


@pytest.mark.parametrize(
    ("url", "kind"), [("amqp://localhost//", {"x-queue-type": "quorum"}), (None, None)]
)
def test_rabbitmq_gets_queues_that_outlive_a_node(
    db: Database, url: str | None, kind: dict[str, str] | None
) -> None:
    app = make_app(db, {"TIRGEN_BROKER_URL": url} if url else {})
    assert app.amqp.queues["generate"].queue_arguments == kind


def test_redis_gets_settings_under_which_it_redelivers(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"TIRGEN_BROKER_URL": "redis://localhost/0"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        make_app(db, environment)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    options = make_app(db, environment).conf.broker_transport_options
    assert options["unacked_restore_interval"] * options["unacked_restore_throttle"] <= 5
