"""Work items: leases with fencing tokens, and how every item comes to exactly one end.

Contract. Time is the database's clock; a change is one transaction, guarded by owner and attempt.

    queued --lease--> leased --complete--> vetted | rejected   (with exactly one trajectory)
      ^                 |----fail--------> queued, or failed after MAX_FAILURES
      |                 |----give_back---> queued              (an orderly stop: counts for nothing)
      |                 '----sweep-------> queued, or failed as "killed" after MAX_KILLS
      |--retry-- failed
      '--reopen- cancelled <--cancel-- queued | leased;  <--stop-- queued (leased ones finish)

`attempt` grows with every lease and never shrinks: whoever holds an older one has lost the item,
whatever it still does (LeaseLost). So a killed, stalled or doubled worker can cost time, never a
second trajectory. The broker has no part in this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from sqlalchemy import CursorResult, Executable, bindparam, select, text
from sqlalchemy.orm import Session

from shared.errors import TirgenError
from shared.store.database import Database
from shared.store.models import ItemState, ProblemRow, RunState
from shared.store.trajectories import (
    Completed,
    RoleUsage,
    encode,
    write_trajectories,
    write_usage,
)
from shared.trajectory import Problem, clean

MAX_FAILURES = 3  # attempts that failed by themselves
MAX_KILLS = 10  # leases that ran out: a dead worker takes all its items with it, guilty or not
SUSPECT_KILLS = 3  # from then on an item is worked on alone, so that it takes no other with it
COMPLETE_BATCH = 200  # items per transaction of `complete_many`
KILLED = "killed"  # error class of an item that outlived MAX_KILLS of its workers

SWEEP_LOCK = 0x7469_7267_0001


class LeaseLost(TirgenError):
    """The item was swept, cancelled or leased anew: this worker's result for it is void."""


@dataclass(frozen=True, slots=True)
class LeasedItem:
    """One sample to work on, held by `owner` under fencing token `attempt`."""

    id: int
    run_id: int
    attempt: int
    owner: str
    problem: Problem
    sample_index: int
    fingerprint: str
    idempotency_key: str


@dataclass(frozen=True, slots=True)
class Failed:
    """What a worker hands over where no trajectory came about. `raw` is what the model said."""

    error_class: str
    text: str
    retryable: bool
    raw: str | None = None
    usage: tuple[RoleUsage, ...] = ()


_CREATE = text("""
    INSERT INTO work_items (run_id, problem_key, sample_index, fingerprint, idempotency_key)
    SELECT :run_id, key, sample, :fingerprint, encode(sha256(convert_to(
        concat_ws('/', CAST(:run_id AS text), key, sample, CAST(:fingerprint AS text)), 'UTF8'
    )), 'hex')
    FROM unnest(CAST(:keys AS text[])) WITH ORDINALITY AS problem (key, position)
    CROSS JOIN generate_series(0, CAST(:samples AS int) - 1) AS sample
    ORDER BY sample, position
    ON CONFLICT DO NOTHING
""")

_LEASE = text("""
    WITH picked AS MATERIALIZED (
        SELECT id FROM work_items
        WHERE run_id = :run_id AND state = 'queued' AND (kills >= :suspect_kills) = :suspect
            AND (attempt, id) > (:tried, :last)
            AND EXISTS (SELECT FROM runs WHERE id = :run_id AND state = 'running')
        ORDER BY attempt, id LIMIT :n FOR UPDATE SKIP LOCKED
    )
    UPDATE work_items SET state = 'leased', attempt = attempt + 1, lease_owner = :owner,
        lease_until = clock_timestamp() + make_interval(secs => :seconds),
        updated_at = clock_timestamp()
    WHERE id IN (SELECT id FROM picked)
    RETURNING id, attempt, problem_key, sample_index, fingerprint, idempotency_key
""")

# The queue's index gives its items in order. Where the statistics are older than the queue (a run
# that was made a moment ago), the planner believes it to be short, and would read and sort it all.
_IN_ORDER = text("SET LOCAL enable_sort = off")

_HELD = "state = 'leased' AND lease_owner = :owner"

_HEARTBEAT = text(f"""
    UPDATE work_items SET lease_until = clock_timestamp() + make_interval(secs => :seconds)
    WHERE id IN :ids AND {_HELD} RETURNING id, attempt
""").bindparams(bindparam("ids", expanding=True))

_CLOSE = text("""
    UPDATE work_items AS item SET reject_check = held.reject_check,
        state = CASE WHEN held.reject_check IS NULL THEN 'vetted' ELSE 'rejected' END,
        lease_owner = NULL, lease_until = NULL, updated_at = clock_timestamp()
    FROM unnest(CAST(:ids AS bigint[]), CAST(:attempts AS int[]), CAST(:owners AS text[]),
        CAST(:checks AS text[])) AS held (id, attempt, owner, reject_check)
    WHERE item.id = held.id AND item.attempt = held.attempt
        AND item.state = 'leased' AND item.lease_owner = held.owner
    RETURNING item.id
""")

_FAIL = text(f"""
    UPDATE work_items SET failures = failures + 1,
        state = CASE WHEN :retryable AND failures + 1 < :max_failures
            THEN 'queued' ELSE 'failed' END,
        error_class = :error_class, error_text = :error_text, raw = :raw,
        lease_owner = NULL, lease_until = NULL, updated_at = clock_timestamp()
    WHERE id = :id AND attempt = :attempt AND {_HELD} RETURNING state
""")

_GIVE_BACK = text(f"""
    UPDATE work_items SET state = 'queued', lease_owner = NULL, lease_until = NULL,
        updated_at = clock_timestamp()
    WHERE id = :id AND attempt = :attempt AND {_HELD}
""")

_SWEEP = text("""
    UPDATE work_items SET kills = kills + 1,
        state = CASE WHEN kills + 1 < :max_kills THEN 'queued' ELSE 'failed' END,
        error_class = CASE WHEN kills + 1 < :max_kills THEN error_class ELSE :killed END,
        error_text = CASE WHEN kills + 1 < :max_kills THEN error_text
            ELSE 'the lease ran out ' || (kills + 1) || ' times, last held by ' || lease_owner END,
        lease_owner = NULL, lease_until = NULL, updated_at = clock_timestamp()
    WHERE id IN (
        SELECT id FROM work_items WHERE state = 'leased' AND lease_until < clock_timestamp()
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id
""")

_OPEN = """EXISTS (
    SELECT FROM work_items WHERE run_id = runs.id AND work_items.state IN ('queued', 'leased')
)"""

_FINISHED = text(f"SELECT id FROM runs WHERE state = 'running' AND NOT {_OPEN}")

_FINISH = text(f"""
    UPDATE runs SET finished_at = clock_timestamp(), state = CASE
        WHEN stop_reason IS NOT NULL AND EXISTS (
            SELECT FROM work_items WHERE run_id = runs.id AND work_items.state = 'cancelled'
        ) THEN 'cancelled' ELSE 'done' END
    WHERE id = :run_id AND state = 'running' AND NOT {_OPEN} RETURNING id
""")


def create_items(
    session: Session, run_id: int, problem_keys: Sequence[str], samples: int, fingerprint: str
) -> int:
    """Queue `samples` items per problem; return how many the run now has.

    Items that exist already stay as they are, so a repeated call adds only what is missing.
    """
    _lock_run(session, run_id)
    values = {"run_id": run_id, "fingerprint": fingerprint, "samples": samples}
    session.execute(_CREATE, {**values, "keys": list(problem_keys)})
    counted = text("""
        UPDATE runs SET n_items = (SELECT count(*) FROM work_items WHERE run_id = :run_id)
        WHERE id = :run_id RETURNING n_items
    """)
    return int(session.execute(counted, {"run_id": run_id}).scalar_one())


def lease(
    db: Database,
    run_id: int,
    owner: str,
    n: int,
    seconds: float,
    *,
    suspect: bool = False,
    after: LeasedItem | None = None,
) -> list[LeasedItem]:
    """Take up to `n` queued items of a running run for `seconds`, least tried first.

    `after`: only of those that stand in the queue behind this one. Before it lies what was leased
    since; while any transaction stays open (a back-up), the server cannot forget it, and would read
    all of it each time.

    With `suspect`, only of those whose lease has run out SUSPECT_KILLS times; otherwise none of
    them. One of these may be what kills its workers: it must be the only one in flight there.
    """
    values = {"run_id": run_id, "owner": owner, "n": n, "seconds": seconds, "suspect": suspect}
    values["suspect_kills"] = SUSPECT_KILLS
    values |= {"tried": after.attempt - 1, "last": after.id} if after else {"tried": -1, "last": 0}
    with db.begin() as session:
        session.execute(_IN_ORDER)
        rows = session.execute(_LEASE, values).all()
        keys = {row.problem_key for row in rows}
        problems = session.scalars(select(ProblemRow).where(ProblemRow.key.in_(keys))).all()
        by_key = {row.key: _problem(row) for row in problems}
    return [
        LeasedItem(
            id=row.id,
            run_id=run_id,
            attempt=row.attempt,
            owner=owner,
            problem=by_key[row.problem_key],
            sample_index=row.sample_index,
            fingerprint=row.fingerprint,
            idempotency_key=row.idempotency_key,
        )
        for row in sorted(rows, key=lambda row: (row.attempt, row.id))
    ]


def heartbeat(db: Database, items: Iterable[LeasedItem], owner: str, seconds: float) -> set[int]:
    """Extend leases by `seconds` from now; return the ids of those items that are still held."""
    attempts = {item.id: item.attempt for item in items}
    if not attempts:
        return set()
    values = {"ids": list(attempts), "owner": owner, "seconds": seconds}
    with db.begin() as session:
        rows = session.execute(_HEARTBEAT, values).all()
    return {row.id for row in rows if attempts[row.id] == row.attempt}


def complete(db: Database, item: LeasedItem, done: Completed) -> int:
    """Write the trajectory with its verdicts and close the item, or change nothing at all.

    Returns the trajectory's id. Raises LeaseLost where the item is no longer this worker's.
    """
    written = complete_many(db, [(item, done)])
    if item.id not in written:
        raise _lost(item)
    return written[item.id]


def complete_many(db: Database, made: Iterable[tuple[LeasedItem, Completed]]) -> dict[int, int]:
    """`complete` for many items of one run, COMPLETE_BATCH a transaction.

    Returns the trajectory's id by item; items that are missing are no longer this worker's. While
    the server writes one batch, the next is encoded.
    """
    written: dict[int, int] = {}
    waiting = iter(made)
    with ThreadPoolExecutor(1) as ahead:
        batch = list(islice(waiting, COMPLETE_BATCH))
        while batch:
            following = list(islice(waiting, COMPLETE_BATCH))
            encoded = ahead.submit(_encoded, following) if following else None
            written |= _complete_batch(db, batch)
            batch = encoded.result() if encoded else []
    return written


def _encoded(batch: list[tuple[LeasedItem, Completed]]) -> list[tuple[LeasedItem, Completed]]:
    return [
        (item, replace(done, stored=done.stored or encode(done.trajectory))) for item, done in batch
    ]


def _complete_batch(db: Database, batch: list[tuple[LeasedItem, Completed]]) -> dict[int, int]:
    values = {
        "ids": [item.id for item, _ in batch],
        "attempts": [item.attempt for item, _ in batch],
        "owners": [item.owner for item, _ in batch],
        "checks": [done.rejected_by for _, done in batch],
    }
    with db.begin() as session:
        closed = set(session.scalars(_CLOSE, values))
        held = [(item, done) for item, done in batch if item.id in closed]
        run_id = batch[0][0].run_id
        spent = ((i.id, i.attempt, usage) for i, done in held for usage in done.usage)
        write_usage(session, run_id, spent)
        ids = write_trajectories(session, run_id, [(i.id, done) for i, done in held])
    return dict(zip((item.id for item, _ in held), ids, strict=True))


def fail(db: Database, item: LeasedItem, failed: Failed) -> ItemState:
    """Record a failed attempt; return where the item went: queued again, or failed for good.

    Raises LeaseLost where the item is no longer this worker's.
    """
    values = {
        "retryable": failed.retryable,
        "max_failures": MAX_FAILURES,
        "error_class": failed.error_class,
        "error_text": clean(failed.text)[0],
        "raw": clean(failed.raw)[0],
    }
    with db.begin() as session:
        state = _guarded(session, _FAIL, item, values)
        spent = ((item.id, item.attempt, usage) for usage in failed.usage)
        write_usage(session, item.run_id, spent)
        return ItemState(state)


def give_back(db: Database, items: Iterable[LeasedItem]) -> None:
    """Queue unfinished items again in an orderly stop. Those no longer held stay as they are."""
    rows = [{"id": item.id, "attempt": item.attempt, "owner": item.owner} for item in items]
    if rows:
        with db.begin() as session:
            session.execute(_GIVE_BACK, rows)


def sweep(db: Database) -> int:
    """Queue items whose lease ran out again, or fail them after MAX_KILLS; return how many.

    Also closes runs whose last worker died just before it would have. One sweeper at a time: where
    another is at it, this does nothing.
    """
    with db.begin() as session:
        locked = text("SELECT pg_try_advisory_xact_lock(:key)")
        if not session.execute(locked, {"key": SWEEP_LOCK}).scalar_one():
            return 0
        n = len(session.execute(_SWEEP, {"max_kills": MAX_KILLS, "killed": KILLED}).all())
        finished = session.scalars(_FINISHED).all()
    for run_id in finished:
        finish(db, run_id)
    return n


def finish(db: Database, run_id: int) -> bool:
    """Close the run if it is running and no item is open; true if this call closed it."""
    with db.begin() as session:
        _lock_run(session, run_id)
        return session.execute(_FINISH, {"run_id": run_id}).first() is not None


def cancel(db: Database, run_id: int) -> int:
    """End the run at once: whoever works on its items loses them. Returns how many were open."""
    return _move(db, run_id, RunState.CANCELLED, ("queued", "leased"), "state = 'cancelled'")


def stop(db: Database, run_id: int, reason: str) -> int:
    """End a running run gently: what is queued is cancelled, what is leased is finished first.

    Returns how many items were cancelled. To be repeated while the run runs: an item that is given
    back, or fails and may be tried again, is queued anew. `reopen` goes on with the rest.
    """
    queued = text("""
        UPDATE work_items SET state = 'cancelled', updated_at = clock_timestamp()
        WHERE run_id = :run_id AND state = 'queued'
    """)
    told = text("""
        UPDATE runs SET stop_reason = :reason WHERE id = :run_id AND state = 'running' RETURNING id
    """)
    with db.begin() as session:
        _lock_run(session, run_id)
        if session.execute(told, {"run_id": run_id, "reason": reason}).first() is None:
            return 0
        n = _changed(session, queued, {"run_id": run_id})
    finish(db, run_id)
    return n


def reopen(db: Database, run_id: int) -> int:
    """Queue what `cancel` ended; return how many items."""
    return _move(db, run_id, RunState.RUNNING, ("cancelled",), "state = 'queued'")


def retry(db: Database, run_id: int) -> int:
    """Queue failed items again, with a clean slate; return how many."""
    changes = "state = 'queued', failures = 0, kills = 0"
    return _move(db, run_id, RunState.RUNNING, ("failed",), changes)


def _move(
    db: Database, run_id: int, run_state: RunState, origins: Sequence[str], changes: str
) -> int:
    moved = text(f"""
        UPDATE work_items SET {changes}, lease_owner = NULL, lease_until = NULL,
            updated_at = clock_timestamp()
        WHERE run_id = :run_id AND state IN :origins
    """).bindparams(bindparam("origins", expanding=True))
    marked = text("""
        UPDATE runs SET state = :state, stop_reason = NULL,
            finished_at = CASE WHEN :state = 'running' THEN NULL ELSE clock_timestamp() END
        WHERE id = :run_id
    """)
    with db.begin() as session:
        _lock_run(session, run_id)
        n = _changed(session, moved, {"run_id": run_id, "origins": list(origins)})
        if n:
            session.execute(marked, {"run_id": run_id, "state": run_state})
    return n


def _changed(session: Session, update: Executable, values: Mapping[str, Any]) -> int:
    """How many rows it changed. The ids of a whole run's items would not fit into memory."""
    result = session.execute(update, values)
    assert isinstance(result, CursorResult)
    return result.rowcount


def _lock_run(session: Session, run_id: int) -> None:
    """Later statements of this transaction see all that former holders of the lock committed.

    NO KEY: whoever writes rows that refer to the run must not wait, while it holds items.
    """
    session.execute(text("SELECT FROM runs WHERE id = :id FOR NO KEY UPDATE"), {"id": run_id})


def _guarded(session: Session, statement: Any, item: LeasedItem, values: Mapping[str, Any]) -> Any:
    guard = {"id": item.id, "attempt": item.attempt, "owner": item.owner}
    row = session.execute(statement, {**guard, **values}).one_or_none()
    if row is None:
        raise _lost(item)
    return row[0]


def _lost(item: LeasedItem) -> LeaseLost:
    return LeaseLost(
        "the lease of a work item is lost: its result is discarded",
        where=f"item {item.id}, attempt {item.attempt}, run {item.run_id}",
        remedy="nothing: the item was cancelled, or another worker has it",
    )


def _problem(row: ProblemRow) -> Problem:
    return Problem(row.text, row.answer, row.source, row.external_id, row.subject, row.level)
