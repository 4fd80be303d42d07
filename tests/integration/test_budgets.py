"""Claims of tirgen/budgets.py and live.py: a run stops at its limit, says why, and can go on.

Slices run in this process on a real database; a handler reports what a model would have cost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import typer
from sqlalchemy import text
from typer.testing import CliRunner

from shared.endpoints import Endpoint, EndpointConfig, Sampling
from shared.errors import ConfigError
from shared.store import Completed, Database, ItemState, RoleUsage, RunState, queries
from shared.store.models import RunRow
from shared.store.queries import UsageTotal
from shared.store.trajectories import import_problems
from shared.trajectory import End, Problem, Trajectory
from shared.work import items, slots
from shared.work.items import Failed, LeasedItem
from shared.work.runs import create_run
from shared.work.slices import Handler, RunInfo, SliceSettings, run_slice
from shared.work.slots import Bell
from tests.fake_endpoint import FakeEndpoint, chat, sequence
from tests.scripted import ScriptedSandbox
from tirgen import budgets, live
from tirgen.cli import runs as run_commands
from tirgen.config import Limits, load, override

IN_FLIGHT, ITEMS, TOKENS = 4, 60, 100
SETTINGS = SliceSettings(in_flight=IN_FLIGHT, heartbeat_seconds=0.2)
PRICES = {"prompt_price": 2.0, "completion_price": 10.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SECONDS", 0.01)
    monkeypatch.setattr(live, "LOOK", 0.01)
    monkeypatch.setattr(live, "SHARE", 1.0)


def make_run(db: Database, limits: dict[str, Any], samples: int = ITEMS) -> int:
    config = {
        "limits": limits,
        "reasoner": {"endpoint": PRICES},
        "extractor": {"endpoint": {"prompt_price": 0.0, "completion_price": 1.0}},
    }
    problem = Problem("1 + 1?", "2")
    with db.begin() as session:
        import_problems(session, [problem])
        run_id = create_run(
            session, name="run", kind="generate", config=config, fingerprint="f", code_version="c"
        )
        items.create_items(session, run_id, [problem.key], samples, "f")
        slots.open_slots(session, run_id, 1)
    return run_id


def usage(role: str, prompt: int, completion: int) -> RoleUsage:
    return RoleUsage(role, "m", "http://x/v1", 1, prompt, completion, 0, 0.1)


async def succeed(item: LeasedItem) -> Completed | Failed:
    """80 + 20 tokens of the reasoner; takes a while, so that the watcher can look."""
    await asyncio.sleep(0.02)
    made = Trajectory(item.problem.key, (), "", End.ANSWERED, "2", False, item.sample_index, 1)
    used = (usage("reasoner", 80, 20),)
    return Completed(made, (), None, 0.0, "m", None, "test", used)


def work(db: Database, handler: Handler = succeed) -> None:
    """Slices, until no worker would be called any more."""

    @asynccontextmanager
    async def opened(run: RunInfo) -> AsyncIterator[Handler]:
        async with live.watched(db, run.id, {}, live.Tool(ScriptedSandbox(), None)):
            yield handler

    bells = slots.ring(db)
    while bells:
        following: Bell | None = bells.pop()
        while following is not None:
            following = asyncio.run(
                run_slice(db, following, opened, lambda _: SETTINGS, lambda: False)
            )
        bells = slots.ring(db)


def limit(db: Database, run_id: int, **limits: Any) -> None:
    with db.begin() as session:
        run = session.get_one(RunRow, run_id)
        run.config = {**run.config, "limits": limits}


def now_of(db: Database, run_id: int) -> queries.Funnel:
    with db.session() as session:
        return queries.funnel(session, run_id)


def tokens(db: Database, run_id: int) -> int:
    with db.session() as session:
        return sum(u.prompt_tokens + u.completion_tokens for u in queries.usage(session, run_id))


# -- stopping --------------------------------------------------------------------------------------


def test_a_run_stops_at_its_tokens_and_goes_on_with_more(db: Database) -> None:
    """Of 60 items at 100 tokens, 3 000 tokens are spent, give or take what is in flight; nothing is
    left open, and the reason stands. With more allowed every item ends with one trajectory."""
    run_id = make_run(db, {"max_tokens": 3000})
    work(db)
    stopped = now_of(db, run_id)
    assert stopped.state is RunState.CANCELLED
    assert (stopped.stop_reason or "").startswith("max_tokens: ")
    assert abs(tokens(db, run_id) - 3000) <= 2 * IN_FLIGHT * TOKENS
    assert stopped.n_open == 0
    assert stopped.items[ItemState.VETTED] + stopped.items[ItemState.CANCELLED] == ITEMS

    limit(db, run_id, max_tokens=tokens(db, run_id))
    with pytest.raises(ConfigError, match="limit already") as caught:
        budgets.require_room(db, run_id)
    assert "--max-tokens" in (caught.value.remedy or "")

    limit(db, run_id, max_tokens=10**9)
    budgets.require_room(db, run_id)
    items.reopen(db, run_id)
    assert now_of(db, run_id).stop_reason is None
    work(db)
    done = now_of(db, run_id)
    assert (done.state, done.items[ItemState.VETTED]) == (RunState.DONE, ITEMS)
    with db.session() as session:
        per_item = "SELECT max(n) FROM (SELECT count(*) n FROM trajectories GROUP BY item_id) t"
        assert session.scalar(text(per_item)) == 1
    assert tokens(db, run_id) == ITEMS * TOKENS


def test_the_control_without_a_limit_the_run_ends_by_itself(db: Database) -> None:
    run_id = make_run(db, {})
    work(db)
    done = now_of(db, run_id)
    assert (done.state, done.stop_reason, done.items[ItemState.VETTED]) == ("done", None, ITEMS)


def test_a_run_stops_at_its_cost(db: Database) -> None:
    """80 prompt tokens at 2 and 20 completion tokens at 10 per million: 0.00036 an item."""
    run_id = make_run(db, {"max_cost": 30 * 0.00036})
    work(db)
    stopped = now_of(db, run_id)
    assert (stopped.stop_reason or "").startswith("max_cost: ")
    assert abs(stopped.items[ItemState.VETTED] - 30) <= 2 * IN_FLIGHT


def test_a_run_stops_at_its_deadline_by_the_clock_of_the_database(db: Database) -> None:
    """A deadline that has passed: not one item is begun; and it can be resumed with a later one."""
    past = datetime.now(UTC) - timedelta(seconds=1)
    run_id = make_run(db, {"deadline": past.isoformat()})
    work(db)
    stopped = now_of(db, run_id)
    assert (stopped.stop_reason or "").startswith("deadline: ")
    assert stopped.items[ItemState.CANCELLED] == ITEMS
    limit(db, run_id, deadline=(past + timedelta(hours=1)).isoformat())
    items.reopen(db, run_id)
    work(db)
    assert now_of(db, run_id).state is RunState.DONE


def test_what_fails_after_the_stop_waits_for_resume_too(db: Database) -> None:
    """Items in flight fail and would be tried again: they are cancelled, and the run ends."""

    async def fail(item: LeasedItem) -> Completed | Failed:
        await asyncio.sleep(0.02)
        return Failed("server_error", "no", True, None, (usage("reasoner", 80, 20),))

    run_id = make_run(db, {"max_tokens": 1000})
    work(db, fail)
    stopped = now_of(db, run_id)
    assert (stopped.state, stopped.n_open) == (RunState.CANCELLED, 0)
    assert stopped.items[ItemState.CANCELLED] > 0


def test_a_limit_that_is_reached_with_the_last_items_is_no_stop(db: Database) -> None:
    """Everything was generated: the run is done, whatever it cost."""
    run_id = make_run(db, {"max_tokens": 350}, samples=IN_FLIGHT)
    work(db)
    assert now_of(db, run_id).state is RunState.DONE


def test_cancel_is_a_stop_without_a_reason(db: Database) -> None:
    run_id = make_run(db, {})
    items.stop(db, run_id, "max_tokens: 1 of 1 tokens")
    items.reopen(db, run_id)
    items.cancel(db, run_id)
    assert now_of(db, run_id).stop_reason is None
    assert items.stop(db, run_id, "late") == 0
    assert now_of(db, run_id).stop_reason is None


# -- money -----------------------------------------------------------------------------------------


def test_cost_is_by_the_prices_of_each_role() -> None:
    """By hand: reasoner 1 M x 2 + 0.5 M x 10, extractor 1 M x 1, and a role without prices."""
    roles = {"reasoner": PRICES, "extractor": {"completion_price": 1.0}}
    config = {name: {"endpoint": prices} for name, prices in roles.items()} | {"judge": None}

    def used(role: str, prompt: int, completion: int) -> UsageTotal:
        return UsageTotal(role, "m", "x", 1, prompt, completion, 0, 0.0)

    assert budgets.cost(config, used("reasoner", 10**6, 500_000)) == pytest.approx(7.0)
    assert budgets.cost(config, used("extractor", 10**6, 10**6)) == pytest.approx(1.0)
    assert budgets.cost(config, used("verifier", 10**6, 10**6)) == 0.0
    assert budgets.cost({}, used("reasoner", 10**6, 0)) == 0.0


def test_the_projected_total_is_the_mean_of_what_is_finished_times_all_items(db: Database) -> None:
    run_id = make_run(db, {"max_tokens": 3000})
    work(db)
    with db.session() as session:
        config = session.get_one(RunRow, run_id).config
        so_far = budgets.spent(
            config, queries.usage(session, run_id), queries.funnel(session, run_id)
        )
    assert so_far.projected() == (
        pytest.approx(ITEMS * TOKENS), pytest.approx(ITEMS * 0.00036),
    )  # fmt: skip
    assert "of ~6k tokens, cost " in budgets.brief(so_far)
    assert budgets.brief(so_far).endswith("of ~0.0216")


def test_a_limit_of_cost_needs_prices_and_limits_are_no_identity() -> None:
    url = "http://127.0.0.1:1/v1"
    plain = load(base_url=url)
    with pytest.raises(ConfigError, match="needs prices"):
        override(plain, settings=["limits.max_cost=5"])
    priced = override(
        plain, settings=["limits.max_cost=5", "reasoner.endpoint.completion_price=1.5"]
    )
    assert priced.fingerprint == plain.fingerprint
    assert priced.limits == Limits(max_cost=5.0)


def test_a_deadline_is_a_duration_or_a_time() -> None:
    now = datetime(2026, 11, 26, 12, tzinfo=UTC)
    assert budgets.deadline("90m", now) == now + timedelta(minutes=90)
    assert budgets.deadline("1.5h", now) == now + timedelta(minutes=90)
    assert budgets.deadline("2d", now) == now + timedelta(days=2)
    assert budgets.deadline("2026-12-01T08:00+01:00", now).astimezone(UTC).hour == 7
    assert budgets.deadline("2026-12-01 08:00", now).tzinfo is not None
    for nonsense in ("", "h", "soon", "12", "nanh", "2026-13-01"):
        with pytest.raises(ConfigError, match="no deadline"):
            budgets.deadline(nonsense, now)


# -- what is shown ---------------------------------------------------------------------------------


def test_the_list_of_runs_says_why_and_what_it_cost(
    db: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = make_run(db, {"max_tokens": 3000})
    work(db)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", database_url)
    app = typer.Typer()
    app.add_typer(run_commands.app, name="runs")
    app.command()(lambda: None)
    (shown,) = json.loads(CliRunner().invoke(app, ["runs", "--format", "json"]).stdout)
    assert shown["stop_reason"].startswith("max_tokens")
    assert shown["tokens"] == tokens(db, run_id)
    assert shown["cost"] == pytest.approx(shown["items"]["vetted"] * 0.00036)
    assert shown["projected"]["tokens"] == ITEMS * TOKENS


def test_status_shows_each_server_of_each_worker_while_it_is_fresh(db: Database) -> None:
    """Two servers of one model, one of them dead: limit, breaker and rates of both; the sandbox,
    for whose two places three runs ask; a row that nobody renews is not shown."""
    run_id = make_run(db, {})
    dead = "http://127.0.0.1:9/v1"

    async def main(url: str) -> None:
        config = EndpointConfig(base_url=f"{url},{dead}", model="fake", start_concurrency=20)
        async with Endpoint(config) as endpoint:
            asks = [endpoint.chat([], Sampling()) for _ in range(30)]
            await asyncio.gather(*asks)
            sandbox = ScriptedSandbox()
            tool = live.Tool(sandbox, None)
            await sandbox.arun("1", seed=0, timeout=1.0)
            assert float(str(tool.row()["requests_per_second"])) > 0
            with sandbox.load.one(), sandbox.load.one(), sandbox.load.one():
                await seen(endpoint, tool)

    async def seen(endpoint: Endpoint, tool: live.Tool) -> None:
        async with live.watched(db, run_id, {"reasoner, extractor": endpoint}, tool):
            while not await asyncio.to_thread(live.servers, db):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    with FakeEndpoint(sequence(chat("two", completion_tokens=7))) as server:
        asyncio.run(main(server.base_url))
        shown = {one.base_url: one for one in live.servers(db)}
        up, down = shown[server.base_url], shown[dead]
    assert (up.run, up.roles, up.model, up.breaker) == (
        "run",
        "reasoner, extractor",
        "fake",
        "closed",
    )
    assert up.max_in_flight >= 20
    assert up.requests_per_second > 0
    assert up.tokens_per_second == pytest.approx(7 * up.requests_per_second)
    assert down.breaker != "closed"
    assert down.requests_per_second == 0
    tool = shown["its host"]
    assert (tool.roles, tool.model) == ("sandbox", "tier B")
    assert (tool.in_flight, tool.max_in_flight) == (3, 2)
    with db.begin() as session:
        session.execute(text("UPDATE endpoint_status SET seen_at = seen_at - interval '1 minute'"))
    assert live.servers(db) == []
