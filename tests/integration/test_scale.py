"""What must not grow with a run: claims of docs/scale.md about statements that every process asks.

What a statement reads is taken from the server's own counters of its indexes.
"""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, text

from shared.errors import ConfigError
from shared.store import Database
from shared.store.queries import funnel
from shared.store.trajectories import import_problems
from shared.trajectory import Problem
from shared.work import items, slots
from shared.work.runs import create_run
from tirgen import budgets

ITEMS = 4000
LONG = 1000.0


@pytest.fixture
def run_id(db: Database) -> int:
    """A run that was made a moment ago: nobody has looked at the table's statistics yet."""
    problems = [Problem(f"{i} + 1?", str(i + 1)) for i in range(20)]
    config = {"limits": {"deadline": "2020-01-01T00:00:00+00:00"}}
    with db.begin() as session:
        session.execute(text("ALTER TABLE work_items SET (autovacuum_enabled = off)"))
        import_problems(session, problems)
        made = create_run(
            session, name="run", kind="generate", config=config, fingerprint="f", code_version="c"
        )
        keys = [problem.key for problem in problems]
        items.create_items(session, made, keys, ITEMS // len(keys), "f")
        slots.open_slots(session, made, 40)
    return made


def read_by(db: Database, index: str) -> tuple[int, int]:
    """Scans of an index so far, and the entries that they read."""
    with db.begin() as session:
        session.execute(text("SELECT pg_stat_force_next_flush()"))
    query = "SELECT idx_scan, idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = :index"
    with db.session() as session:
        scans, entries = session.execute(text(query), {"index": index}).one()
    return int(scans), int(entries)


def test_a_lease_reads_what_it_takes_however_long_the_queue(db: Database, run_id: int) -> None:
    """A queue that was made a moment ago has no statistics yet. Where it is long (as the planner is
    told here), that is guessed to be a few rows, and all of it would be read and sorted, as the
    control shows."""
    queue, n = "work_items_queue_idx", 32
    with db.begin() as session:
        long = "UPDATE pg_class SET reltuples = 1e6, relpages = pg_relation_size(oid) / 8192"
        session.execute(text(f"{long} WHERE relname = 'work_items'"))
    _, before = read_by(db, queue)
    assert len(items.lease(db, run_id, "o", n, LONG)) == n
    _, after = read_by(db, queue)
    assert after - before <= 2 * n
    values = {"run_id": run_id, "owner": "o", "n": n, "seconds": LONG, "suspect": False}
    with db.begin() as session:
        session.execute(
            items._LEASE, values | {"suspect_kills": items.SUSPECT_KILLS, "tried": -1, "last": 0}
        )
    assert read_by(db, queue)[1] - after > ITEMS / 2


def test_a_lease_goes_on_where_the_last_one_ended(db: Database, run_id: int) -> None:
    """While a transaction stays open, the server keeps what was leased since, before the rest of
    the queue: who begins at its head reads all of it, as the control shows."""
    queue = "work_items_queue_idx"
    with db.session() as back_up:
        back_up.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        assert funnel(back_up, run_id).n_open == ITEMS
        held = items.lease(db, run_id, "o", ITEMS // 2, LONG)
        _, before = read_by(db, queue)
        (behind,) = items.lease(db, run_id, "o", 1, LONG, after=held[-1])
        _, after = read_by(db, queue)
        assert after - before <= 2
        (again,) = items.lease(db, run_id, "o", 1, LONG)
        assert read_by(db, queue)[1] - after >= ITEMS / 2
    assert [behind.id, again.id] == [held[-1].id + 1, held[-1].id + 2]


def test_ringing_asks_once_a_run_whether_anything_is_queued(db: Database, run_id: int) -> None:
    """Not once a slot: while a transaction stays open, the answer lies behind all that was leased
    since."""
    with db.begin() as session:
        session.execute(text("ANALYZE"))
    scans, _ = read_by(db, "work_items_run_state_idx")
    assert len(slots.ring(db)) == 40
    assert read_by(db, "work_items_run_state_idx")[0] - scans <= 1


def test_one_process_at_a_time_adds_up_what_a_run_has_cost(db: Database, run_id: int) -> None:
    """Else every worker process would, at once. The lock goes with the transaction of whoever holds
    it; who resumes a run is answered in any case."""
    with db.session() as other:
        other.execute(select(func.pg_advisory_xact_lock(budgets.LOOK_LOCK, run_id)))
        assert budgets.hold(db, run_id) is None
        with pytest.raises(ConfigError, match="limit already"):
            budgets.require_room(db, run_id)
        with db.session() as session:
            assert funnel(session, run_id).n_open == ITEMS
    assert (budgets.hold(db, run_id) or "").startswith("deadline: ")
    with db.session() as session:
        assert funnel(session, run_id).n_open == 0
