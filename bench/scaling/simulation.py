"""The same resources as bench/scaling/model.py, with queues, leases and hosts that die.

Every place of every process goes round for itself: an item's model calls (one hold of a place in
its host's share of the models' servers, gamma distributed), its CPU on the host, its lease and its
end in the database. The database is cores, then a log with one writer that flushes whatever has
gathered (group commit). Each process extends the leases of all its items every 5 seconds, in one
transaction that waits in the same queues; where that takes longer than a lease, everything the
process holds is lost and done again, which is what no utilisation can tell. A host that dies loses
what it holds, and does not come back.

Times are drawn from one seed. Left out: the network, vacuum, checkpoints, retries of models.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import simpy

from bench.scaling.constants import Constants
from bench.scaling.model import (
    BEAT,
    LEASE,
    LOOK,
    SLICE,
    SLICE_STATEMENTS,
    Cluster,
    Workload,
    scanning,
    server_price,
    worker_cpu,
)

Events = Generator[simpy.Event, Any, None]
LARGE = 1 << 30  # places of what is not to limit


@dataclass(frozen=True, slots=True)
class Observed:
    """Of the second half of the simulated time."""

    rate: float  # trajectories finished a second
    complete_mean: float  # seconds, from the end of the work to the end of the commit
    complete_p99: float
    database: float  # share of its cores that is busy
    lost: int  # items whose lease ran out while their worker lived
    died: int  # items that were in flight on hosts that died


@dataclass(slots=True)
class _Process:
    """One worker process. `epoch` grows when all that it holds is lost."""

    host: simpy.Resource
    models: simpy.Resource
    epoch: int = 0
    renewed: float = 0.0
    alive: bool = True


@dataclass(slots=True)
class _Log:
    """Group commit: who comes while the writer is at it waits for the next flush, with the rest."""

    env: simpy.Environment
    flush: float  # seconds
    bandwidth: float  # bytes a second
    waiting: list[tuple[simpy.Event, float]] = field(default_factory=list)
    called: simpy.Event | None = None

    def commit(self, size: float) -> simpy.Event:
        done = self.env.event()
        self.waiting.append((done, size))
        if self.called is not None:
            called, self.called = self.called, None
            called.succeed()
        return done

    def write(self) -> Events:
        while True:
            if not self.waiting:
                self.called = self.env.event()
                yield self.called
            batch, self.waiting = self.waiting, []
            size = sum(size for _, size in batch)
            yield self.env.timeout(self.flush + size / self.bandwidth)
            for done, _ in batch:
                done.succeed()


class Simulation:
    def __init__(
        self, c: Constants, work: Workload, at: Cluster, *, seed: int = 1, dying: float = 0.0
    ) -> None:
        """`dying`: share of the hosts that dies, at a moment of its own, in the simulated time."""
        self.c, self.work, self.at, self.draw, self.dying = c, work, at, Random(seed), dying
        self.env = env = simpy.Environment()
        # A full server has so many sequences that a trajectory takes `work.seconds`.
        share = at.endpoints / at.hosts
        self.sequences = _whole(share * at.tokens_per_second * work.seconds / work.tokens)
        self.cores = simpy.Resource(env, _whole(at.database_cores))
        self.log = _Log(env, c.commit if c.commit > 0 else 0.0, at.wal_bytes_per_second)
        self.price = server_price(c, work)
        self.worker = worker_cpu(c, work.calls)
        self.busy = 0.0
        self.finished: list[float] = []
        self.waits: list[tuple[float, float]] = []
        self.lost = self.died = 0

    def run(self, seconds: float) -> Observed:
        env, at = self.env, self.at
        env.process(self.log.write())
        share = scanning(self.c, self.work, at)
        while share > 0:
            env.process(self._scans(min(1.0, share)))
            share -= 1
        for number in range(at.hosts):
            host = simpy.Resource(env, _whole(at.cores))
            models = simpy.Resource(env, self.sequences)
            pool = [_Process(host, models) for _ in range(at.processes)]
            for process in pool:
                env.process(self._beats(process))
                for _ in range(at.in_flight):
                    env.process(self._place(process))
            if number < self.dying * at.hosts:
                env.process(self._dies(pool, self.draw.uniform(0, seconds / 2)))
        half = seconds / 2
        env.run(until=half)
        busy = self.busy
        env.run(until=seconds)
        late = sorted(wait for ended, wait in self.waits if ended >= half)
        return Observed(
            rate=sum(ended >= half for ended in self.finished) / half,
            complete_mean=sum(late) / len(late) if late else math.inf,
            complete_p99=late[int(0.99 * len(late))] if late else math.inf,
            database=(self.busy - busy) / half / self.cores.capacity,
            lost=self.lost,
            died=self.died,
        )

    def _use(self, resource: simpy.Resource, seconds: float) -> Events:
        with resource.request() as asked:
            yield asked
            yield self.env.timeout(seconds)

    def _transaction(self, cpu: float, wal: float) -> Events:
        """Exponential CPU, as statements differ; then the log."""
        spent = self.draw.expovariate(1 / cpu) if cpu else 0.0
        yield from self._use(self.cores, spent)
        self.busy += spent
        yield self.log.commit(wal)

    def _place(self, process: _Process) -> Events:
        env, draw = self.env, self.draw
        yield env.timeout(draw.uniform(0, self.work.seconds))
        while True:
            if not process.alive:
                return
            epoch = process.epoch
            took = draw.gammavariate(self.work.calls, self.work.seconds / self.work.calls)
            yield from self._use(process.models, took)
            yield from self._use(process.host, draw.expovariate(1 / self.worker))
            began = env.now
            yield from self._transaction(*self.price)
            if process.epoch != epoch or not process.alive:
                continue  # LeaseLost: the item is another's
            self.finished.append(env.now)
            self.waits.append((env.now, env.now - began))

    def _beats(self, process: _Process) -> Events:
        """Leases, slot, endpoint_status, looks at the limits, and the host's share of the rest."""
        c, at = self.c, self.at
        cpu = at.in_flight * c.beat_cpu + c.keep_cpu + c.status_cpu + c.look_cpu * BEAT / LOOK
        cpu += SLICE_STATEMENTS * c.keep_cpu * BEAT / SLICE
        cpu += (c.sweep_cpu + c.ring_cpu) / at.processes
        wal = at.in_flight * c.beat_wal + c.keep_wal + c.status_wal
        wal += SLICE_STATEMENTS * c.keep_wal * BEAT / SLICE
        yield self.env.timeout(self.draw.uniform(0, BEAT))
        process.renewed = self.env.now
        while process.alive:
            started = self.env.now
            yield from self._transaction(cpu, wal)
            if self.env.now - process.renewed > LEASE:
                process.epoch += 1
                self.lost += at.in_flight
            process.renewed = self.env.now
            yield self.env.timeout(max(0.0, started + BEAT - self.env.now))

    def _dies(self, pool: list[_Process], when: float) -> Events:
        yield self.env.timeout(when)
        for process in pool:
            process.alive = False
            self.died += self.at.in_flight

    def _scans(self, share: float) -> Events:
        """Who counts all items takes a core, for this share of every second."""
        while True:
            yield from self._use(self.cores, share)
            self.busy += share
            yield self.env.timeout(1.0 - share)


def _whole(n: float) -> int:
    return LARGE if n >= LARGE else max(1, round(n))


def simulate(
    c: Constants, work: Workload, at: Cluster, seconds: float, *, seed: int = 1, dying: float = 0.0
) -> Observed:
    return Simulation(c, work, at, seed=seed, dying=dying).run(seconds)
