"""A run of many items through many faults, and what must hold after each of them.

    python -m tests.acceptance.chaos.driver --broker pgmq --items 5000 --faults 100 --seed 1

Prints JSON lines: one a fault, and one of the whole. What must hold, at every moment:
- an item has a trajectory exactly where it is vetted or rejected, and never two;
- what was finished stays as it was; items in all states add up to the run's number of items;
- work that was done again is at most what was in flight in what was hit;
and in the end: every item but the poisoned ones is vetted or rejected, no process is left.
Exit code 1 where any of that was violated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import text

from shared.errors import TirgenError
from tests.acceptance.chaos.faults import FAULTS, Fault
from tests.acceptance.chaos.worker import IN_FLIGHT, POISON
from tests.acceptance.chaos.world import Worker, World

NAMESPACES = "unshare --user --map-root-user --mount --net --pid --fork --kill-child --mount-proc"
DISK = "size=768m"
LOOK, LOOK_FOR_ORPHANS = 0.3, 2.0  # seconds between two looks
PATIENCE = 20.0  # seconds that orphans have to notice that they are
REFUSED = re.compile(rb"the lease of a work item is lost")

CHECK = text("""
    WITH item AS (SELECT * FROM work_items WHERE run_id = :run),
        made AS (SELECT item_id, count(*) AS n FROM trajectories WHERE run_id = :run GROUP BY 1)
    SELECT (SELECT n_items FROM runs WHERE id = :run) AS n_items,
        (SELECT state FROM runs WHERE id = :run) AS state,
        count(*) AS items,
        count(*) FILTER (WHERE state IN ('vetted', 'rejected')) AS finished,
        count(*) FILTER (WHERE state = 'vetted') AS vetted,
        count(*) FILTER (WHERE state = 'failed') AS failed,
        count(*) FILTER (WHERE (state IN ('vetted', 'rejected')) <> (made.n IS NOT NULL)) AS wrong,
        count(*) FILTER (WHERE made.n > 1) AS doubled,
        coalesce(sum(attempt - CAST(state <> 'queued' AS int)), 0) AS again,
        coalesce(sum(failures), 0) AS failures, coalesce(sum(kills), 0) AS kills,
        -- one that is leased has killed already: its companions' leases may run out before its own
        coalesce(sum(kills + CAST(state = 'leased' AS int))
            FILTER (WHERE poisoned.key IS NOT NULL), 0) AS poison_kills,
        count(*) FILTER (WHERE state = 'failed' AND poisoned.key IS NULL) AS condemned,
        count(*) FILTER (WHERE poisoned.key IS NOT NULL) AS poisoned,
        (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()) AS connections
    FROM item LEFT JOIN made ON made.item_id = item.id
    LEFT JOIN problems AS poisoned ON poisoned.key = problem_key AND poisoned.text LIKE :poison
""")


class Chaos:
    def __init__(self, world: World, items: int, faults: int, seed: int, names: list[str]) -> None:
        self.world, self.items, self.n_faults, self.seed = world, items, faults, seed
        self.names = names
        self.rng = random.Random(seed)
        self.waiting: list[str] = []  # kinds whose turn is yet to come
        self.pending: list[Fault] = []
        self.injected: list[dict[str, Any]] = []
        self.violations: list[str] = []
        self.seen: dict[int, tuple[int, str]] = {}
        self.allowed = 0  # items that may have been worked on again
        self.exits = 0  # of workers that nobody told to
        self.orphans_since: float | None = None
        self.looked_at = 0.0
        self.connections = 0  # to the database, at most
        self.started = time.monotonic()

    def run(self, seconds: float) -> dict[str, Any]:
        self.world.start(self.items)
        self.started = time.monotonic()
        last = facts = None
        while time.monotonic() < self.started + seconds:
            time.sleep(LOOK)
            self._repair()
            self._supervise()
            facts = self._facts() or facts
            if facts is None:
                continue
            left = self.n_faults - len(self.injected)
            if facts["state"] == "done" and not self.pending and not left:
                break
            due = (len(self.injected) + 0.5) * self.items / (self.n_faults + 1)
            calm = last is None or time.monotonic() > last + 1.0
            if left and facts["finished"] >= due and calm and self._inject(facts):
                last = time.monotonic()
        else:
            self.violations.append(f"not done after {seconds:.0f} s: {facts}")
        return self._end()

    def _inject(self, before: dict[str, Any]) -> bool:
        busy = frozenset().union(*(fault.touches for fault in self.pending), frozenset())
        if not self.waiting:  # every kind once before any comes again
            self.waiting = self.rng.sample(self.names, len(self.names))
        for name in self.waiting:
            try:
                fault = FAULTS[name](self.world, self.rng, set(busy))
            except TirgenError:
                continue  # what it needs is away at this moment
            if fault is not None:
                break
        else:
            return False
        self.waiting.remove(name)
        self.pending.append(fault)
        self.allowed += fault.hit
        row = {"fault": fault.name, "target": fault.target, "at": round(self._now(), 1)}
        self.injected.append(row | {"finished": before["finished"], "again": before["again"]})
        print(json.dumps(self.injected[-1]), flush=True)
        return True

    def _repair(self) -> None:
        for fault in list(self.pending):
            if time.monotonic() < fault.due:
                continue
            try:
                fault.repair()
            except (TirgenError, subprocess.TimeoutExpired) as error:
                fault.due = time.monotonic() + 1.0
                print(f"{fault.name} is not repaired yet: {error}", file=sys.stderr, flush=True)
            except AssertionError as error:
                self.violations.append(f"{fault.name} of {fault.target}: {error}")
                self.pending.remove(fault)
            else:
                self.pending.remove(fault)

    def _supervise(self) -> None:
        """What systemd or Kubernetes does: a worker that has ended is started again."""
        touched = {name for fault in self.pending for name in fault.touches}
        for worker in self.world.workers:
            if worker.name not in touched and worker.process and worker.process.poll() is not None:
                self.exits += 1
                self.allowed += worker.capacity
                self.world.start_worker(worker)
        if time.monotonic() < self.looked_at + LOOK_FOR_ORPHANS:
            return
        self.looked_at = time.monotonic()
        if not self.world.orphans():
            self.orphans_since = None
        elif self.orphans_since is None:
            self.orphans_since = time.monotonic()
        elif time.monotonic() > self.orphans_since + PATIENCE and not touched:
            self.violations.append(f"orphans: {self.world.orphans()}")
            self.orphans_since = None

    def _facts(self) -> dict[str, Any] | None:
        """The check of this moment; None while the database is away."""
        world = self.world
        try:
            with world.db.session() as session:
                row = session.execute(CHECK, {"run": world.run_id, "poison": f"%{POISON}%"}).one()
                facts = dict(row._mapping)
                # Only those since the last look, and a few of the others.
                newest = max((id for id, _ in self.seen.values()), default=0)
                sample = self.rng.sample(sorted(self.seen), min(20, len(self.seen)))
                made = session.execute(
                    text("""SELECT item_id, id, content_hash FROM trajectories
                        WHERE run_id = :run AND (id > :newest OR item_id = ANY(:sample))"""),
                    {"run": world.run_id, "newest": newest - 500, "sample": sample},
                ).all()
        except TirgenError:
            return None
        self.connections = max(self.connections, facts.pop("connections"))
        for item, id, digest in made:
            if self.seen.setdefault(item, (id, digest)) != (id, digest):
                self.violations.append(f"the trajectory of item {item} has changed")
        if set(sample) - {item for item, _, _ in made}:
            self.violations.append("a finished trajectory is gone")
        again = facts["again"] - facts["failures"]
        allowed = self.allowed + facts["poison_kills"] * IN_FLIGHT
        wrong = {
            "items do not add up": facts["n_items"] != facts["items"],
            "state and trajectory disagree": facts["wrong"] > 0,
            "two trajectories of one item": facts["doubled"] > 0,
            "an innocent item failed": facts["condemned"] > 0,
            f"more was done again ({again}) than was in flight ({allowed})": again > allowed,
        }
        known = {violation.split(" (")[0] for violation in self.violations}
        self.violations += [
            w for w, holds in wrong.items() if holds and w.split(" (")[0] not in known
        ]
        return facts

    def _end(self) -> dict[str, Any]:
        world = self.world
        facts = self._facts()
        assert facts is not None, "the database is away"
        drained = world.stop()
        if facts["finished"] + facts["poisoned"] != facts["n_items"]:
            self.violations.append(f"items are missing: {facts}")
        logs = b"".join(file.read_bytes() for file in world.home.glob("w*.log"))
        summary = {
            "bench": "chaos", "broker": world.broker.name, "seed": self.seed,
            "items": self.items, "poisoned": facts["poisoned"], "faults": len(self.injected),
            "kinds": dict(Counter(row["fault"] for row in self.injected)),
            "vetted": facts["vetted"], "rejected": facts["finished"] - facts["vetted"],
            "failed": facts["failed"], "doubled": facts["doubled"],
            "lost": facts["n_items"] - facts["finished"] - facts["poisoned"],
            "done_again": facts["again"], "in_flight_when_hit": self.allowed,
            "connections": self.connections,
            "late_writes_refused": len(REFUSED.findall(logs)), "worker_exits": self.exits,
            "last_drain_seconds": round(drained, 1), "seconds": round(self._now(), 1),
            "violations": self.violations,
        }  # fmt: skip
        world.close()
        return summary

    def _now(self) -> float:
        return time.monotonic() - self.started


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--broker", default="pgmq", choices=["pgmq", "rabbitmq", "redis"])
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--kinds", default=",".join(FAULTS))
    parser.add_argument("--small", action="store_true", help="two processes, not four")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=530.0, help="then it is given up")
    parser.add_argument("--keep", type=Path, help="folder for the logs, where something is wrong")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if "CHAOS_INSIDE" not in os.environ:
        # The shell is process 1 of the namespace: it collects whatever loses its parent.
        inside = ["sh", "-c", '"$@" & wait $!', "sh", sys.executable, "-m", __spec__.name]
        os.environ["CHAOS_INSIDE"] = "1"
        command = [*NAMESPACES.split(), *inside, *sys.argv[1:]]
        os.execvp(command[0], command)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        home = Path(name)
        for disk in (home, home / "db"):  # the database has its own, which will be full
            disk.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", str(disk)], check=True)
        near = [Worker("w0", 1)] if asked.small else [Worker("w0", 2), Worker("w2", 1, clock=3600)]
        workers = [*near, Worker("w1", 1, far=True)]
        world = World(home, asked.broker, workers)
        chaos = Chaos(world, asked.items, asked.faults, asked.seed, asked.kinds.split(","))
        try:
            summary = chaos.run(asked.seconds)
        finally:
            if asked.keep:
                subprocess.run(["sh", "-c", f"cp {name}/*.log {name}/db/*.log {asked.keep}"])
            subprocess.run(["umount", "-l", str(home / "db"), name])
    print(json.dumps(summary))
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
