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

alone = client.generate("nano", limit=50, samples=4, config=client.configure(tool=False))
client.wait(alone)                    # what the reasoner solves without the tool
print(client.curate("paper", where=f'run == "{run}"', seed=1).stages)
again = client.generate(client.problems(snapshot="first", unsolved_by=alone))
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.problems import load_problems
from shared.store import Database, resolve_url
from shared.store.migrate import upgrade
from shared.store.models import RunState
from shared.store.queries import Funnel, find_run, funnel
from shared.store.trajectories import read
from shared.trajectory import Problem, Trajectory
from tirgen import query, runs
from tirgen.config import RunConfig, load
from tirgen.curation.chain import Chain, Curated, apply
from tirgen.curation.chain import load as load_chain
from tirgen.curation.problems import stored, unsolved
from tirgen.curation.snapshots import Snapshots
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
        tool: bool = True,
    ) -> RunConfig:
        """A run's configuration; nano's server is started where nothing else is named.

        Without the `tool` the reasoner is alone: such a run measures, and vets nothing.
        """
        settings = [*settings, *([] if tool else ["budgets.calls=0"])]
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
        fields: Mapping[str, str] | None = None,
    ) -> str:
        """Start a run in the background and return its name.

        `fields`: which column of the source is what, {"problem": "question"}. Raises InputError,
        ConfigError, BrokerError or EndpointError before anything is written.
        """
        if isinstance(source, str):
            problems: Sequence[Problem] = list(load_problems(source, limit, fields))
        else:
            problems = source
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

    def problems(
        self, *, among: Sequence[Problem] = (), snapshot: str | None = None,
        where: str | None = None, unsolved_by: str | None = None, max_rate: float = 0.0,
    ) -> list[Problem]:  # fmt: skip
        """Problems for another run: `among`, and those of a snapshot or of an expression.

        With `unsolved_by` only those with a pass rate of at most `max_rate` in that run; of its own
        problems if no others are named. Raises InputError where none is left.
        """
        found = list(among)
        if snapshot is not None or where is not None:
            found += stored(self.db, snapshot=snapshot, where=where)
        elif unsolved_by is not None and not found:
            found += stored(self.db, run=unsolved_by)
        if unsolved_by is None:
            return found
        return unsolved(self.db, found, unsolved_by, max_rate)

    def curate(self, filters: str | Path | Chain, where: str = "", seed: int = 0) -> Curated:
        """Let what `where` selects pass through a chain of filters: a preset, a file, a Chain.

        Every decision is stored. Raises ConfigError for a chain or expression that is not valid.
        """
        chosen = filters if isinstance(filters, Chain) else load_chain(filters)
        candidates = query.candidates(self.db, where)
        return apply(self.db, chosen, candidates, seed=seed)

    def trajectory(self, id: int) -> Trajectory:
        """One stored trajectory. Raises DatabaseError if there is none."""
        with self.db.session() as session:
            return read(session, id)
