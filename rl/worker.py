"""The trainer's Celery worker: takes training jobs from queues, one at a time per process.

A message names a job and is acknowledged before anything else happens. The row decides
(rl/job_rows.py): a doubled message finds the job taken, a lost one is sent again by the next worker
that has nothing to do. Training runs in processes of its own (rl/supervisor.py), since a pool's
process may be none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NoReturn

from celery import Celery

from rl import job_rows
from rl.supervisor import SAVE_SECONDS, supervise
from shared.errors import DatabaseError
from shared.store.database import Database
from shared.work import celery_app
from shared.work.celery_app import Message

QUEUE = "train"
TASK = "train.job"
DRAIN_SECONDS = SAVE_SECONDS + 30.0

log = logging.getLogger(__name__)


def register_training(app: Celery, db: Database) -> None:
    """Make this application's workers able to run training jobs."""

    def train(job_id: int) -> None:
        state = supervise(db, job_id, celery_app.stopping)
        if state is not None:
            log.warning("job %d is %s", job_id, state)

    app.task(train, name=TASK)


def run(app: Celery, db: Database, queues: Sequence[str], processes: int) -> NoReturn:
    """Be a worker of these queues until SIGTERM, then save, give back and end this process."""

    def upkeep(idle: int) -> list[Message]:
        for swept in job_rows.sweep(db):
            log.warning("job %s is %s: %s", swept.name, swept.state, swept.why)
        return _messages(db, queues, idle) if idle > 0 else []

    celery_app.run_worker(app, db, queues, processes, upkeep=upkeep, drain_seconds=DRAIN_SECONDS)


def ring(db: Database, queues: Sequence[str]) -> None:
    """Tell the workers of these queues that jobs wait. Raises BrokerError, but loses nothing."""
    app = celery_app.make_app(db)
    celery_app.prepare_broker(db, app)
    celery_app.send(app, _messages(db, queues, n=1000))


def _messages(db: Database, queues: Sequence[str], n: int) -> list[Message]:
    try:
        waiting = job_rows.ring(db, queues, n)
    except DatabaseError as error:
        log.warning("%s", error)
        return []
    return [Message(TASK, (job_id,), queue) for job_id, queue in waiting]
