"""How much of each resource a run takes, and which one it runs out of first.

A resource has a capacity a second, a part of it that is taken as soon as the hosts are there
(leases are extended, limits looked at, whether anything ends or not), and a price per trajectory.
The utilisation at X trajectories a second is (standing + X * price) / capacity; the X at which it
is 1 is the resource's limit, and the lowest limit is the bottleneck. This is the utilisation law
(Denning & Buzen 1978): it knows no queues. bench/scaling/simulation.py has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bench.scaling.constants import AT, Constants
from shared.work.slices import SliceSettings
from tirgen import live, metrics

# Seconds. A process tells of itself (live.SECONDS) and rings (celery_app.RING_SECONDS) as often as
# it extends its leases.
BEAT, SLICE = SliceSettings().heartbeat_seconds, SliceSettings().slice_seconds
LEASE, LOOK, SCRAPE = SliceSettings().lease_seconds, live.LOOK, metrics.EVERY
SCRAPE_LIMIT = float(metrics.STATEMENT_TIMEOUT.removesuffix("s"))
SLICE_STATEMENTS = 4  # transactions like `slot kept`: take, keep, finish, leave


@dataclass(frozen=True, slots=True)
class Workload:
    """Of one trajectory. What is not measured is assumed, and the reader's to change."""

    items: float = 1e8
    calls: float = 6.0  # to models
    tokens: float = 2000.0  # completion tokens, all calls together
    seconds: float = 60.0  # from lease to end, at servers that are not full
    batch: int = 1  # trajectories in a transaction; what the slices do is 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """`math.inf` where something is not to limit. Defaults: assumed, not measured."""

    hosts: int = 100
    cores: int = 64  # of each host
    processes: int = 8  # worker processes of each host
    in_flight: int = 32  # of each process
    endpoints: float = 100.0
    tokens_per_second: float = 5000.0  # of each endpoint, full
    database_cores: float = 16.0
    wal_bytes_per_second: float = 200e6  # of the log's disk
    max_connections: float = 2000.0
    disk: float = 8e12  # bytes
    messages_per_second: float = 1000.0  # of the broker; of pgmq, by one core
    limits: bool = False  # --max-tokens, --max-cost or --deadline is set
    scans: bool = True  # metrics are scraped


@dataclass(frozen=True, slots=True)
class Resource:
    """Units of `capacity` a second (cores, bytes a second, places); see the module's head."""

    name: str
    capacity: float
    standing: float
    price: float

    def utilisation(self, rate: float) -> float:
        return (self.standing + rate * self.price) / self.capacity

    @property
    def limit(self) -> float:
        """Trajectories a second at which it is full; 0 where the hosts alone fill it."""
        if math.isinf(self.capacity):
            return math.inf
        left = max(0.0, self.capacity - self.standing)
        return left / self.price if self.price else math.inf if left > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """`rate` in trajectories a second; utilisations by resource, at that rate."""

    rate: float
    bottleneck: str
    utilisation: dict[str, float]
    seconds: float  # for all items, at that rate


def worker_cpu(c: Constants, calls: float) -> float:
    """Seconds of a trajectory of so many calls: the measured one, and what its calls lack."""
    return c.worker_cpu + max(0.0, calls - c.service_calls) * c.call_cpu


def loop_cpu(c: Constants, calls: float) -> float:
    """The part of it that is the process' own: one thread, its event loop."""
    return c.process_cpu + max(0.0, calls - c.service_calls) * c.call_cpu


def server_price(c: Constants, work: Workload) -> tuple[float, float]:
    """CPU seconds and WAL bytes of the database for a trajectory: its lease, and its end."""
    if work.batch == 1:
        return c.lease_cpu + c.complete_cpu, c.lease_wal + c.complete_wal
    share = min(1.0, (work.batch - 1) / 199)  # of the way to the measured 200
    cpu = c.complete_cpu + share * (c.batched_cpu - c.complete_cpu)
    wal = c.complete_wal + share * (c.batched_wal - c.complete_wal)
    return c.lease_cpu / work.batch + cpu, c.lease_wal + wal


def standing(c: Constants, at: Cluster) -> tuple[float, float]:
    """CPU seconds and WAL bytes a second that the hosts cost the database without any result."""
    processes = at.hosts * at.processes
    held = processes * at.in_flight  # a slice tops up: all its places hold an item
    cpu = held * c.beat_cpu / BEAT
    cpu += processes * ((c.keep_cpu + c.status_cpu) / BEAT + c.look_cpu / LOOK)
    cpu += processes * SLICE_STATEMENTS * c.keep_cpu / SLICE
    cpu += at.hosts * (c.sweep_cpu + c.ring_cpu) / BEAT
    wal = held * c.beat_wal / BEAT + processes * (c.keep_wal + c.status_wal) / BEAT
    wal += processes * SLICE_STATEMENTS * c.keep_wal / SLICE
    return cpu, wal


def scanning(c: Constants, work: Workload, at: Cluster) -> float:
    """Cores that are busy with counting all items, at the end of the run."""
    busy = 1.0 if at.limits and c.add_up else 0.0  # one process at a time, tirgen/budgets.py
    if not at.scans:
        return busy
    return busy + min(1.0, c.scrape * work.items / SCRAPE)  # one at a time


def resources(c: Constants, work: Workload, at: Cluster) -> list[Resource]:
    cpu, wal = server_price(c, work)
    standing_cpu, standing_wal = standing(c, at)
    processes = at.hosts * at.processes
    return [
        Resource("models", at.endpoints * at.tokens_per_second, 0.0, work.tokens),
        Resource("worker CPU", at.hosts * at.cores, 0.0, worker_cpu(c, work.calls)),
        Resource("event loops", processes, 0.0, loop_cpu(c, work.calls)),
        Resource("places in flight", processes * at.in_flight, 0.0, work.seconds),
        Resource(
            "database CPU", at.database_cores, standing_cpu + scanning(c, work, at), cpu
        ),
        Resource("database log", at.wal_bytes_per_second, standing_wal, wal),
        Resource("broker", at.messages_per_second, processes / SLICE, 0.0),
        Resource("connections", at.max_connections, processes * c.connections + at.hosts, 0.0),
    ]  # fmt: skip


def outlook(c: Constants, work: Workload, at: Cluster, *, wall: bool = True) -> Outlook:
    """Without `wall`, as if who finds no connection got one: how far it then is from full."""
    all_of_them = resources(c, work, at)
    counted = [one for one in all_of_them if wall or one.name != "connections"]
    first = min(counted, key=lambda one: one.limit)
    rate = first.limit
    used = {
        one.name: 0.0 if math.isinf(one.capacity) else one.utilisation(rate)
        for one in all_of_them
    }  # fmt: skip
    return Outlook(rate, first.name, used, work.items / rate if rate else math.inf)


def order(c: Constants, work: Workload, at: Cluster) -> list[tuple[str, float]]:
    """Resources and the hosts at which each is full, if models are added with the hosts so that
    every host brings its share: what breaks first, second, and so on."""
    share = at.endpoints / at.hosts

    def full(name: str, hosts: int) -> bool:
        grown = replace(at, hosts=hosts, endpoints=share * hosts)
        rate = min(r.limit for r in resources(c, work, grown) if r.name in OF_THE_HOSTS)
        (one,) = (r for r in resources(c, work, grown) if r.name == name)
        return one.utilisation(rate) >= 1.0

    found = []
    for name in (r.name for r in resources(c, work, at) if r.name not in OF_THE_HOSTS):
        low, high = 0, 1 << 24
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if full(name, middle) else (middle, high)
        found.append((name, float(high) if high < 1 << 24 else math.inf))
    return sorted(found, key=lambda pair: pair[1])


OF_THE_HOSTS = ("models", "worker CPU", "event loops", "places in flight")  # grow with their number


@dataclass(frozen=True, slots=True)
class Amount:
    """What does not depend on the rate, of a whole run."""

    disk: float  # bytes: trajectories and items
    share_of_disk: float
    create_seconds: float  # of all items, in one transaction
    create_wal: float  # bytes
    scrape_seconds: float  # of one reading of all metrics at the end
    slowest_seconds: float  # of its slowest query
    items_at_scrape_limit: float  # trajectories at which that is cut off
    funnel_seconds: float  # `tirgen status`, `stats`
    open_transaction_seconds: float  # until such leases fill the database's cores


def amounts(c: Constants, work: Workload, at: Cluster) -> Amount:
    rate = outlook(c, work, at, wall=False).rate
    # The first lease of each slice begins at the queue's head, where that transaction keeps all
    # that was leased since: cores that are busy with it, for each second that it is open.
    growing = at.hosts * at.processes / SLICE * rate * c.dead
    disk = work.items * (c.stored + c.item_stored)
    return Amount(
        disk=disk,
        share_of_disk=disk / at.disk,
        create_seconds=work.items * c.create,
        create_wal=work.items * c.create_wal,
        scrape_seconds=c.scrape * work.items,
        slowest_seconds=c.slowest * work.items,
        items_at_scrape_limit=SCRAPE_LIMIT / c.slowest if c.slowest else math.inf,
        funnel_seconds=c.funnel * work.items / AT,
        open_transaction_seconds=at.database_cores / growing if growing else math.inf,
    )
