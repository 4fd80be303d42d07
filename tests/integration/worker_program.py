"""A program with a Celery worker, as small as can be; its handler does what the problem says.

A problem whose text begins with "/" waits until that file exists; one that begins with "hang" stops
the event loop for good. Arguments: processes, in_flight, slice_seconds, grace_seconds and
drain_seconds. The database is TIRGEN_DATABASE_URL.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shared.store import Completed, Database, resolve_url
from shared.trajectory import End, Trajectory
from shared.work.celery_app import make_app, prepare_broker, register_slices, run_worker
from shared.work.items import LeasedItem
from shared.work.slices import Handler, RunInfo, SliceSettings


async def handle(item: LeasedItem) -> Completed:
    gate = item.problem.text.split()[0]
    while gate.startswith("/") and not Path(gate).exists():  # noqa: ASYNC110 (another process's)
        await asyncio.sleep(0.02)
    if gate == "hang":
        time.sleep(3600)  # noqa: ASYNC251 (that is the fault)
    await asyncio.sleep(0.01)
    made = Trajectory(
        item.problem.key, (), "", End.ANSWERED, item.problem.answer, False, item.sample_index, 1
    )
    return Completed(made, (), None, 0.0, "none", None, "test")


@asynccontextmanager
async def open_handler(run: RunInfo) -> AsyncIterator[Handler]:
    yield handle


def main() -> None:
    processes, in_flight = int(sys.argv[1]), int(sys.argv[2])
    settings = SliceSettings(
        in_flight=in_flight,
        slice_seconds=float(sys.argv[3]),
        grace_seconds=float(sys.argv[4]),
        lease_seconds=2.0,
        heartbeat_seconds=0.3,
    )
    db = Database(resolve_url())
    app = make_app(db)
    prepare_broker(db, app)
    register_slices(app, db, "generate", open_handler, lambda run: settings)
    run_worker(app, db, ["generate"], processes, drain_seconds=float(sys.argv[5]))


if __name__ == "__main__":
    main()
