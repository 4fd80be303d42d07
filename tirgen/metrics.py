"""What Prometheus asks for: the state of runs, workers and costs, read from the database.

One exporter serves a whole installation. Workers keep no counters of their own: nothing is lost
with one of them, and nothing has to be scraped where pods come and go. Counters are sums over rows
that go only with their run. Runs are shown while they run and for a day after their end.

A scrape is a few queries over these runs; it is answered from memory while the last answer is
younger than `every` seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from shared.errors import ConfigError, DatabaseError
from shared.optional import require
from shared.store.database import Database
from shared.store.models import ItemState
from tirgen.live import FRESH, SANDBOX

EVERY = 15.0  # seconds, Prometheus' usual interval
STATEMENT_TIMEOUT = "30s"  # a scrape must never become the load

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Family:
    """`query` gives one column for each label, then the value. `recent` is the runs shown."""

    name: str
    help: str
    labels: tuple[str, ...]
    query: str
    counter: bool = False


_FRESH = f"seen_at > clock_timestamp() - interval '{FRESH:.0f} seconds'"
_STATES = ", ".join(f"('{state}')" for state in ItemState)

FAMILIES = (
    Family(
        "tirgen_run_running",
        "1 while the run runs, 0 after its end.",
        ("run", "kind"),
        "SELECT name, recent.kind, CAST(state = 'running' AS int) FROM recent",
    ),
    Family(
        "tirgen_items",
        "Work items by state.",
        ("run", "state"),
        f"""SELECT recent.name, states.state, coalesce(n, 0)
            FROM recent CROSS JOIN (VALUES {_STATES}) AS states (state)
            LEFT JOIN (
                SELECT run_id, state, count(*) AS n FROM work_items
                WHERE run_id IN (SELECT id FROM recent) GROUP BY 1, 2
            ) AS items ON items.run_id = recent.id AND items.state = states.state""",
    ),
    Family(
        "tirgen_items_rejected",
        "Rejected items by the first check that they failed.",
        ("run", "check"),
        """SELECT name, reject_check, count(*) FROM recent JOIN work_items ON run_id = recent.id
            WHERE work_items.state = 'rejected' GROUP BY 1, 2""",
    ),
    Family(
        "tirgen_items_failed",
        "Failed items by error class.",
        ("run", "error_class"),
        """SELECT name, error_class, count(*) FROM recent JOIN work_items ON run_id = recent.id
            WHERE work_items.state = 'failed' GROUP BY 1, 2""",
    ),
    Family(
        "tirgen_yield_ratio",
        "Vetted items / items that came to an end by themselves.",
        ("run",),
        """SELECT name, CAST(count(*) FILTER (WHERE work_items.state = 'vetted') AS float8)
            / count(*) FROM recent JOIN work_items ON run_id = recent.id
            WHERE work_items.state IN ('vetted', 'rejected', 'failed') GROUP BY 1""",
    ),
    Family(
        "tirgen_item_retries",
        "Attempts at the run's items beyond the first of each, by reason.",
        ("run", "reason"),
        """SELECT name, reason, sum(n) FROM recent JOIN work_items ON run_id = recent.id
            CROSS JOIN LATERAL (VALUES ('failed', failures), ('killed', kills)) AS why (reason, n)
            GROUP BY 1, 2""",
    ),
    Family(
        "tirgen_queue_items",
        "Items of running runs that wait for a worker: what workers are scaled by.",
        (),
        """SELECT count(*) FROM work_items JOIN runs ON runs.id = run_id
            WHERE work_items.state = 'queued' AND runs.state = 'running'""",
    ),
    Family(
        "tirgen_oldest_lease_seconds",
        "How long ago the oldest lease began that is still held.",
        ("run",),
        """SELECT name, coalesce(extract(epoch FROM clock_timestamp() - min(updated_at)), 0)
            FROM recent LEFT JOIN work_items
            ON run_id = recent.id AND work_items.state = 'leased' GROUP BY 1""",
    ),
    Family(
        "tirgen_lease_overdue_seconds",
        "How long ago a lease ran out that nobody has swept; workers do it every few seconds.",
        (),
        """SELECT greatest(0, coalesce(extract(epoch FROM clock_timestamp() - min(lease_until)), 0))
            FROM work_items WHERE state = 'leased'""",
    ),
    Family(
        "tirgen_slots_alive",
        "Slots of the run in which a slice works, or for which a message is on its way.",
        ("run",),
        """SELECT name, count(*) FILTER (WHERE alive_until > clock_timestamp())
            FROM recent JOIN run_slots ON run_id = recent.id GROUP BY 1""",
    ),
    Family(
        "tirgen_worker_in_flight",
        "Items that a worker process holds; worker is host:pid.",
        ("worker",),
        """SELECT substring(lease_owner FROM '^(.*):[^:]*$'), count(*) FROM work_items
            WHERE state = 'leased' GROUP BY 1""",
    ),
    Family(
        "tirgen_trajectories_total",
        "Trajectories written.",
        ("run",),
        "SELECT name, count(*) FROM recent JOIN trajectories ON run_id = recent.id GROUP BY 1",
        counter=True,
    ),
    Family(
        "tirgen_trajectory_seconds_total",
        "Seconds from start to verdicts, summed over trajectories.",
        ("run",),
        "SELECT name, sum(duration) FROM recent JOIN trajectories ON run_id = recent.id GROUP BY 1",
        counter=True,
    ),
    Family(
        "tirgen_tool_calls_total",
        "Tool calls that stand, by outcome; what self-correction took back is `corrected`.",
        ("run", "outcome"),
        """SELECT name, outcome, count(*) FROM recent JOIN trajectories ON run_id = recent.id
            JOIN steps ON trajectory_id = trajectories.id WHERE has_call GROUP BY 1, 2
            UNION ALL SELECT name, 'corrected', sum(n_corrections)
            FROM recent JOIN trajectories ON run_id = recent.id GROUP BY 1""",
        counter=True,
    ),
    Family(
        "tirgen_tool_cpu_seconds_total",
        "CPU time of the sandbox's runs.",
        ("run",),
        """SELECT name, coalesce(sum(cpu_time), 0) FROM recent
            JOIN trajectories ON run_id = recent.id
            JOIN steps ON trajectory_id = trajectories.id WHERE has_call GROUP BY 1""",
        counter=True,
    ),
    Family(
        "tirgen_cost_total",
        "Tokens times the prices in the run's configuration.",
        ("run", "role"),
        """SELECT name, role, sum(
                prompt_tokens * coalesce(CAST(address ->> 'prompt_price' AS float8), 0)
                + completion_tokens * coalesce(CAST(address ->> 'completion_price' AS float8), 0)
            ) / 1e6 FROM recent JOIN runs USING (id, name) JOIN model_usage ON run_id = recent.id
            CROSS JOIN LATERAL (SELECT config #> ARRAY[
                CASE role WHEN 'verifier' THEN 'judge' ELSE role END, 'endpoint'
            ] AS address) AS addresses GROUP BY 1, 2""",
        counter=True,
    ),
    *(
        Family(
            f"tirgen_endpoint_{name}",
            help,
            ("worker", "roles", "endpoint", "model"),
            f"""SELECT owner, roles, base_url, model, {value} FROM endpoint_status
                WHERE roles <> '{SANDBOX}' AND {_FRESH}""",
        )
        for name, help, value in (
            ("limit", "Requests that admission allows at once, in one process.", "max_in_flight"),
            ("in_flight", "Requests in flight, of one process.", "in_flight"),
            ("latency_seconds", "Of a request lately.", "latency"),
            (
                "open",
                "1 while the circuit breaker lets nothing through.",
                "CAST(breaker <> 'closed' AS int)",
            ),
        )
    ),
    *(
        Family(
            f"tirgen_sandbox_{name}",
            help,
            ("worker", "sandbox"),
            f"""SELECT owner, base_url, {value} FROM endpoint_status
                WHERE roles = '{SANDBOX}' AND {_FRESH}""",
        )
        for name, help, value in (
            ("places", "Runs that can be under way at once, for one process.", "max_in_flight"),
            ("waiting", "Runs that wait for a place.", "greatest(0, in_flight - max_in_flight)"),
            ("latency_seconds", "Of a run lately, from asking to its result.", "latency"),
        )
    ),
    *(
        Family(
            f"tirgen_{name}_total",
            help,
            ("run", "role", "model", "endpoint", *labels),
            f"""SELECT name, role, model, endpoint, {"spent.kind," if labels else ""} sum(n)
                FROM recent JOIN model_usage ON run_id = recent.id
                CROSS JOIN LATERAL (VALUES {values}) AS spent (kind, n)
                GROUP BY 1, 2, 3, 4 {", 5" if labels else ""}""",
            counter=True,
        )
        for name, help, labels, values in (
            (
                "tokens",
                "Tokens, of failed attempts too.",
                ("kind",),
                "('prompt', prompt_tokens), ('completion', completion_tokens)",
            ),
            ("requests", "Requests to models.", (), "('', requests)"),
            ("request_retries", "Requests that were sent again.", (), "('', retries)"),
            (
                "request_seconds",
                "Seconds that requests took, retries and waits included.",
                (),
                "('', duration)",
            ),
        )
    ),
)

_RECENT = """WITH recent AS MATERIALIZED (SELECT id, name, kind, state FROM runs
    WHERE state = 'running' OR finished_at > clock_timestamp() - interval '1 day') """

Sample = tuple[tuple[str, ...], float]


def read(db: Database) -> dict[str, list[Sample]]:
    """Every family's samples, (labels, value) each. Raises DatabaseError."""
    found: dict[str, list[Sample]] = {}
    with db.session() as session:
        limit = text("SELECT set_config('statement_timeout', :limit, true)")
        session.execute(limit, {"limit": STATEMENT_TIMEOUT})
        for family in FAMILIES:
            rows = session.execute(text(_RECENT + family.query)).all()
            found[family.name] = [
                (tuple("" if label is None else str(label) for label in labels), float(value))
                for *labels, value in rows
            ]
    return found


class Exporter:
    """A collector of `prometheus_client`. While the database is away it says just that."""

    def __init__(self, db: Database, every: float = EVERY) -> None:
        self.db, self.every = db, every
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._samples: dict[str, list[Sample]] | None = None

    def collect(self) -> Iterator[Any]:
        core = require(
            "prometheus_client.core", need="the metrics' server", install="tirgen[metrics]"
        )
        with self._lock:
            if time.monotonic() >= self._read_at + self.every:
                started = time.monotonic()
                try:
                    self._samples = read(self.db)
                except DatabaseError as error:
                    log.warning("%s", error)
                    self._samples = None
                self._read_at = time.monotonic()
                self._took = self._read_at - started
            samples = self._samples
        up = int(samples is not None)
        yield core.GaugeMetricFamily("tirgen_database_up", "1 if it could be read.", value=up)
        yield core.GaugeMetricFamily(
            "tirgen_scrape_seconds", "What the last reading took.", value=self._took
        )
        if samples is None:
            return
        for family in FAMILIES:
            kind = core.CounterMetricFamily if family.counter else core.GaugeMetricFamily
            made = kind(family.name, family.help, labels=family.labels)
            for labels, value in samples[family.name]:
                made.add_metric(labels, value)
            yield made


def serve(db: Database, host: str, port: int, every: float) -> tuple[Any, threading.Thread]:
    """Answer at http://host:port/metrics; the server and its thread. Raises ConfigError."""
    client = require("prometheus_client", need="the metrics' server", install="tirgen[metrics]")
    registry = client.CollectorRegistry(auto_describe=False)
    registry.register(Exporter(db, every))
    try:
        server, thread = client.start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"no server can listen there: {error.strerror}",
            where=f"{host}:{port}",
            remedy="choose another --port, or stop what listens there",
        ) from error
    return server, thread
