"""What Prometheus is told: each figure beside a count of its own, over HTTP as it is scraped."""

from __future__ import annotations

import json
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from shared.errors import ConfigError
from shared.store import Database, ItemState
from shared.store.queries import find_run, usage
from tests import stored
from tirgen import budgets, metrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(db: Database, every: float = 0.0) -> Samples:
    server, thread = metrics.serve(db, "127.0.0.1", 0, every)
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(url) as reply:
            said = reply.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(said)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_metrics_are_what_the_rows_say(db: Database) -> None:
    """Runs that ended long ago are not shown; what is counted adds up in two ways."""
    stored.fill(db)
    with db.begin() as session:
        old = "UPDATE runs SET finished_at = now() - interval '2 days' WHERE name = 'none'"
        session.execute(text(old))
        session.execute(text("UPDATE runs SET finished_at = now() WHERE name = 'one'"))
        session.execute(
            text("""UPDATE work_items SET state = 'leased', lease_owner = 'host:7:abcd',
            lease_until = now() - interval '100 s', updated_at = now() - interval '300 s'
            WHERE id = (SELECT max(id) FROM work_items)""")
        )
    got = scrape(db)
    items = {state: of(got, "tirgen_items", run="one", state=state) for state in ItemState}
    assert items == {**dict.fromkeys(ItemState, 0), "vetted": 12, "rejected": 8, "failed": 4}
    assert of(got, "tirgen_yield_ratio", run="one") == 0.5
    assert of(got, "tirgen_items_rejected", run="one", check="answer") == 8
    assert of(got, "tirgen_items_failed", run="one", error_class="timeout") == 4
    assert of(got, "tirgen_run_running", run="one", kind="generate") == 0
    assert of(got, "tirgen_run_running", run="two", kind="generate") == 1
    assert of(got, "tirgen_queue_items") == 1
    assert of(got, "tirgen_worker_in_flight", worker="host:7") == 1
    assert 300 <= of(got, "tirgen_oldest_lease_seconds", run="two") < 400
    assert of(got, "tirgen_oldest_lease_seconds", run="one") == 0
    assert 100 <= of(got, "tirgen_lease_overdue_seconds") < 200
    assert of(got, "tirgen_trajectories_total", run="one") == 20
    role = {"run": "one", "model": "nano", "endpoint": "http://127.0.0.1:1/v1"}
    for kind, each in (("prompt", 100), ("completion", 50)):
        tokens = of(got, "tirgen_tokens_total", role="reasoner", kind=kind, **role)
        assert tokens == each * 24, "failed attempts cost, too"
    assert of(got, "tirgen_requests_total", role="extractor", **role) == 3 * 24
    with db.session() as session:
        calls = "SELECT sum(n_calls), sum(n_failed_calls), sum(n_corrections) FROM trajectories \
            JOIN runs ON runs.id = run_id WHERE name = 'one'"
        n, failed, corrected = session.execute(text(calls)).one()
    by_outcome = {
        dict(labels)["outcome"]: value
        for (name, labels), value in got.items()
        if name == "tirgen_tool_calls_total" and ("run", "one") in labels
    }
    assert by_outcome["corrected"] == corrected
    assert by_outcome["model_error"] == failed > 0
    assert by_outcome["ok"] == n - failed
    assert not [labels for name, labels in got if ("run", "none") in labels]


def test_cost_and_servers_are_what_status_and_budgets_say(db: Database) -> None:
    """A verifier's tokens are priced as the judge's; a process that is gone is not shown."""
    stored.fill(db)
    prices = {"prompt_price": 3.0, "completion_price": 15.0}
    config = {"reasoner": {"endpoint": prices}, "judge": {"endpoint": {"prompt_price": 1.0}}}
    with db.begin() as session:
        update = "UPDATE runs SET finished_at = now(), config = :config WHERE name = 'one'"
        session.execute(text(update), {"config": json.dumps(config)})
        session.execute(text("UPDATE model_usage SET role = 'verifier' WHERE role = 'extractor'"))
        session.execute(
            text("""INSERT INTO endpoint_status SELECT 'host:' || n, 'reasoner', 'http://m/v1', 1,
            'm', 40, 30 + n, CASE n WHEN 1 THEN 'closed' ELSE 'open' END, 2, 100, 0.5,
            now() - (n - 1) * interval '1 minute' FROM generate_series(1, 2) AS n""")
        )
        session.execute(
            text("""INSERT INTO endpoint_status VALUES ('host:1', 'sandbox', 'its host', 1,
            'tier A', 2, 7, 'closed', 100, 0, 0.25, now())""")
        )
        run = find_run(session, "one")
        due = {one.role: budgets.cost(run.config, one) for one in usage(session, run.id)}
    assert due["reasoner"] > due["verifier"] > 0
    got = scrape(db)
    for role, cost in due.items():
        assert of(got, "tirgen_cost_total", run="one", role=role) == pytest.approx(cost)
    where = {"worker": "host:1", "roles": "reasoner", "endpoint": "http://m/v1", "model": "m"}
    assert of(got, "tirgen_endpoint_limit", **where) == 40
    assert of(got, "tirgen_endpoint_in_flight", **where) == 31
    assert of(got, "tirgen_endpoint_latency_seconds", **where) == 0.5
    assert of(got, "tirgen_endpoint_open", **where) == 0
    assert not [labels for _, labels in got if ("worker", "host:2") in labels]
    tool = {"worker": "host:1", "sandbox": "its host"}
    assert of(got, "tirgen_sandbox_places", **tool) == 2
    assert of(got, "tirgen_sandbox_waiting", **tool) == 5
    assert of(got, "tirgen_sandbox_latency_seconds", **tool) == 0.25
    limits = [labels for name, labels in got if name == "tirgen_endpoint_limit"]
    assert len(limits) == 1, "the sandbox is no endpoint"


def test_a_database_that_is_away_is_a_metric_not_an_error() -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/nowhere")
    got = scrape(away)
    assert of(got, "tirgen_database_up") == 0
    assert not [name for name, _ in got if name == "tirgen_queue_items"]


def test_scrapes_in_a_row_ask_the_database_once(db: Database) -> None:
    exporter = metrics.Exporter(db, every=1000.0)
    assert next(iter(exporter.collect())).samples[0].value == 1
    exporter.db = Database("postgresql://nobody@127.0.0.1:1/nowhere")
    assert next(iter(exporter.collect())).samples[0].value == 1, "from memory"
    exporter.every = 0.0
    assert next(iter(exporter.collect())).samples[0].value == 0, "control"


def test_a_port_that_is_taken_is_named(db: Database) -> None:
    server, thread = metrics.serve(db, "127.0.0.1", 0, 0)
    try:
        with pytest.raises(ConfigError, match="--port"):
            metrics.serve(db, "127.0.0.1", server.server_port, 0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
