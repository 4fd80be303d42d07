"""What goes wrong: each fault breaks something at once and returns how it comes right again.

A fault says what it touches (two that touch the same never overlap), and how many items were in
flight in what it hit: that many, at most, may be worked on once more.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from shared.store.trajectories import Completed, import_problems
from shared.trajectory import End, Trajectory
from shared.work import items, slots
from shared.work.celery_app import check_broker, publish
from shared.work.items import LeaseLost
from shared.work.slots import Bell
from tests.acceptance.chaos.worker import DRAIN, GRACE, LEASE, POISON
from tests.acceptance.chaos.world import RUN, Worker, World
from tests.processes import kill
from tirgen.runs import KIND

LONGER = LEASE + 2.0  # than any lease lasts


@dataclass
class Fault:
    """Broken at once. `repair` is called when `due`; where it raises, again a second later."""

    name: str
    target: str
    touches: frozenset[str]
    hit: int  # items that were in flight in what it hit, at most
    due: float
    repair: Callable[[], None]


Make = Callable[[World, random.Random, set[str]], Fault | None]


def _worker(world: World, rng: random.Random, busy: set[str]) -> Worker | None:
    free = [
        w for w in world.workers if w.name not in busy and w.process and w.process.poll() is None
    ]
    return rng.choice(free) if free else None


def _of_worker(
    name: str, breaks: Callable[[World, random.Random, Worker], None], pause: float
) -> Make:
    """A fault of one worker, which is started again after up to `pause` seconds."""

    def make(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
        worker = _worker(world, rng, busy)
        if worker is None:
            return None

        def again() -> None:
            assert worker.process is not None
            worker.process.wait(20)
            world.start_worker(worker)

        breaks(world, rng, worker)
        due = time.monotonic() + rng.uniform(0, pause)
        return Fault(name, worker.name, frozenset({worker.name}), worker.capacity, due, again)

    return make


def kill_main(world: World, rng: random.Random, worker: Worker) -> None:
    worker.root.kill()


def kill_family(world: World, rng: random.Random, worker: Worker) -> None:
    kill(*reversed(worker.family()))


def child(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """kill -9 of a process of the pool: Celery forks another."""
    worker = _worker(world, rng, busy)
    if worker is None or not (children := worker.root.children()):
        return None
    kill(rng.choice(children))
    due = time.monotonic() + 1.0
    hit = worker.capacity // worker.processes
    return Fault("child", worker.name, frozenset(), hit, due, lambda: None)


def zygote(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """kill -9 of a process of a sandbox: the run that it held is tried once more."""
    found = []
    for worker in world.workers:
        for process in worker.family()[1:]:
            with suppress(psutil.NoSuchProcess):
                if any("shared.sandbox" in word for word in process.cmdline()):
                    found.append((worker, process))
    if not found:
        return None
    worker, process = rng.choice(found)
    kill(process)
    return Fault("zygote", worker.name, frozenset(), 0, time.monotonic() + 0.5, lambda: None)


def database(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """kill -9 of the postmaster; somebody starts it again."""
    pid = world.postgres.status().pid
    if pid is None or "database" in busy:
        return None
    os.kill(pid, signal.SIGKILL)
    return _for_all("database", world, rng.uniform(0, 2.5), lambda: _start(world))


def broker(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """kill -9 of the broker. Of pgmq: of one backend, for which PostgreSQL ends all others."""
    if {"broker", "database"} & busy:
        return None
    if world.broker.process is None:
        pid = world.postgres.status().pid
        backends = psutil.Process(pid).children() if pid else []
        if not backends:
            return None
        kill(rng.choice(backends))
        return _for_all("broker", world, 1.0, lambda: _start(world), touches="database")
    world.broker.kill()

    def repair() -> None:
        if world.broker.process is None or world.broker.process.poll() is not None:
            world.broker.start()
        check_broker(world.app)

    return _for_all("broker", world, rng.uniform(0, 2), repair, touches="broker")


def endpoint(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """kill -9 of one of the model's servers, or of all: requests are sent again, to the other one
    if there is one."""
    if "endpoint" in busy:
        return None
    ports = rng.choice([[port] for port in world.endpoints] + [list(world.endpoints)])
    for port in ports:
        world.endpoints[port].kill()
        world.endpoints[port].wait()

    def repair() -> None:
        for port in ports:
            world.start_endpoint(port)

    due = time.monotonic() + rng.uniform(0, 2.5)
    target = "endpoint " + " and ".join(map(str, ports))
    return Fault("endpoint", target, frozenset({"endpoint"}), 0, due, repair)


def stop(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """SIGSTOP of a worker for longer than its leases last, and a late write of our own."""
    worker = _worker(world, rng, busy)
    if worker is None or "database" in busy:
        return None
    family = worker.family()
    held = items.lease(world.db, world.run_id, "ghost", 1, 1.0)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.suspend()

    def go_on() -> None:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        items.sweep(world.db)  # as workers do now and then: until then a late write is in time
        for item in held:
            late = Trajectory(item.problem.key, (), "late", End.ANSWERED, "0", False, 0, 1)
            try:
                items.complete(world.db, item, Completed(late, (), None, 0, "ghost", None, "x"))
            except LeaseLost:
                continue
            raise AssertionError("a late write went through")

    due = time.monotonic() + LONGER
    touched = frozenset({worker.name, "database"} if held else {worker.name})
    return Fault("stop", worker.name, touched, worker.capacity + len(held), due, go_on)


def partition(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """The far worker's packets vanish for longer than its leases last."""
    far = next((w for w in world.workers if w.far), None)
    if far is None or far.name in busy:
        return None
    world.cut()
    due = time.monotonic() + rng.uniform(0.5, 2) * LEASE
    return Fault("partition", far.name, frozenset({far.name}), far.capacity, due, world.mend)


def disk(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """The database's disk is full to the last byte for a few seconds."""
    if "database" in busy or world.postgres.status().pid is None:
        return None
    ballast = world.postgres.home / "ballast"
    _fill(ballast)

    def free() -> None:
        ballast.unlink(missing_ok=True)
        _start(world)

    return _for_all("disk", world, rng.uniform(2, 4), free)


def sigterm(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """An orderly stop, inside its deadline; the next process has a clock that is an hour off."""
    worker = _worker(world, rng, busy)
    if worker is None or "broker" in busy or "database" in busy:
        return None
    took = world.wind(worker, rng.choice([0.0, 3600.0, -3600.0]))
    assert took < DRAIN + GRACE, f"the shutdown took {took:.1f} s"
    target = f"{worker.name}, then {worker.clock:+.0f} s"
    due = time.monotonic()
    touched = frozenset({worker.name})
    return Fault(
        "sigterm", target, touched, worker.capacity, due, lambda: world.start_worker(worker)
    )


def poison(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """An item that kills whoever works on it joins the run."""
    if "database" in busy:
        return None
    bad = world.problem(rng.randrange(10**9), f" {POISON}")
    with world.db.begin() as session:
        import_problems(session, [bad])
        fingerprint = world.config().fingerprint
        items.create_items(session, world.run_id, [bad.key], 1, fingerprint)
    return Fault("poison", bad.text, frozenset(), 0, time.monotonic(), lambda: None)


def doubled(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """The message that is due, three times; the one that started each slice, again; and old ones.

    None has the token of a slice at work: no broker has such a message, and it would end the slice.
    """
    if {"broker", "database"} & busy:
        return None
    rung = slots.ring(world.db)
    with world.db.session() as session:
        rows = session.connection().exec_driver_sql(
            "SELECT slot, token FROM run_slots WHERE run_id = %s", (world.run_id,)
        )
        void = [Bell(KIND, world.run_id, slot, max(0, token - back)) for slot, token in rows
                for back in (1, 1, 2, 8)]  # fmt: skip
    bells = rung * 3 + void
    publish(world.app, bells)
    return Fault(
        "doubled", f"{len(bells)} messages", frozenset(), 0, time.monotonic(), lambda: None
    )


def lost(world: World, rng: random.Random, busy: set[str]) -> Fault | None:
    """Whatever message waits is gone."""
    if {"broker", "database"} & busy:
        return None
    world.broker.purge(world.app, KIND)
    return Fault("lost", RUN, frozenset(), 0, time.monotonic(), lambda: None)


FAULTS: dict[str, Make] = {
    "worker": _of_worker("worker", kill_main, 2.0),
    "family": _of_worker("family", kill_family, 2.0),
    "child": child,
    "zygote": zygote,
    "database": database,
    "broker": broker,
    "endpoint": endpoint,
    "stop": stop,
    "partition": partition,
    "disk": disk,
    "sigterm": sigterm,
    "poison": poison,
    "doubled": doubled,
    "lost": lost,
}


def _for_all(
    name: str, world: World, pause: float, repair: Callable[[], None], touches: str = "database"
) -> Fault:
    hit = sum(worker.capacity for worker in world.workers)
    return Fault(name, name, frozenset({touches}), hit, time.monotonic() + pause, repair)


def _start(world: World) -> None:
    world.postgres.start()


def _fill(file: Path) -> None:
    block = b"\0" * (1 << 20)
    with file.open("wb", buffering=0) as handle, suppress(OSError):
        while block:
            try:
                handle.write(block)
            except OSError:
                block = block[: len(block) // 2]
