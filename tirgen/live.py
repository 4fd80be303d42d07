"""What a worker process tells of itself while it works on a run, and the limits it holds it to.

Beside the slice: how each server is doing goes into `endpoint_status`, one row a server, and the
run is stopped if it has reached a limit (tirgen/budgets.py). The sandbox is one of the servers. A
database that is away only makes the next look later: the slice itself finds out, and says so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import insert

from shared.endpoints import Endpoint
from shared.errors import DatabaseError
from shared.sandbox.backend import Backend
from shared.store.database import Database
from shared.store.models import EndpointStatusRow, RunRow
from tirgen import budgets

SECONDS = 5.0  # between two rows
LOOK = 1.0  # seconds between two looks at the limits
SANDBOX = "sandbox"  # its role
FRESH = 20.0  # seconds; an older row is of a process that is gone
SHARE = 0.02  # of the time, at most, goes into adding up what the run has cost

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """A line of `tirgen status`: one server as one worker process sees it."""

    run: str
    owner: str
    roles: str
    model: str
    base_url: str
    max_in_flight: int
    in_flight: int
    breaker: str
    requests_per_second: float
    tokens_per_second: float
    latency: float


def servers(db: Database) -> list[Server]:
    """Those that were seen lately."""
    row = EndpointStatusRow
    names = [name for name in Server.__slots__ if name != "run"]
    statement = (
        select(RunRow.name, *(getattr(row, name) for name in names))
        .join(RunRow, RunRow.id == row.run_id)
        .where(row.seen_at > func.clock_timestamp() - text(f"interval '{FRESH:.0f} seconds'"))
        .order_by(row.base_url, row.owner, row.roles)
    )
    with db.session() as session:
        return [Server(*found) for found in session.execute(statement)]


@asynccontextmanager
async def watched(
    db: Database, run_id: int, endpoints: Mapping[str, Endpoint], sandbox: Tool
) -> AsyncIterator[None]:
    """`endpoints`: by the roles that each plays. Looks at the limits once before it begins."""
    await asyncio.to_thread(_hold, db, run_id)
    watcher = asyncio.create_task(_watch(db, run_id, endpoints, sandbox))
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
        if not watcher.cancelled() and (error := watcher.exception()) is not None:
            log.error("nobody watched the run's limits", exc_info=error)


async def _watch(
    db: Database, run_id: int, endpoints: Mapping[str, Endpoint], sandbox: Tool
) -> None:
    next_look, next_row = 0.0, time.monotonic() + SECONDS
    while True:
        await asyncio.sleep(min(LOOK, SECONDS))
        began = time.monotonic()
        if began >= next_look:
            await asyncio.to_thread(_hold, db, run_id)
            next_look = began + (time.monotonic() - began) / SHARE
        if began < next_row:
            continue
        next_row = began + SECONDS
        rows = [
            {
                "roles": roles,
                "base_url": url,
                "model": endpoint.config.model,
                "max_in_flight": view.limit,
                "in_flight": view.in_flight,
                "breaker": view.breaker,
                "requests_per_second": view.requests,
                "tokens_per_second": view.tokens,
                "latency": view.latency,
            }
            for roles, endpoint in endpoints.items()
            for url, view in endpoint.view().items()
        ]
        await asyncio.to_thread(_tell, db, run_id, [*rows, sandbox.row()])


class Tool:
    """The sandbox as one of the servers. `url`: where it is, None for this host's own."""

    def __init__(self, sandbox: Backend, url: str | None) -> None:
        self.sandbox, self.url = sandbox, url
        self._seen = (time.monotonic(), 0, 0.0)

    def row(self) -> dict[str, object]:
        """How it did since it was asked the last time."""
        load, now = self.sandbox.load, time.monotonic()
        then, ended, seconds = self._seen
        self._seen = now, load.ended, load.seconds
        n = load.ended - ended
        return {
            "roles": SANDBOX,
            "base_url": self.url or "its host",
            "model": f"tier {self.sandbox.tier}",
            "max_in_flight": load.places,
            "in_flight": load.asked,
            "breaker": "closed",
            "requests_per_second": n / (now - then) if now > then else 0.0,
            "tokens_per_second": 0.0,
            "latency": (load.seconds - seconds) / n if n else 0.0,
        }


def _tell(db: Database, run_id: int, rows: list[dict[str, object]]) -> None:
    owner = f"{socket.gethostname()}:{os.getpid()}"
    made = insert(EndpointStatusRow)
    news = {name: made.excluded[name] for name in [*rows[0], "run_id"]}
    upsert = made.on_conflict_do_update(
        index_elements=["owner", "roles", "base_url"],
        set_={**news, "seen_at": func.clock_timestamp()},
    )
    seen = EndpointStatusRow.seen_at
    old = delete(EndpointStatusRow).where(seen < func.clock_timestamp() - text("interval '1 hour'"))
    try:
        with db.begin() as session:
            session.execute(old)
            session.execute(upsert, [{"owner": owner, "run_id": run_id, **row} for row in rows])
    except DatabaseError as error:
        log.warning("%s", error)


def _hold(db: Database, run_id: int) -> None:
    try:
        reason = budgets.hold(db, run_id)
    except DatabaseError as error:
        log.warning("%s", error)
        return
    if reason is not None:
        log.info("the run is stopped", extra={"reason": reason})
