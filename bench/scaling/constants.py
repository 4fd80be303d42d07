"""The measured constants: each is a line of bench/results, named by its bench and its metric."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, slots=True)
class Line:
    """One result: `value` in the unit it was written in, `date` of its file."""

    bench: str
    metric: str
    value: float
    unit: str
    date: str


SI = {"us": 1e-6, "ms": 1e-3, "ns": 1e-9, "s": 1.0, "bytes": 1.0, "bytes/trajectory": 1.0,
      "us/trajectory": 1e-6, "1/s": 1.0, "trajectories/s": 1.0, "": 1.0}  # fmt: skip

AT = 1_000_000  # items of `funnel`


def _of(bench: str, metric: str) -> Any:
    """A field that is read from the newest line of this metric."""
    return field(metadata={"line": (bench, metric)})


@dataclass(frozen=True, slots=True)
class Constants:
    """Seconds and bytes. `beat_*` and `create*` are of one item, `funnel` of AT items."""

    call_cpu: float = _of("service", "cpu per call at 256 in flight")
    one_process: float = _of("scale", "whole service: trajectories at zero latency, one process")
    process_cpu: float = _of("scale", "whole service: CPU of the process")
    worker_cpu: float = _of("scale", "whole service: CPU of process, sandbox and grading")
    service_calls: float = _of("scale", "whole service: calls per trajectory")
    service_server_cpu: float = _of("scale", "whole service: server CPU")
    service_wal: float = _of("scale", "whole service: WAL")
    connections: float = _of("scale", "whole service: connections at most, one process")
    stored: float = _of("store", "stored, all tables and indexes")
    lease_cpu: float = _of("scale", "lease of one: server CPU")
    lease_wal: float = _of("scale", "lease of one: WAL")
    complete_cpu: float = _of("scale", "complete, one a transaction: server CPU")
    complete_wal: float = _of("scale", "complete, one a transaction: WAL")
    batched_cpu: float = _of("scale", "complete, 200 a transaction: server CPU")
    batched_wal: float = _of("scale", "complete, 200 a transaction: WAL")
    beat_cpu: float = _of("scale", "heartbeat: server CPU")
    beat_wal: float = _of("scale", "heartbeat: WAL")
    keep_cpu: float = _of("scale", "slot kept: server CPU")
    keep_wal: float = _of("scale", "slot kept: WAL")
    look_cpu: float = _of("scale", "look at the limits: server CPU")
    status_cpu: float = _of("scale", "endpoint_status: server CPU")
    status_wal: float = _of("scale", "endpoint_status: WAL")
    sweep_cpu: float = _of("scale", "sweep: server CPU")
    ring_cpu: float = _of("scale", "ring, nothing to ring: server CPU")
    commit: float = _of("scale", "commit of one row")
    create: float = _of("scale", "item created")
    create_wal: float = _of("scale", "item created: WAL")
    item_stored: float = _of("scale", "item stored, with indexes")
    scrape: float = _of("scale", "scrape of all metrics, per trajectory")
    slowest: float = _of("scale", "scrape's slowest query, per trajectory")
    add_up: float = _of("scale", "limits added up, per trajectory")
    funnel: float = _of("scale", "funnel at 1000000 items")
    dead: float = _of("scale", "lease of 32: more for each item leased meanwhile")


NAMES = {one.name: one.metadata["line"] for one in fields(Constants)}  # (bench, metric) of each


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
    for name, key in NAMES.items():
        line = there[key]
        values[name] = line.value * SI[line.unit]
    return Constants(**values)
