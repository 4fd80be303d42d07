"""Every item comes to exactly one end, whatever happens to those who hold it."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from shared.errors import DatabaseError, InputError
from shared.store import Completed, Database, ItemState, RoleUsage, RunState, queries, trajectories
from shared.trajectory import Check, End, Problem, Trajectory, Verdict
from shared.work import items, slots
from shared.work.items import Failed, LeasedItem, LeaseLost
from shared.work.runs import create_run

OWNER = "host:1:a"
LONG = 1000.0
EXPIRED = -1.0  # a lease of so many seconds has run out already


def make_run(db: Database, problems: int = 2, samples: int = 2, name: str = "run") -> int:
    made = [Problem(f"{i} + 1?", str(i + 1)) for i in range(problems)]
    with db.begin() as session:
        trajectories.import_problems(session, made)
        run_id = create_run(
            session, name=name, kind="generate", config={"a": 1}, fingerprint="f", code_version="c"
        )
        keys = [problem.key for problem in made]
        assert items.create_items(session, run_id, keys, samples, "f") == problems * samples
    return run_id


def completed(item: LeasedItem, rejected_by: Check | None = None) -> Completed:
    made = Trajectory(
        problem_key=item.problem.key,
        steps=(),
        text=f"{item.sample_index}",
        end=End.ANSWERED,
        answer=item.problem.answer,
        thinking=False,
        seed=item.sample_index,
        n_tokens=1,
    )
    verdicts = (Verdict(Check.ANSWER, rejected_by is None, "1", "said so"),)
    usage = (RoleUsage("reasoner", "nano", "here", 1, 10, 5, 0, 0.5),)
    return Completed(made, verdicts, rejected_by, 1.0, "nano", None, "c", usage)


def count(db: Database, table: str) -> int:
    with db.session() as session:
        return int(session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def funnel(db: Database, run_id: int) -> queries.Funnel:
    with db.session() as session:
        return queries.funnel(session, run_id)


def test_creating_items_again_adds_only_what_is_missing(db: Database) -> None:
    run_id = make_run(db, problems=2, samples=2)
    with db.begin() as session:
        keys = [Problem(f"{i} + 1?", str(i + 1)).key for i in range(2)]
        assert items.create_items(session, run_id, keys, 3, "f") == 6
        assert items.create_items(session, run_id, keys, 1, "f") == 6
        rows = session.execute(text("SELECT DISTINCT idempotency_key FROM work_items")).all()
    assert len(rows) == 6
    with pytest.raises(InputError, match="named 'run' already"):
        make_run(db)


def test_leases_at_once_share_no_item(db: Database) -> None:
    run_id = make_run(db, problems=40, samples=1)
    with ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(items.lease, db, run_id, f"owner {i}", 5, LONG) for i in range(12)]
        ids = [item.id for batch in taken for item in batch.result()]
    assert len(ids) == len(set(ids)) == 40


def test_untried_items_come_before_tried_ones(db: Database) -> None:
    run_id = make_run(db, problems=3, samples=1)
    first = items.lease(db, run_id, OWNER, 1, LONG)
    items.give_back(db, first)
    order = [item.id for item in items.lease(db, run_id, OWNER, 3, LONG)]
    assert order[-1] == first[0].id


def test_trajectory_and_end_of_the_item_are_one_transaction(db: Database) -> None:
    run_id = make_run(db)
    item, other, *_ = items.lease(db, run_id, OWNER, 4, LONG)
    trajectory_id = items.complete(db, item, completed(item))
    items.complete(db, other, completed(other, Check.ANSWER))
    found = funnel(db, run_id)
    assert (found.items[ItemState.VETTED], found.rejected) == (1, {"answer": 1})
    assert found.reconciles
    with db.session() as session:
        assert trajectories.read(session, trajectory_id) == completed(item).trajectory
        total = queries.usage(session, run_id)[0]
    assert (total.requests, total.prompt_tokens, total.duration) == (2, 20, 1.0)


def test_failed_write_leaves_the_item_leased(db: Database) -> None:
    run_id = make_run(db)
    item = items.lease(db, run_id, OWNER, 1, LONG)[0]
    alien = Problem("not imported", "0")
    bad = completed(LeasedItem(item.id, run_id, 1, OWNER, alien, 0, "f", "k"))
    with pytest.raises(Exception, match="foreign key"):
        items.complete(db, item, bad)
    assert funnel(db, run_id).items[ItemState.LEASED] == 1
    assert count(db, "trajectories") == count(db, "verdicts") == 0


def test_swept_worker_can_no_longer_write(db: Database) -> None:
    """The zombie holds attempt 1; the sweep gave the item to another, who holds attempt 2."""
    run_id = make_run(db, problems=1, samples=1)
    zombie = items.lease(db, run_id, OWNER, 1, EXPIRED)[0]
    assert items.sweep(db) == 1
    heir = items.lease(db, run_id, OWNER, 1, LONG)[0]
    assert (zombie.attempt, heir.attempt) == (1, 2)
    assert items.heartbeat(db, [zombie], OWNER, LONG) == set()
    for action in (
        lambda: items.complete(db, zombie, completed(zombie)),
        lambda: items.fail(db, zombie, Failed("x", "x", True)),
    ):
        with pytest.raises(LeaseLost):
            action()
    items.give_back(db, [zombie])
    assert items.heartbeat(db, [heir], OWNER, LONG) == {heir.id}
    items.complete(db, heir, completed(heir))
    with pytest.raises(LeaseLost):
        items.complete(db, heir, completed(heir))
    assert count(db, "trajectories") == 1


def test_many_are_completed_at_once_and_lost_ones_left_out(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several transactions; who lost an item loses that one only."""
    monkeypatch.setattr(items, "COMPLETE_BATCH", 3)
    run_id = make_run(db, problems=4, samples=2)
    lost = items.lease(db, run_id, OWNER, 1, EXPIRED)[0]
    items.sweep(db)
    held = items.lease(db, run_id, OWNER, 7, LONG)
    made = [(item, completed(item, Check.ANSWER if item.id % 2 else None)) for item in held]
    written = items.complete_many(db, [made[0], (lost, completed(lost)), *made[1:]])
    assert list(written) == [item.id for item in held if item.id != lost.id]
    found = funnel(db, run_id)
    n_rejected = sum(item.id % 2 for item in held if item.id in written)
    assert (found.rejected, found.n_open) == ({"answer": n_rejected}, 8 - len(written))
    assert found.reconciles
    with db.session() as session:
        for item, done in made:
            if item.id in written:
                assert trajectories.read(session, written[item.id]) == done.trajectory
        assert queries.usage(session, run_id)[0].requests == len(written)
    assert items.complete_many(db, made) == {}
    assert items.complete_many(db, []) == {}


def test_heartbeat_saves_a_lease_from_the_sweep(db: Database) -> None:
    run_id = make_run(db)
    kept, lost = items.lease(db, run_id, OWNER, 2, EXPIRED)
    assert items.heartbeat(db, [kept], OWNER, LONG) == {kept.id}
    assert items.sweep(db) == 1
    assert items.heartbeat(db, [kept, lost], OWNER, LONG) == {kept.id}


def test_failures_are_counted_to_their_cap_and_keep_the_raw_text(db: Database) -> None:
    run_id = make_run(db, problems=1, samples=1)
    states = []
    for _ in range(items.MAX_FAILURES):
        item = items.lease(db, run_id, OWNER, 1, LONG)[0]
        states.append(items.fail(db, item, Failed("bad_reply", "a\0b", True, raw="{\ud800")))
    assert states == [ItemState.QUEUED] * (items.MAX_FAILURES - 1) + [ItemState.FAILED]
    assert funnel(db, run_id).failed == {"bad_reply": 1}
    with db.session() as session:
        row = session.execute(text("SELECT error_text, raw FROM work_items")).one()
    assert tuple(row) == ("a\ufffdb", "{\ufffd")


def test_terminal_failure_is_not_tried_again(db: Database) -> None:
    run_id = make_run(db, problems=1, samples=1)
    item = items.lease(db, run_id, OWNER, 1, LONG)[0]
    assert items.fail(db, item, Failed("unauthorized", "401", False)) is ItemState.FAILED
    assert items.finish(db, run_id)


def test_killed_work_has_a_cap_of_its_own(db: Database) -> None:
    """Being killed is not a failed attempt: its own, higher cap ends an item that kills workers."""
    assert items.MAX_KILLS > items.MAX_FAILURES
    run_id = make_run(db, problems=1, samples=1)
    for kills in range(items.MAX_KILLS):
        suspect = kills >= items.SUSPECT_KILLS
        assert items.lease(db, run_id, OWNER, 1, EXPIRED, suspect=not suspect) == []
        assert len(items.lease(db, run_id, OWNER, 1, EXPIRED, suspect=suspect)) == 1
        assert items.sweep(db) == 1
    found = funnel(db, run_id)
    assert found.failed == {items.KILLED: 1}
    assert found.state is RunState.DONE


def test_a_sweeper_that_vanished_holds_up_nobody(db: Database) -> None:
    """Its host is gone, its connection is not: the server ends its transaction, and the lock."""
    run_id = make_run(db, problems=1, samples=1)
    items.lease(db, run_id, OWNER, 1, EXPIRED)
    vanished = Database(db.url.render_as_string(hide_password=False))
    vanished.end_idle_transactions(0.5)

    def sweep_in_time() -> None:
        with vanished.begin() as session:
            lock = text("SELECT pg_advisory_xact_lock(:key)")
            session.execute(lock, {"key": items.SWEEP_LOCK})
            assert items.sweep(db) == 0, "control: as long as it lives, it alone may sweep"
            deadline = time.monotonic() + 30
            while items.sweep(db) == 0:
                assert time.monotonic() < deadline
            session.execute(lock, {"key": items.SWEEP_LOCK})

    with pytest.raises(DatabaseError):
        sweep_in_time()
    vanished.close()


def test_giving_back_counts_for_nothing(db: Database) -> None:
    run_id = make_run(db, problems=1, samples=1)
    for _ in range(3 * items.MAX_KILLS):
        items.give_back(db, items.lease(db, run_id, OWNER, 1, LONG))
    with db.session() as session:
        row = session.execute(text("SELECT state, failures, kills FROM work_items")).one()
    assert tuple(row) == ("queued", 0, 0)


def test_cancelled_run_voids_work_in_flight_and_can_be_reopened(db: Database) -> None:
    run_id = make_run(db)
    done, flying = items.lease(db, run_id, OWNER, 2, LONG)
    items.complete(db, done, completed(done))
    assert items.cancel(db, run_id) == 3
    with pytest.raises(LeaseLost):
        items.complete(db, flying, completed(flying))
    assert items.lease(db, run_id, OWNER, 4, LONG) == []
    assert funnel(db, run_id).state is RunState.CANCELLED
    assert items.reopen(db, run_id) == 3
    assert len(items.lease(db, run_id, OWNER, 4, LONG)) == 3
    assert funnel(db, run_id).reconciles


def test_retry_queues_failed_items_with_a_clean_slate(db: Database) -> None:
    run_id = make_run(db, problems=1, samples=1)
    item = items.lease(db, run_id, OWNER, 1, LONG)[0]
    items.fail(db, item, Failed("server_error", "500", False))
    assert items.finish(db, run_id)
    assert items.retry(db, run_id) == 1
    assert funnel(db, run_id).state is RunState.RUNNING
    again = items.lease(db, run_id, OWNER, 1, LONG)[0]
    assert items.fail(db, again, Failed("server_error", "500", True)) is ItemState.QUEUED


def test_run_is_done_only_when_no_item_is_open(db: Database) -> None:
    run_id = make_run(db, problems=1, samples=1)
    assert not items.finish(db, run_id)
    item = items.lease(db, run_id, OWNER, 1, LONG)[0]
    assert not items.finish(db, run_id)
    items.complete(db, item, completed(item))
    assert funnel(db, run_id).state is RunState.RUNNING  # its worker was killed right here
    items.sweep(db)
    assert funnel(db, run_id).state is RunState.DONE


class Model:
    """What must be true of one item, kept beside the database through random operations."""

    def __init__(self) -> None:
        self.held: dict[int, LeasedItem] = {}  # by item: the one lease that counts
        self.stale: list[LeasedItem] = []
        self.ends: Counter[str] = Counter()


OPERATIONS = ("lease", "expire", "complete", "reject", "fail", "give back", "stale", "heartbeat")


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10)), max_size=30))
def test_any_interleaving_keeps_one_trajectory_per_item(
    db: Database, operations: list[tuple[str, int]]
) -> None:
    with db.begin() as session:
        session.execute(
            text("DELETE FROM work_items WHERE run_id NOT IN (SELECT run_id FROM trajectories)")
        )
        name = f"run {session.execute(text('SELECT count(*) FROM runs')).scalar_one()}"
    run_id = make_run(db, problems=2, samples=2, name=name)
    model = Model()

    def settle(item: LeasedItem, operation: str) -> None:
        if operation == "fail":
            if items.fail(db, item, Failed("e", "t", True)) is ItemState.FAILED:
                model.ends["failed"] += 1
        else:
            rejected = Check.ANSWER if operation == "reject" else None
            items.complete(db, item, completed(item, rejected))
            model.ends["rejected" if rejected else "vetted"] += 1

    for operation, number in operations:
        if operation == "lease":
            leased = items.lease(db, run_id, OWNER, 1 + number % 3, LONG, suspect=number > 7)
            for item in leased:
                assert item.id not in model.held
                model.held[item.id] = item
        elif operation == "stale":
            for item in model.stale:
                with pytest.raises(LeaseLost):
                    settle(item, ("fail", "complete")[number % 2])
        elif model.held:
            item = list(model.held.values())[number % len(model.held)]
            if operation == "heartbeat":
                assert items.heartbeat(db, [item], OWNER, LONG) == {item.id}
                continue
            del model.held[item.id]
            model.stale.append(item)
            if operation == "expire":
                assert items.heartbeat(db, [item], OWNER, EXPIRED) == {item.id}
                assert items.sweep(db) == 1
            elif operation == "give back":
                items.give_back(db, [item])
            else:
                settle(item, operation)

        found = funnel(db, run_id)
        assert found.reconciles
        assert found.items[ItemState.LEASED] == len(model.held)
        for state in (ItemState.VETTED, ItemState.REJECTED, ItemState.FAILED):
            assert found.items[state] == model.ends[state]
        with db.session() as session:
            query = "SELECT count(*), count(DISTINCT item_id) FROM trajectories WHERE run_id = :r"
            n, distinct = session.execute(text(query), {"r": run_id}).one()
        assert n == distinct == model.ends["vetted"] + model.ends["rejected"]


def test_threads_that_race_for_everything_still_reconcile(db: Database) -> None:
    """Leases that expire at once, sweepers and settlers together: nothing twice, nothing lost."""
    run_id = make_run(db, problems=10, samples=3)

    def worker(number: int) -> None:
        for turn in range(30):
            seconds = EXPIRED if (turn + number) % 3 == 0 else LONG
            for item in items.lease(db, run_id, f"owner {number}", 3, seconds):
                with suppress(LeaseLost):
                    items.complete(db, item, completed(item))
            items.sweep(db)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(worker, number) for number in range(6)]:
            done.result()
    found = funnel(db, run_id)
    assert found.reconciles
    assert found.items[ItemState.VETTED] + found.items[ItemState.FAILED] == 30
    assert count(db, "trajectories") == found.items[ItemState.VETTED]


# Slots


def start(db: Database, n: int) -> tuple[int, list[slots.Bell]]:
    run_id = make_run(db)
    with db.begin() as session:
        slots.open_slots(session, run_id, n)
    return run_id, slots.ring(db)


def test_each_slot_is_rung_once_and_taken_once(db: Database) -> None:
    _, bells = start(db, 3)
    assert [bell.slot for bell in bells] == [0, 1, 2]
    assert slots.ring(db) == []
    assert slots.take(db, bells[0], LONG) is not None
    assert slots.take(db, bells[0], LONG) is None, "the double of a message must be void"


def test_lost_message_and_dead_slice_are_replaced(db: Database) -> None:
    _, bells = start(db, 1)
    dead = slots.take(db, bells[0], EXPIRED)
    assert dead is not None
    again = slots.ring(db)
    assert [bell.slot for bell in again] == [0]
    assert not slots.keep(db, dead, LONG)
    assert slots.leave(db, dead) is None
    assert slots.take(db, again[0], LONG) is not None


def test_slice_has_a_successor_only_while_items_are_queued(db: Database) -> None:
    run_id, bells = start(db, 1)
    taken = slots.take(db, bells[0], LONG)
    assert taken is not None
    assert slots.keep(db, taken, LONG)
    successor = slots.leave(db, taken)
    assert successor is not None
    last = slots.take(db, successor, LONG)
    assert last is not None
    flying = items.lease(db, run_id, OWNER, 4, LONG)
    assert slots.leave(db, last) is None
    assert slots.ring(db) == []
    items.give_back(db, flying)
    assert len(slots.ring(db)) == 1, "work that came back must be rung for"


def test_cancelled_run_is_neither_kept_nor_rung(db: Database) -> None:
    run_id, bells = start(db, 2)
    taken = slots.take(db, bells[0], LONG)
    assert taken is not None
    items.cancel(db, run_id)
    assert not slots.keep(db, taken, LONG)
    assert slots.leave(db, taken) is None
    items.reopen(db, run_id)
    assert [bell.slot for bell in slots.ring(db)] == [0]
