"""What the command line does, for notebooks and programs.

from tirgen import Client

client = Client()                     # the embedded stack, or TIRGEN_DATABASE_URL and friends
run = client.generate("nano", limit=50)
client.wait(run)
for row in client.query(f'run == "{run}" and vetted', columns=("id", "answer")):
    print(row)
print(client.trajectory(row["id"]).text)

client.snapshots.create("first", where=f'run == "{run}" and vetted', seed=1)
client.snapshots.export("first", to="exports/first")
for entry in client.snapshots.open("first").rows():
    print(entry.position, entry.problem.text, entry.trajectory.answer)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.store import Database, resolve_url
from shared.store.migrate import upgrade
from shared.store.models import RunState
from shared.store.queries import Funnel, find_run, funnel
from shared.store.trajectories import read
from shared.trajectory import Problem, Trajectory
from tirgen import query, runs
from tirgen.config import RunConfig, load
from tirgen.curation.snapshots import Snapshots
from tirgen.problems import load_problems
from tirgen.stack import Stack

WORKER_SECONDS = 5.0  # how often a watcher looks whether there is still a worker


class Client:
    """Creating it brings the database up and its schema up to date.

    `snapshots`: what `tirgen snapshot` does (`tirgen.curation.snapshots.Snapshots`).
    """

    def __init__(self, url: str | None = None) -> None:
        self.stack = Stack()
        self.db = Database(url or resolve_url())
        upgrade(self.db)
        self.snapshots = Snapshots(self.db)

    def configure(
        self,
        preset: str = "nano",
        file: Path | None = None,
        settings: Iterable[str] = (),
        base_url: str | None = None,
        model: str | None = None,
    ) -> RunConfig:
        """A run's configuration; nano's server is started where nothing else is named."""
        base_url = base_url or self.stack.base_url
        if preset.startswith("nano") and base_url is None:
            base_url = self.stack.start_nano()
        return load(preset, file, settings, base_url, model)

    def generate(
        self,
        source: str | Sequence[Problem],
        *,
        config: RunConfig | None = None,
        run: str | None = None,
        samples: int = 1,
        limit: int | None = None,
        slots: int = 1,
    ) -> str:
        """Start a run in the background and return its name.

        Raises InputError, ConfigError, BrokerError or EndpointError before anything is written.
        """
        problems = list(load_problems(source, limit)) if isinstance(source, str) else source
        config = config or self.configure()
        runs.preflight(self.db, config)
        name = run or f"run-{datetime.now():%m%d-%H%M%S}"
        runs.start(self.db, name, config, problems[:limit], samples, slots)
        self.work()
        return name

    def work(self) -> None:
        """Ring the bell and see to it that a worker hears it."""
        runs.ring(self.db)
        self.stack.start_worker()

    def progress(self, run: str) -> Iterator[Funnel]:
        """Where the run stands, again and again until it ends; replaces a worker that died."""
        with self.db.session() as session:
            run_id = find_run(session, run).id
        looked = time.monotonic()
        while True:
            with self.db.session() as session:
                now = funnel(session, run_id)
            yield now
            if now.state is not RunState.RUNNING:
                return
            if time.monotonic() - looked > WORKER_SECONDS:
                looked = time.monotonic()
                self.stack.start_worker()  # which sweeps leases and rings again by itself
            time.sleep(0.5)

    def wait(self, run: str) -> Funnel:
        """Block until the run ends; returns its funnel."""
        *_, last = self.progress(run)
        return last

    def query(
        self, where: str = "", columns: Sequence[str] = query.DEFAULT_COLUMNS,
        order: Sequence[str] = (), limit: int | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Rows of `tirgen query`, as dictionaries."""
        wanted = query.Query(where, tuple(columns), tuple(order), limit)
        with query.run(self.db, wanted) as rows:
            return [dict(zip(columns, row, strict=True)) for row in rows]

    def trajectory(self, id: int) -> Trajectory:
        """One stored trajectory. Raises DatabaseError if there is none."""
        with self.db.session() as session:
            return read(session, id)
