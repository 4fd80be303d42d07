"""The measured constants: each is a line of bench/results, named by its bench and its metric."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, slots=True)
class Line:
    """One result: `value` in the unit it was written in, `date` and `machine` of its header."""

    bench: str
    metric: str
    value: float
    unit: str
    date: str


SI = {"us": 1e-6, "ms": 1e-3, "ns": 1e-9, "s": 1.0, "bytes": 1.0, "bytes/trajectory": 1.0,
      "us/trajectory": 1e-6, "1/s": 1.0, "trajectories/s": 1.0, "": 1.0}  # fmt: skip

# field of Constants -> (bench, metric)
NAMES = {
    "call_cpu": ("service", "cpu per call at 256 in flight"),
    "one_process": ("scale", "whole service: trajectories at zero latency, one process"),
    "process_cpu": ("scale", "whole service: CPU of the process"),
    "worker_cpu": ("scale", "whole service: CPU of process, sandbox and grading"),
    "service_calls": ("scale", "whole service: calls per trajectory"),
    "service_server_cpu": ("scale", "whole service: server CPU"),
    "service_wal": ("scale", "whole service: WAL"),
    "connections": ("scale", "whole service: connections at most, one process"),
    "stored": ("store", "stored, all tables and indexes"),
    "lease_cpu": ("scale", "lease of one: server CPU"),
    "lease_wal": ("scale", "lease of one: WAL"),
    "complete_cpu": ("scale", "complete, one a transaction: server CPU"),
    "complete_wal": ("scale", "complete, one a transaction: WAL"),
    "batched_cpu": ("scale", "complete, 200 a transaction: server CPU"),
    "batched_wal": ("scale", "complete, 200 a transaction: WAL"),
    "beat_cpu": ("scale", "heartbeat: server CPU"),
    "beat_wal": ("scale", "heartbeat: WAL"),
    "keep_cpu": ("scale", "slot kept: server CPU"),
    "keep_wal": ("scale", "slot kept: WAL"),
    "look_cpu": ("scale", "look at the limits: server CPU"),
    "status_cpu": ("scale", "endpoint_status: server CPU"),
    "status_wal": ("scale", "endpoint_status: WAL"),
    "sweep_cpu": ("scale", "sweep: server CPU"),
    "ring_cpu": ("scale", "ring, nothing to ring: server CPU"),
    "commit": ("scale", "commit of one row"),
    "create": ("scale", "item created"),
    "create_wal": ("scale", "item created: WAL"),
    "item_stored": ("scale", "item stored, with indexes"),
    "scrape": ("scale", "scrape of all metrics, per trajectory"),
    "slowest": ("scale", "scrape's slowest query, per trajectory"),
    "add_up": ("scale", "limits added up, per trajectory"),
    "funnel": ("scale", "funnel at 1000000 items"),
    "dead": ("scale", "lease of 32: more for each item leased meanwhile"),
}
AT = 1_000_000  # items of `funnel`


@dataclass(frozen=True, slots=True)
class Constants:
    """Seconds and bytes. `beat_*` and `create*` are of one item, `funnel` of AT items."""

    call_cpu: float
    one_process: float
    process_cpu: float
    worker_cpu: float
    service_calls: float
    service_server_cpu: float
    service_wal: float
    connections: float
    stored: float
    lease_cpu: float
    lease_wal: float
    complete_cpu: float
    complete_wal: float
    batched_cpu: float
    batched_wal: float
    beat_cpu: float
    beat_wal: float
    keep_cpu: float
    keep_wal: float
    look_cpu: float
    status_cpu: float
    status_wal: float
    sweep_cpu: float
    ring_cpu: float
    commit: float
    create: float
    create_wal: float
    item_stored: float
    scrape: float
    slowest: float
    add_up: float
    funnel: float
    dead: float


@cache
def lines() -> dict[tuple[str, str], Line]:
    """The newest line of each metric whose value is a number."""
    found: dict[tuple[str, str], Line] = {}
    for file in sorted(RESULTS.glob("*-cpu.jsonl")):
        date = file.name[:10]
        for text in file.read_text().splitlines():
            row = json.loads(text)
            if isinstance(row.get("value"), int | float) and "metric" in row:
                key = (row["bench"], row["metric"])
                found[key] = Line(*key, float(row["value"]), row["unit"], date)
    return found


def measured() -> Constants:
    """Raises KeyError, naming the metric, where a line is missing."""
    there = lines()
    values = {}
    for name in (field.name for field in fields(Constants)):
        line = there[NAMES[name]]
        values[name] = line.value * SI[line.unit]
    return Constants(**values)
