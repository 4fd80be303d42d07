"""One slice: about a minute of work on one run, in one event loop.

Contract. A slice leases items, keeps a constant number of them in flight, extends its leases, and
ends: after `slice_seconds`, when nothing is queued, when the run is cancelled, or when the process
is told to stop (then what is in flight gets `grace_seconds`, and the rest is given back). Results
are written as they come. What becomes of one item is the handler's business alone; a handler that
raises, or hands over what cannot be stored, fails that item and nothing else.

A slice may be killed at any instant: its leases run out and others take the items.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from shared.errors import DatabaseError
from shared.store.database import Database
from shared.store.models import ItemState, RunRow
from shared.store.trajectories import Completed
from shared.telemetry import about
from shared.tracing import Span, span
from shared.work import items, slots
from shared.work.items import Failed, LeasedItem, LeaseLost
from shared.work.slots import Bell

TICK = 0.2  # seconds between looks at the stop flag and the clock
IDLE = 1.0  # seconds between looks for items when the queue was empty
GRACE_SECONDS = 20.0  # for items in flight when the process must stop
INTERNAL = "internal"  # error class of a handler that raised
TIMEOUT = "item_timeout"  # error class of an item that took longer than `item_seconds`

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a handler needs to know of the run."""

    id: int
    name: str
    kind: str
    config: Mapping[str, Any]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class SliceSettings:
    in_flight: int = 32  # items worked on at once
    slice_seconds: float = 60.0  # after that, no new items
    item_seconds: float = 1800.0  # after that, an item fails
    grace_seconds: float = GRACE_SECONDS
    lease_seconds: float = 30.0  # a dead worker's items wait so long; a live one extends in time
    heartbeat_seconds: float = 5.0


Handler = Callable[[LeasedItem], Awaitable[Completed | Failed]]
OpenHandler = Callable[[RunInfo], AbstractAsyncContextManager[Handler]]


async def run_slice(
    db: Database,
    bell: Bell,
    open_handler: OpenHandler,
    settings_of: Callable[[RunInfo], SliceSettings],
    stopping: Callable[[], bool],
) -> Bell | None:
    """Work on the run that `bell` names; return the bell of the successor if work remains.

    None also where the bell is stale, or of another database. Raises DatabaseError if the database
    stays away for longer than a lease lasts, and whatever `open_handler` raises.
    """
    run = await asyncio.to_thread(_run_info, db, bell.run_id)
    if run is None:
        return None
    settings = settings_of(run)
    taken = await asyncio.to_thread(slots.take, db, bell, settings.lease_seconds)
    if taken is None:
        return None
    with about(run=run.name, slot=bell.slot):
        async with AsyncExitStack() as stack:
            async with _kept(db, taken, settings):
                handler = await stack.enter_async_context(open_handler(run))
            if not await asyncio.to_thread(slots.keep, db, taken, settings.lease_seconds):
                return await asyncio.to_thread(slots.leave, db, taken)  # no longer to be worked on
            await _Slice(db, taken, handler, settings, stopping).work()
    await asyncio.to_thread(items.finish, db, bell.run_id)
    return await asyncio.to_thread(slots.leave, db, taken)


@asynccontextmanager
async def _kept(db: Database, taken: Bell, settings: SliceSettings) -> AsyncIterator[None]:
    """Keep the slot while the block runs: on a busy host a sandbox takes long to open, and a slot
    that is given to another meanwhile is one in which nobody ever gets to work."""

    async def keep() -> None:
        while True:
            await asyncio.sleep(settings.heartbeat_seconds)
            with suppress(DatabaseError):  # the slice itself finds out, and says so
                await asyncio.to_thread(slots.keep, db, taken, settings.lease_seconds)

    keeper = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.wait([keeper])


class _Slice:
    def __init__(
        self,
        db: Database,
        bell: Bell,
        handler: Handler,
        settings: SliceSettings,
        stopping: Callable[[], bool],
    ) -> None:
        self.db, self.bell, self.handler, self.settings = db, bell, handler, settings
        self.stopping = stopping
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.tasks: dict[asyncio.Task[None], LeasedItem] = {}
        self.last: LeasedItem | None = None  # where in the queue to go on
        self.alone = False  # what is in flight is suspected of killing its workers

    async def work(self) -> None:
        started = last_beat = time.monotonic()
        next_lease = 0.0
        stop_at: float | None = None
        try:
            while True:
                now = time.monotonic()
                if stop_at is None and self.stopping():
                    stop_at = now + self.settings.grace_seconds
                if stop_at is not None and now >= stop_at:
                    return
                self.alone = self.alone and bool(self.tasks)
                in_time = stop_at is None and now < started + self.settings.slice_seconds
                leasing = in_time and not self.alone
                wanted = self.settings.in_flight - len(self.tasks)
                due = now >= next_lease or not self.tasks
                if leasing and due and wanted and wanted > await self._lease(wanted):
                    next_lease = time.monotonic() + IDLE
                if not self.tasks:
                    return
                await asyncio.wait(self.tasks, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
                self._collect()
                if time.monotonic() >= last_beat + self.settings.heartbeat_seconds:
                    last_beat = time.monotonic()
                    if not await self._heartbeat():
                        return
        finally:
            await self._abandon()

    async def _lease(self, n: int) -> int:
        leased = await self._take(n, after=self.last)
        if not leased and self.last is not None:
            leased = await self._take(n)  # what has come back meanwhile
        self.last = leased[-1] if len(leased) == n else None
        if not leased and not self.tasks:
            leased = await self._take(1, suspect=True)
            self.alone = bool(leased)
        for item in leased:
            self.tasks[asyncio.create_task(self._one(item))] = item
        return len(leased)

    async def _take(
        self, n: int, *, suspect: bool = False, after: LeasedItem | None = None
    ) -> list[LeasedItem]:
        lease, seconds = items.lease, self.settings.lease_seconds
        run_id, owner = self.bell.run_id, self.owner
        return await self._patiently(
            lease, self.db, run_id, owner, n, seconds, suspect=suspect, after=after
        )

    async def _one(self, item: LeasedItem) -> None:
        """From handler to row. Only DatabaseError, LeaseLost and cancellation come out."""
        with about(item=item.id, attempt=item.attempt), span("item") as recorded:
            await self._settle(item, recorded)

    async def _settle(self, item: LeasedItem, recorded: Span) -> None:
        outcome: Completed | Failed
        limit = asyncio.timeout(self.settings.item_seconds)
        try:
            async with limit:
                outcome = await self.handler(item)
        except Exception:  # noqa: BLE001 (recorded with the item, which would vanish otherwise)
            outcome = self._too_long() if limit.expired() else _internal()
        if isinstance(outcome, Completed):
            try:
                made = await self._patiently(items.complete, self.db, item, outcome)
            except (DatabaseError, LeaseLost):
                raise
            except Exception:  # noqa: BLE001 (as above: a result that cannot be stored)
                outcome = _internal()
            else:
                state = ItemState.REJECTED if outcome.rejected_by else ItemState.VETTED
                extra = {"trajectory": made, "state": state, "check": outcome.rejected_by}
                log.info("item finished", extra=extra | {"seconds": outcome.duration})
                recorded.set_attributes({"tirgen.trajectory": made, "tirgen.state": str(state)})
                return
        state = await self._patiently(items.fail, self.db, item, outcome)
        error = {"error_class": outcome.error_class, "error_text": outcome.text[:500]}
        log.info("item failed", extra=error | {"state": state})
        recorded.set_attributes({"error.type": outcome.error_class, "tirgen.state": str(state)})

    def _too_long(self) -> Failed:
        limit = f"item_seconds = {self.settings.item_seconds:g}"
        return Failed(TIMEOUT, f"not finished within {limit}", retryable=True)

    def _collect(self) -> None:
        for task in [task for task in self.tasks if task.done()]:
            item = self.tasks.pop(task)
            error = None if task.cancelled() else task.exception()
            if isinstance(error, LeaseLost):
                log.warning("%s", error)
            elif error is not None:
                self.tasks[task] = item  # not settled: its lease must run out or be given back
                raise error

    async def _heartbeat(self) -> bool:
        """Extend slot and leases, drop what was lost; false if the slice must end."""
        seconds = self.settings.lease_seconds
        if not await self._patiently(slots.keep, self.db, self.bell, seconds):
            return False
        mine = list(self.tasks.values())
        held = await self._patiently(items.heartbeat, self.db, mine, self.owner, seconds)
        for task, item in self.tasks.items():
            if item.id not in held:
                task.cancel()  # swept, cancelled, or settled this moment: then it is done already
        return True

    async def _abandon(self) -> None:
        """Cancel what is in flight and give it back; nothing is left at a regular end."""
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)
            await asyncio.to_thread(items.give_back, self.db, list(self.tasks.values()))

    async def _patiently(
        self, call: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs
    ) -> T:
        """Outlast a restart of the database, but no longer than our leases do."""
        deadline = time.monotonic() + self.settings.lease_seconds
        while True:
            try:
                return await asyncio.to_thread(call, *arguments, **keywords)
            except DatabaseError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("trying again: %s", error.what)
            await asyncio.sleep(IDLE)


def slice_in_process(
    db: Database,
    bell: Bell,
    open_handler: OpenHandler,
    settings_of: Callable[[RunInfo], SliceSettings],
    stopping: Callable[[], bool],
) -> Bell | None:
    """`run_slice` in an event loop of its own, in the main thread.

    SIGTERM to this process stops it in order; then the signal takes its usual course.
    """
    told: list[bool] = []

    async def main() -> Bell | None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.append, True)
        stop = lambda: bool(told) or stopping()  # noqa: E731
        return await run_slice(db, bell, open_handler, settings_of, stop)

    try:
        return asyncio.run(main())
    finally:
        if told:
            os.kill(os.getpid(), signal.SIGTERM)


def _run_info(db: Database, run_id: int) -> RunInfo | None:
    with db.session() as session:
        run = session.get(RunRow, run_id)
        if run is None:
            return None
        return RunInfo(run.id, run.name, run.kind, run.config, run.fingerprint)


def _internal() -> Failed:
    """The exception being handled, as the failure of an item."""
    return Failed(INTERNAL, traceback.format_exc(limit=-20)[-20_000:], retryable=True)
