"""What one trajectory, one lease and one heartbeat cost the database, measured on the code itself.

CPU of the server is that of all its processes (backends, WAL writer, checkpointer), from the
kernel's own clock of each, so that other work on the machine bends it little; WAL is the distance
between two positions of the log. Every part has an embedded server of its own.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import text

from bench.scaling.report import report
from bench.service import cpu, fake_model, start, work
from bench.store import POOL, examples, problem
from shared.store import Database, EmbeddedPostgres, migrate, upkeep
from shared.store.queries import find_run, funnel, usage
from shared.store.trajectories import import_problems
from shared.work import items, slots
from shared.work.celery_app import make_app, prepare_broker, publish
from shared.work.runs import create_run
from shared.work.slots import Bell
from tirgen import budgets, live, metrics

SIZES = (10_000, 100_000, 1_000_000)  # items of a run
PER_LEASE = 32  # SliceSettings.in_flight
ENDPOINT = "http://127.0.0.1:1/v1"  # nobody answers there, and nobody asks


@dataclass(frozen=True, slots=True)
class Server:
    """An embedded server that is looked at while it works."""

    db: Database
    pid: int  # of its first process

    def cpu(self) -> float:
        """Seconds of all its processes that live."""
        tasks = Path(f"/proc/{self.pid}/task/{self.pid}")
        spent = 0
        for child in (tasks / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError):
                spent += int(Path(f"/proc/{child}/schedstat").read_text().split()[0])
        return spent / 1e9

    def ask(self, query: str) -> int:
        with self.db.session() as session:
            return int(session.execute(text(query)).scalar_one())

    def wal(self) -> int:
        """Bytes since the cluster began."""
        return self.ask("SELECT pg_current_wal_insert_lsn() - '0/0'")

    def commits(self) -> int:
        query = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        self.ask("SELECT 1 FROM pg_stat_force_next_flush()")
        return self.ask(query)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call: seconds of the server's CPU, bytes of WAL, seconds on the wall."""

    cpu: float
    wal: float
    wall: float


@contextmanager
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as home:
        embedded = EmbeddedPostgres(Path(home))
        db = Database(embedded.start())
        try:
            migrate.upgrade(db)
            pid = embedded.status().pid
            assert pid is not None
            yield Server(db, pid)
        finally:
            db.close()
            embedded.stop()


def cost(on: Server, n: int, call: Callable[[], object]) -> Cost:
    """The mean of n calls, after one that is not counted."""
    call()
    cpu, wal, began = on.cpu(), on.wal(), time.perf_counter()
    for _ in range(n):
        call()
    wall = time.perf_counter() - began
    return Cost((on.cpu() - cpu) / n, (on.wal() - wal) / n, wall / n)


def tell(name: str, one: Cost, per: int = 1, **more: Any) -> None:
    """`per`: how many of what is named are in one call."""
    report(f"{name}: server CPU", 1e6 * one.cpu / per, "us", **more)
    report(f"{name}: WAL", one.wal / per, "bytes", **more)


def a_run(db: Database, samples: int = 1, n_slots: int = 8) -> int:
    """Items for POOL problems, so many samples each."""
    problems = [problem(i) for i in range(POOL)]
    with db.begin() as session:
        import_problems(session, problems)
        made = create_run(
            session, name=f"run{samples}", kind="generate", config={}, fingerprint="f" * 64,
            code_version="c",
        )  # fmt: skip
        items.create_items(session, made, [p.key for p in problems], samples, "f" * 64)
        slots.open_slots(session, made, n_slots)
    return made


def service(n: int = 200, in_flight: int = 32) -> None:
    """The whole service at models that take no time: what a trajectory really asks for."""
    with server() as on, fake_model() as url:
        most, done = [0], threading.Event()

        def watch() -> None:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tirgen'"
            while not done.wait(0.1):
                most[0] = max(most[0], on.ask(query) - 1)  # this one

        watcher = threading.Thread(target=watch)
        work(on.db, start(on.db, "warm", url, 32, in_flight), 0, in_flight)
        run_id = start(on.db, "measured", url, n, in_flight)
        before, spent, own = (on.cpu(), on.wal(), on.commits()), cpu(), time.process_time()
        began = time.monotonic()
        work(on.db, run_id, 0, in_flight)
        seconds, spent, own = time.monotonic() - began, cpu() - spent, time.process_time() - own
        after = (on.cpu(), on.wal(), on.commits())
        with on.db.session() as session:
            n = funnel(session, find_run(session, "measured").id).n_items
            calls = sum(one.requests for one in usage(session, run_id)) / n
        watcher.start()
        work(on.db, start(on.db, "watched", url, 64, in_flight), 0, in_flight)
        done.set()
        watcher.join()
    report("whole service: trajectories at zero latency, one process", n / seconds, "1/s", n=n)
    report("whole service: calls per trajectory", calls, "")
    report("whole service: CPU of the process", 1e3 * own / n, "ms")
    report("whole service: CPU of process, sandbox and grading", 1e3 * spent / n, "ms")
    report("whole service: server CPU", 1e3 * (after[0] - before[0]) / n, "ms")
    report("whole service: WAL", (after[1] - before[1]) / n, "bytes")
    report("whole service: transactions", (after[2] - before[2]) / n, "")
    report("whole service: connections at most, one process", most[0], "")


def database(n: int = 600) -> None:
    """The statements of a worker, one by one; bodies as in bench/store.py (15 KB)."""
    with server() as on:
        db, run_id = on.db, a_run(on.db, samples=10)
        made = {done.trajectory.problem_key: done for done in examples(POOL)}

        def lease() -> list[items.LeasedItem]:
            return items.lease(db, run_id, "o", PER_LEASE, 600.0)

        held: list[items.LeasedItem] = []
        tell("lease of 32", cost(on, n // PER_LEASE, lambda: held.extend(lease())), PER_LEASE)
        tell("lease of one", cost(on, n // 2, lambda: items.lease(db, run_id, "o", 1, 600.0)))
        waiting = iter(held)

        def complete() -> None:
            item = next(waiting)
            items.complete(db, item, made[item.problem.key])

        tell("complete, one a transaction", cost(on, n // 2, complete))
        batches = [items.lease(db, run_id, "o", 200, 600.0) for _ in range(4)]
        each = iter(batches)

        def complete_many() -> None:
            items.complete_many(db, [(item, made[item.problem.key]) for item in next(each)])

        tell("complete, 200 a transaction", cost(on, 3, complete_many), 200)
        beating = lease()
        beat = cost(on, n, lambda: items.heartbeat(db, beating, "o", 600.0))
        tell("heartbeat", beat, PER_LEASE)

        bell = slots.claim(db, run_id, 600.0)
        tell("slot kept", cost(on, n, lambda: slots.keep(db, bell, 600.0)))
        tell("look at the limits", cost(on, n, lambda: budgets.hold(db, run_id)))
        seen = [
            {
                "roles": "reasoner, extractor", "base_url": ENDPOINT, "model": "m",
                "max_in_flight": 32, "in_flight": 32, "breaker": "closed",
                "requests_per_second": 1.0, "tokens_per_second": 1.0, "latency": 1.0,
            }
        ]  # fmt: skip
        tell("endpoint_status", cost(on, n, lambda: live._tell(db, run_id, seen)))
        tell("sweep", cost(on, n, lambda: items.sweep(db)))
        slots.ring(db)
        tell("ring, nothing to ring", cost(on, n, lambda: slots.ring(db)))
        app = make_app(db, {})
        prepare_broker(db, app)
        message = Bell("generate", run_id, 0, 0)
        tell("message published by pgmq", cost(on, n // 4, lambda: publish(app, [message])))
        commit = cost(on, n, lambda: slots.keep(db, bell, 600.0)).wall
        report("commit of one row", 1e3 * commit, "ms")


_FILL = text("""
    INSERT INTO work_items
        (run_id, problem_key, sample_index, fingerprint, idempotency_key, state, attempt)
    SELECT :run_id, key, sample, :fingerprint, encode(sha256(convert_to(
            concat_ws('/', 'filled', key, sample), 'UTF8')), 'hex'),
        CASE WHEN sample % 2 = 0 THEN 'vetted' ELSE 'queued' END, 1 - sample % 2
    FROM problems CROSS JOIN generate_series(CAST(:first AS int), :last - 1) AS sample
""")


def growth(sizes: tuple[int, ...] = SIZES) -> None:
    """What depends on how many items a run has; half of them are finished."""
    with server() as on:
        db, there = on.db, 1
        run_id = a_run(db, samples=1, n_slots=400)
        for size in sizes:
            values = {"run_id": run_id, "first": there, "last": size // POOL}
            began, wal, spent = time.perf_counter(), on.wal(), on.cpu()
            with db.begin() as session:
                session.execute(_FILL, values | {"fingerprint": "f" * 64})
            took = time.perf_counter() - began
            new, there = size - there * POOL, size // POOL
            if size == sizes[-1]:
                report("item created", 1e6 * took / new, "us", n=new)
                report("item created: server CPU", 1e6 * (on.cpu() - spent) / new, "us")
                report("item created: WAL", (on.wal() - wal) / new, "bytes")
            upkeep.vacuum(db)
            _ask(on, run_id, size)
            if size == sizes[-1]:
                one = next(r for r in upkeep.sizes(db) if r.name == "work_items")
                report("item stored, with indexes", one.total_bytes / size, "bytes", n=size)
                _dead(on, run_id)


def _ask(on: Server, run_id: int, size: int) -> None:
    db = on.db

    def ring() -> None:
        with db.begin() as session:
            session.execute(text("UPDATE run_slots SET alive_until = '-infinity'"))
        slots.ring(db)

    def read() -> None:
        with db.session() as session:
            funnel(session, run_id)

    asked: dict[str, Callable[[], object]] = {
        "lease of 32": lambda: items.lease(db, run_id, "o", PER_LEASE, 600.0),
        "sweep": lambda: items.sweep(db),
        "ring of 400 slots": ring,
        "funnel": read,
    }
    for name, call in asked.items():
        took = _times(call)
        median = round(1e3 * statistics.median(took), 2)
        report(f"{name} at {size} items", 1e3 * min(took), "ms", median=median)


def _times(call: Callable[[], object], n: int = 4) -> list[float]:
    took = []
    for _ in range(n):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return took


def _dead(on: Server, run_id: int, rounds: int = 300) -> None:
    """A transaction that stays open (a back-up, a long export) keeps every row version that dies
    meanwhile; those of leased items lie before what is queued."""
    db = on.db
    with db.engine.connect() as reader:
        reader = reader.execution_options(isolation_level="REPEATABLE READ")
        reader.execute(text("SELECT count(*) FROM runs"))
        took = []
        for _ in range(rounds):
            began = time.perf_counter()
            items.lease(db, run_id, "o", PER_LEASE, 600.0)
            took.append(time.perf_counter() - began)
        first, last = min(took[1:20]), min(took[-20:])
        n = rounds * PER_LEASE
        more = {"first": round(1e3 * first, 2), "leased_meanwhile": n}
        report("lease of 32 behind an open transaction", 1e3 * last, "ms", **more)
        slope = (last - first) / n
        report("lease of 32: more for each item leased meanwhile", 1e9 * slope, "ns")


_TRAJECTORIES = text("""
    INSERT INTO trajectories (run_id, item_id, problem_key, content_hash, end_reason, vetted,
        thinking, seed, n_steps, n_calls, n_failed_calls, n_corrections, n_tokens, duration,
        imports, outcomes, error_types, sandbox_tier, reasoner_model, code_version, cleaned, body,
        body_bytes)
    SELECT run_id, id, problem_key, idempotency_key, 'answered', true, false, id, 2, 1, 0, 0, 300,
        1.0, '{math}', '{ok}', '{}', 'A', 'm', 'c', false, '\\x00', 15000
    FROM work_items WHERE state = 'vetted'
""")
_STEPS = text("""
    INSERT INTO steps (trajectory_id, position, has_call, outcome, duration, cpu_time, imports)
    SELECT id, position, position = 0, CASE position WHEN 0 THEN 'ok' END, 0.1, 0.01, '{math}'
    FROM trajectories CROSS JOIN generate_series(0, 1) AS position
""")
_USAGE = text("""
    INSERT INTO model_usage (run_id, item_id, attempt, role, model, endpoint, requests,
        prompt_tokens, completion_tokens, retries, duration)
    SELECT run_id, item_id, 1, role, 'm', 'http://x/v1', 3, 1500, 500, 0, 1.0
    FROM trajectories CROSS JOIN unnest(CAST('{reasoner, extractor}' AS text[])) AS role
""")


def finished(size: int = 100_000) -> None:
    """What is added up over all that is finished: a trajectory with two steps and the usage of two
    roles for half of the items; bodies, which lie elsewhere (TOAST), are left out."""
    with server() as on:
        db, run_id = on.db, a_run(on.db)
        with db.begin() as session:
            values = {"run_id": run_id, "first": 1, "last": size // POOL, "fingerprint": "f"}
            session.execute(_FILL, values)
            for statement in (_TRAJECTORIES, _STEPS, _USAGE):
                session.execute(statement)
        upkeep.vacuum(db)
        n = on.ask("SELECT count(*) FROM trajectories")
        took = _times(lambda: metrics.read(db))
        slowest = {
            family.name: min(_times(lambda f=family: _family(db, f)))  # type: ignore[misc]
            for family in metrics.FAMILIES
        }
        name = max(slowest, key=lambda family: slowest[family])
        report("scrape of all metrics, per trajectory", 1e6 * min(took) / n, "us", n=n)
        report("scrape's slowest query, per trajectory", 1e6 * slowest[name] / n, "us", of=name)

        def add_up() -> None:
            with db.session() as session:
                usage(session, run_id), funnel(session, run_id)

        report("limits added up, per trajectory", 1e6 * min(_times(add_up)) / n, "us", n=n)


def _family(db: Database, family: metrics.Family) -> None:
    with db.session() as session:
        session.execute(text(metrics._RECENT + family.query)).all()


def remedy(n: int = 300) -> None:
    """Heartbeats, if the time of a lease stood in no index: then they are HOT updates."""
    with server() as on:
        db, run_id = on.db, a_run(on.db, samples=10)
        with db.begin() as session:
            session.execute(text("DROP INDEX work_items_lease_idx"))
            made = "CREATE INDEX work_items_lease_idx ON work_items (id) WHERE state = 'leased'"
            session.execute(text(made))
        beating = items.lease(db, run_id, "o", PER_LEASE, 600.0)
        beat = cost(on, n, lambda: items.heartbeat(db, beating, "o", 600.0))
        tell("heartbeat, lease_until in no index", beat, PER_LEASE)
        items.lease(db, run_id, "o", 3200, 600.0)
        swept = cost(on, n // 10, lambda: items.sweep(db))
        tell("sweep, lease_until in no index, per leased item", swept, 3200 + PER_LEASE)


PARTS = {part.__name__: part for part in (service, database, growth, finished, remedy)}
