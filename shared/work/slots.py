"""Slots: how many slices work on a run at once, and which message may start one.

A run has a fixed number of slots; each is a lease of its own, with a token. A message names run,
slot and token. Taking it changes the token, so its doubles are void; a lost message, or a slice
that died, is noticed when `alive_until` has passed, and `ring` issues a new one. Therefore the
number of slices of a run can neither grow nor dwindle, whatever the broker does.

A process that works on a run without a broker claims a slot of its own, which nobody rings.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from shared.store.database import Database

QUEUE_SECONDS = 60.0  # a message older than this is given up for lost
OWN = 1 << 20  # slots from here on are claimed, not opened


@dataclass(frozen=True, slots=True)
class Bell:
    """A message that starts one slice. `kind` of the run names queue and task."""

    kind: str
    run_id: int
    slot: int
    token: int


_ALIVE = "alive_until = clock_timestamp() + make_interval(secs => :seconds)"

# MATERIALIZED: whether anything is queued is asked once a run, not once a slot.
_RING = text(f"""
    WITH wanted AS MATERIALIZED (
        SELECT id, kind FROM runs WHERE state = 'running' AND EXISTS (
            SELECT FROM work_items WHERE work_items.run_id = runs.id AND state = 'queued'
        )
    )
    UPDATE run_slots SET token = token + 1, {_ALIVE} FROM wanted
    WHERE wanted.id = run_slots.run_id AND (run_slots.run_id, slot) IN (
        SELECT run_id, slot FROM run_slots JOIN wanted ON wanted.id = run_id
        WHERE slot < {OWN} AND alive_until <= clock_timestamp()
        FOR UPDATE OF run_slots SKIP LOCKED
    )
    RETURNING kind, run_slots.run_id, slot, token
""")

_TAKE = text(f"""
    UPDATE run_slots SET token = token + 1, {_ALIVE}
    WHERE run_id = :run_id AND slot = :slot AND token = :token RETURNING token
""")

_KEEP = text(f"""
    UPDATE run_slots SET {_ALIVE} FROM runs
    WHERE run_id = :run_id AND slot = :slot AND token = :token
        AND runs.id = run_id AND state = 'running' RETURNING slot
""")

_LEAVE = text(f"""
    UPDATE run_slots SET token = token + 1, {_ALIVE} FROM runs
    WHERE run_id = :run_id AND slot = :slot AND token = :token AND runs.id = run_id
    RETURNING kind, run_id, slot, token, state = 'running' AND EXISTS (
        SELECT FROM work_items WHERE work_items.run_id = :run_id AND work_items.state = 'queued'
    ) AS wanted
""")


def open_slots(session: Session, run_id: int, n: int) -> None:
    """Give the run `n` slots (those beyond are taken away), each ready to be rung."""
    session.execute(
        text(f"DELETE FROM run_slots WHERE run_id = :run_id AND slot >= :n AND slot < {OWN}"),
        {"run_id": run_id, "n": n},
    )
    session.execute(
        text("""
            INSERT INTO run_slots (run_id, slot)
            SELECT :run_id, slot FROM generate_series(0, CAST(:n AS int) - 1) AS slot
            ON CONFLICT DO NOTHING
        """),
        {"run_id": run_id, "n": n},
    )


def ring(db: Database) -> list[Bell]:
    """Bells for the free slots of running runs with queued items; the caller publishes them."""
    with db.begin() as session:
        bells = [_bell(row) for row in session.execute(_RING, {"seconds": QUEUE_SECONDS})]
    return sorted(bells, key=lambda bell: (bell.run_id, bell.slot))


def claim(db: Database, run_id: int, seconds: float) -> Bell:
    """A slot of the caller's own, believed to be alive for `seconds`, and the bell that starts a
    slice in it. Claims whose owner died are taken away."""
    dead = text(f"""
        DELETE FROM run_slots
        WHERE run_id = :run_id AND slot >= {OWN} AND alive_until < clock_timestamp()
    """)
    made = text("""
        INSERT INTO run_slots (run_id, slot, alive_until)
        SELECT id, :slot, clock_timestamp() + make_interval(secs => :seconds)
        FROM runs WHERE id = :run_id RETURNING (SELECT kind FROM runs WHERE id = :run_id), token
    """)
    slot = OWN + secrets.randbelow(OWN)
    with db.begin() as session:
        session.execute(dead, {"run_id": run_id})
        values = {"run_id": run_id, "slot": slot, "seconds": seconds}
        kind, token = session.execute(made, values).one()
    return Bell(kind, run_id, slot, token)


def give_up(db: Database, bell: Bell) -> None:
    """End a claim."""
    ended = text("DELETE FROM run_slots WHERE run_id = :run_id AND slot = :slot")
    with db.begin() as session:
        session.execute(ended, {"run_id": bell.run_id, "slot": bell.slot})


def take(db: Database, bell: Bell, seconds: float) -> Bell | None:
    """Start a slice: the bell with its new token, or None if this message is a double or stale."""
    with db.begin() as session:
        token = session.execute(_TAKE, _values(bell, seconds)).scalar_one_or_none()
    return None if token is None else Bell(bell.kind, bell.run_id, bell.slot, token)


def keep(db: Database, bell: Bell, seconds: float) -> bool:
    """Heartbeat: false where the slot was rung anew, or the run no longer runs."""
    with db.begin() as session:
        return session.execute(_KEEP, _values(bell, seconds)).first() is not None


def leave(db: Database, bell: Bell) -> Bell | None:
    """End a slice: the bell of its successor if items are queued. Otherwise the slot is free."""
    with db.begin() as session:
        row = session.execute(_LEAVE, _values(bell, QUEUE_SECONDS)).one_or_none()
        if row is not None and row.wanted:
            return _bell(row)
        if row is not None:
            free = text("""
                UPDATE run_slots SET alive_until = clock_timestamp()
                WHERE run_id = :run_id AND slot = :slot
            """)
            session.execute(free, {"run_id": bell.run_id, "slot": bell.slot})
    return None


def _values(bell: Bell, seconds: float) -> dict[str, Any]:
    key = {"run_id": bell.run_id, "slot": bell.slot, "token": bell.token}
    return {**key, "seconds": seconds}


def _bell(row: Row[Any]) -> Bell:
    return Bell(row.kind, row.run_id, row.slot, row.token)
