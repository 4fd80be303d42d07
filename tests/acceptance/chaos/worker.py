"""The worker of a chaos run: tirgen's own, with a clock about five times as fast.

What is different from `tirgen worker` is in `main`: times, how many lives an item costs that kills
its process, and a sandbox that preloads nothing, because it is started hundreds of times.
Arguments: processes, seconds by which its clock is wrong.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.sandbox import Sandbox
from shared.store import Completed, Database, resolve_url
from shared.work import celery_app, items, slots
from shared.work.items import Failed, LeasedItem
from shared.work.slices import Handler, OpenHandler, RunInfo, SliceSettings
from tirgen.runs import KIND
from tirgen.worker import generator

IN_FLIGHT = 8
LEASE, GRACE, DRAIN = 6.0, 3.0, 12.0
POISON = "POISON"
SETTINGS = SliceSettings(
    in_flight=IN_FLIGHT,
    slice_seconds=60.0,
    item_seconds=60.0,
    grace_seconds=GRACE,
    lease_seconds=LEASE,
    heartbeat_seconds=1.0,
)


def poisonable(opened: OpenHandler) -> OpenHandler:
    @asynccontextmanager
    async def open_handler(run: RunInfo) -> AsyncIterator[Handler]:
        async with opened(run) as handler:

            async def handle(item: LeasedItem) -> Completed | Failed:
                if POISON in item.problem.text:
                    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does without memory
                return await handler(item)

            yield handle

    return open_handler


def main() -> None:
    processes, wrong_by = int(sys.argv[1]), float(sys.argv[2])
    # All that Celery, kombu and we ask for. libfaketime makes Python's own sleep fail.
    true_time, true_ns = time.time, time.time_ns
    time.time = lambda: true_time() + wrong_by
    time.time_ns = lambda: true_ns() + int(wrong_by * 1e9)
    Sandbox.__init__.__kwdefaults__.update(zygotes=1, preload=(), warmup="")
    logging.basicConfig(format="%(process)d %(levelname)s %(message)s")
    slots.QUEUE_SECONDS = 12.0
    items.MAX_KILLS = items.SUSPECT_KILLS + 2
    celery_app.RING_SECONDS = 1.0
    db = Database(resolve_url())
    app = celery_app.make_app(db)
    celery_app.prepare_broker(db, app)
    celery_app.check_broker(app)
    celery_app.register_slices(app, db, KIND, poisonable(generator(db)), lambda run: SETTINGS)
    celery_app.run_worker(app, db, [KIND], processes, drain_seconds=DRAIN)


if __name__ == "__main__":
    main()
