"""A slice in this process: what it does with handlers that misbehave, with time and with a stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from shared.errors import DatabaseError
from shared.store import Completed, Database, ItemState, RunState, queries
from shared.store.trajectories import import_problems
from shared.trajectory import End, Problem, Trajectory
from shared.work import items, slices, slots
from shared.work.items import Failed, LeasedItem
from shared.work.runs import create_run
from shared.work.slices import INTERNAL, TIMEOUT, Handler, RunInfo, SliceSettings, run_slice
from shared.work.slots import Bell

SETTINGS = SliceSettings(in_flight=4, lease_seconds=2.0, heartbeat_seconds=0.2, grace_seconds=0.1)


def completed(item: LeasedItem) -> Completed:
    made = Trajectory(item.problem.key, (), "", End.ANSWERED, "0", False, item.sample_index, 1)
    return Completed(made, (), None, 0.0, "none", None, "test")


async def succeed(item: LeasedItem) -> Completed | Failed:
    await asyncio.sleep(0)
    return completed(item)


def make_run(db: Database, samples: int) -> tuple[int, Bell]:
    problem = Problem("1 + 1?", "2")
    with db.begin() as session:
        import_problems(session, [problem])
        run_id = create_run(
            session, name="run", kind="generate", config={}, fingerprint="f", code_version="c"
        )
        items.create_items(session, run_id, [problem.key], samples, "f")
        slots.open_slots(session, run_id, 1)
    return run_id, slots.ring(db)[0]


def work(
    db: Database,
    bell: Bell,
    handler: Callable[[LeasedItem], Awaitable[Completed | Failed]],
    settings: SliceSettings = SETTINGS,
    stopping: Callable[[], bool] = lambda: False,
) -> Bell | None:
    @asynccontextmanager
    async def open_handler(run: RunInfo) -> AsyncIterator[Handler]:
        assert run.name == "run"
        yield handler

    return asyncio.run(run_slice(db, bell, open_handler, lambda run: settings, stopping))


def funnel(db: Database, run_id: int) -> queries.Funnel:
    with db.session() as session:
        return queries.funnel(session, run_id)


def test_slice_works_through_a_run_and_closes_it(db: Database) -> None:
    """Never more in flight than told, and topped up before the last of a batch is done."""
    run_id, bell = make_run(db, 50)
    flying: set[int] = set()
    peaks: list[int] = []

    async def handler(item: LeasedItem) -> Completed | Failed:
        flying.add(item.id)
        peaks.append(len(flying))
        await asyncio.sleep(0.005)
        flying.remove(item.id)
        return completed(item)

    assert work(db, bell, handler) is None
    found = funnel(db, run_id)
    assert (found.state, found.items[ItemState.VETTED]) == (RunState.DONE, 50)
    assert max(peaks) == SETTINGS.in_flight


@pytest.mark.parametrize("kills", [items.SUSPECT_KILLS - 1, items.SUSPECT_KILLS])
def test_what_kills_its_workers_takes_nothing_with_it(db: Database, kills: int) -> None:
    """An item that was in flight too often when a worker died is the only one in flight, later."""
    run_id, bell = make_run(db, 12)
    with db.begin() as session:
        marked = "UPDATE work_items SET kills = :n WHERE id IN (SELECT id FROM work_items LIMIT 2)"
        session.execute(text(marked), {"n": kills})
        ids = session.scalars(text("SELECT id FROM work_items WHERE kills > 0")).all()
    flying: set[int] = set()
    company: dict[int, int] = {}
    order: list[int] = []

    async def handler(item: LeasedItem) -> Completed | Failed:
        flying.add(item.id)
        order.append(item.id)
        for _ in range(5):
            await asyncio.sleep(0.01)
            for id in flying:
                company[id] = max(company.get(id, 0), len(flying))
        flying.remove(item.id)
        return completed(item)

    assert work(db, bell, handler) is None
    assert funnel(db, run_id).items[ItemState.VETTED] == 12
    suspected = kills >= items.SUSPECT_KILLS
    assert {company[id] for id in ids} == ({1} if suspected else {SETTINGS.in_flight})
    assert (set(order[-2:]) == set(ids)) == suspected
    assert max(company.values()) == SETTINGS.in_flight


def test_a_slot_is_kept_while_a_slice_opens_what_it_needs(db: Database) -> None:
    """However long a sandbox takes to start. Else the next slice would be started meanwhile, and
    the one after it, and none would ever keep its slot long enough to work."""
    run_id, bell = make_run(db, 3)
    settings = replace(SETTINGS, lease_seconds=0.6, heartbeat_seconds=0.1)

    def now() -> datetime:
        with db.session() as session:
            return session.scalars(text("SELECT clock_timestamp()")).one()

    @asynccontextmanager
    async def open_slowly(run: RunInfo) -> AsyncIterator[Handler]:
        until = await asyncio.to_thread(now) + timedelta(seconds=2 * settings.lease_seconds)
        while await asyncio.to_thread(now) < until:
            assert await asyncio.to_thread(slots.ring, db) == [], "nobody else is rung for it"
        yield succeed

    assert asyncio.run(run_slice(db, bell, open_slowly, lambda r: settings, lambda: False)) is None
    assert funnel(db, run_id).items[ItemState.VETTED] == 3


def test_a_slice_that_lost_its_slot_while_opening_touches_nothing(db: Database) -> None:
    _, bell = make_run(db, 3)

    @asynccontextmanager
    async def open_too_slowly(run: RunInfo) -> AsyncIterator[Handler]:
        with db.begin() as session:
            session.execute(text("UPDATE run_slots SET token = token + 1"))
        yield succeed

    opened = run_slice(db, bell, open_too_slowly, lambda run: SETTINGS, lambda: False)
    assert asyncio.run(opened) is None
    with db.session() as session:
        assert session.scalar(text("SELECT sum(attempt) FROM work_items")) == 0


def test_second_message_for_the_same_slot_does_nothing(db: Database) -> None:
    _, bell = make_run(db, 1)
    assert work(db, bell, succeed, replace(SETTINGS, slice_seconds=-1.0)) is not None

    async def never(item: LeasedItem) -> Completed | Failed:
        raise AssertionError("a stale message must not start work")

    assert work(db, bell, never) is None
    assert work(db, replace(bell, run_id=bell.run_id + 1), never) is None


def test_ended_slice_names_its_successor(db: Database) -> None:
    run_id, bell = make_run(db, 3)
    successor = work(db, bell, succeed, replace(SETTINGS, slice_seconds=-1.0))
    assert successor == Bell("generate", run_id, 0, bell.token + 2)
    assert funnel(db, run_id).items[ItemState.QUEUED] == 3
    assert work(db, successor, succeed) is None
    assert funnel(db, run_id).state is RunState.DONE


def test_handler_that_raises_fails_its_item_only(db: Database) -> None:
    run_id, bell = make_run(db, 3)

    async def handler(item: LeasedItem) -> Completed | Failed:
        if item.sample_index == 1:
            raise ValueError("boom")
        return completed(item)

    assert work(db, bell, handler) is None
    found = funnel(db, run_id)
    assert (found.items[ItemState.VETTED], found.failed) == (2, {INTERNAL: 1})
    with db.session() as session:
        query = "SELECT failures, error_text FROM work_items WHERE state = 'failed'"
        failures, said = session.execute(text(query)).one()
    assert failures == items.MAX_FAILURES
    assert "boom" in said


def test_result_that_cannot_be_stored_fails_its_item_only(db: Database) -> None:
    """A seed that no column holds, a problem that is not there: found when the row is written."""
    run_id, bell = make_run(db, 3)

    async def handler(item: LeasedItem) -> Completed | Failed:
        done = completed(item)
        wrong = [{"seed": 2**70}, {"problem_key": "alien"}, {}][item.sample_index]
        return replace(done, trajectory=replace(done.trajectory, **wrong))

    assert work(db, bell, handler) is None
    found = funnel(db, run_id)
    assert (found.items[ItemState.VETTED], found.failed) == (1, {INTERNAL: 2})
    assert found.reconciles


def test_item_that_never_ends_fails_with_its_limit(db: Database) -> None:
    run_id, bell = make_run(db, 1)

    async def handler(item: LeasedItem) -> Completed | Failed:
        await asyncio.Event().wait()
        raise AssertionError

    work(db, bell, handler, replace(SETTINGS, item_seconds=0.01))
    assert funnel(db, run_id).failed == {TIMEOUT: 1}
    with db.session() as session:
        said = session.execute(text("SELECT error_text FROM work_items")).scalar_one()
    assert "item_seconds" in said


def test_timeout_of_the_handlers_own_is_not_taken_for_the_limit(db: Database) -> None:
    run_id, bell = make_run(db, 1)

    async def handler(item: LeasedItem) -> Completed | Failed:
        raise TimeoutError("my own")

    work(db, bell, handler)
    assert funnel(db, run_id).failed == {INTERNAL: 1}


def test_heartbeat_keeps_items_longer_than_a_lease(db: Database) -> None:
    """Swept all the while, the item is still its worker's after three times the lease."""
    run_id, bell = make_run(db, 1)
    settings = replace(SETTINGS, lease_seconds=0.6, heartbeat_seconds=0.1)

    async def handler(item: LeasedItem) -> Completed | Failed:
        end = asyncio.get_running_loop().time() + 1.8
        while asyncio.get_running_loop().time() < end:
            await asyncio.to_thread(items.sweep, db)
            await asyncio.sleep(0.05)
        return completed(item)

    work(db, bell, handler, settings)
    assert funnel(db, run_id).items[ItemState.VETTED] == 1
    with db.session() as session:
        row = session.execute(text("SELECT attempt, kills FROM work_items")).one()
    assert tuple(row) == (1, 0)


def test_a_slice_that_is_full_waits_and_takes_no_more(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks again and again while nothing ends; then the rest is done as well."""
    run_id, bell = make_run(db, SETTINGS.in_flight + 2)
    monkeypatch.setattr(slices, "TICK", 0.01)
    asked: list[int] = []
    lease = items.lease

    def noted(db: Database, run_id: int, owner: str, n: int, *more: Any, **others: Any) -> Any:
        asked.append(n)
        return lease(db, run_id, owner, n, *more, **others)

    monkeypatch.setattr(items, "lease", noted)

    async def handler(item: LeasedItem) -> Completed | Failed:
        for _ in range(20):
            await asyncio.sleep(0.01)
        return completed(item)

    assert work(db, bell, handler) is None
    assert funnel(db, run_id).items[ItemState.VETTED] == SETTINGS.in_flight + 2
    assert 0 not in asked


def test_told_to_stop_it_gives_everything_back(db: Database) -> None:
    run_id, bell = make_run(db, 6)
    told: list[bool] = []

    async def handler(item: LeasedItem) -> Completed | Failed:
        told.append(True)
        await asyncio.Event().wait()
        raise AssertionError

    successor = work(db, bell, handler, stopping=lambda: bool(told))
    assert successor is not None
    found = funnel(db, run_id)
    assert found.items[ItemState.QUEUED] == 6
    assert len(told) == SETTINGS.in_flight


@pytest.mark.parametrize("how", ["cancel", "rung anew"])
def test_slice_that_lost_its_run_or_slot_ends(db: Database, how: str) -> None:
    run_id, bell = make_run(db, 2)

    async def handler(item: LeasedItem) -> Completed | Failed:
        if how == "cancel":
            await asyncio.to_thread(items.cancel, db, run_id)
        else:
            await asyncio.to_thread(bump, db)
        await asyncio.Event().wait()
        raise AssertionError

    assert work(db, bell, handler) is None
    state = ItemState.CANCELLED if how == "cancel" else ItemState.QUEUED
    assert funnel(db, run_id).items[state] == 2


def bump(db: Database) -> None:
    with db.begin() as session:
        session.execute(text("UPDATE run_slots SET token = token + 1"))


def test_lost_lease_discards_one_result_and_nothing_else(db: Database) -> None:
    run_id, bell = make_run(db, 5)

    async def handler(item: LeasedItem) -> Completed | Failed:
        if item.sample_index == 0 and item.attempt == 1:
            await asyncio.to_thread(items.give_back, db, [item])
        return completed(item)

    assert work(db, bell, handler) is None
    assert funnel(db, run_id).items[ItemState.VETTED] == 5
    with db.session() as session:
        rows = session.execute(text("SELECT attempt FROM work_items ORDER BY attempt")).scalars()
        assert rows.all() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("absences", [1, 1000])
def test_short_absence_of_the_database_is_outlasted(
    db: Database, monkeypatch: pytest.MonkeyPatch, absences: int
) -> None:
    """A result is written once the server is back; longer than a lease, and the slice ends."""
    run_id, bell = make_run(db, 1)
    left = [DatabaseError("gone")] * absences
    write = items.complete

    def sometimes(db: Database, item: LeasedItem, done: Completed) -> int:
        if left:
            raise left.pop()
        return write(db, item, done)

    monkeypatch.setattr(items, "complete", sometimes)
    if absences == 1:
        work(db, bell, succeed)
        assert funnel(db, run_id).items[ItemState.VETTED] == 1
    else:
        with pytest.raises(DatabaseError, match="gone"):
            work(db, bell, succeed, replace(SETTINGS, lease_seconds=1.5))
        assert funnel(db, run_id).items[ItemState.VETTED] == 0
