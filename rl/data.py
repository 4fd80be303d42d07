"""From a snapshot to training rows and prompts: streamed, checked, resumable at an exact row.

A window is what one optimizer step trains on: a fixed range of the snapshot's positions, whatever
the number of ranks. Every rank reads and renders its share of a window, and then all of them know
all of its rows: who trains on which is `rl.packing.pack`'s to say, by length. A row that cannot be
trained on (too long, of the other mode of thinking, ...) leaves a gap in its window and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from rl.config import DataConfig
from rl.packing import TrainRow, train_row
from rl.render import Renderer
from rl.world import World
from shared.errors import ConfigError, InputError
from shared.segments import SAMPLED, Kind
from shared.store.models import SnapshotKind
from shared.store.snapshot_reader import Snapshot
from shared.store.snapshot_rows import TrajectoryEntry
from shared.trajectory import Problem

NANO = "nano"  # in place of a snapshot's name: the demonstrations of `rl.nano`


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where a job stands in its data: the next row of the `epoch`-th pass (both from 0)."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of one optimizer step, in order; `after` is where the next window begins."""

    rows: tuple[TrainRow, ...]
    left_out: Counter[str]
    after: Position


class Source(Protocol):
    """Where rows come from. `digest` names the data; None where they are made up on the fly."""

    digest: str | None

    def __len__(self) -> int: ...

    def windows(self, start: Position, epochs: int, size: int) -> Iterator[Window]:
        """Windows of `size` rows from `start` to the end of the last epoch, on every rank alike."""
        ...


class SnapshotSource:
    """Trajectories of a snapshot as training rows; `learn` are the kinds that carry loss."""

    def __init__(
        self, config: DataConfig, renderer: Renderer, world: World, *, observations: bool
    ) -> None:
        """Raises InputError, DatabaseError or ConfigError where the snapshot cannot be used."""
        self.snapshot = Snapshot.open(config.snapshot, config.url)
        if self.snapshot.record.kind is not SnapshotKind.TRAJECTORIES:
            raise ConfigError(
                f"Snapshot {config.snapshot} holds problems, and SFT needs trajectories.",
                where="data.snapshot",
                remedy="tirgen snapshot create NAME --kind trajectories",
            )
        self.digest: str | None = self.snapshot.digest
        self.config, self.renderer, self.world = config, renderer, world
        self.learn = SAMPLED | ({Kind.OBSERVATION} if observations else frozenset())
        self.first, self.stop = self.snapshot.record.range(config.split)

    def __len__(self) -> int:
        return self.stop - self.first

    def windows(self, start: Position, epochs: int, size: int) -> Iterator[Window]:
        row = start.row
        for epoch in range(start.epoch, epochs):
            mine = _Ahead(
                self.snapshot.rows(
                    self.world.rank, self.world.size, self.first + row, split=self.config.split
                )
            )
            while row < len(self):
                row = min(row + size, len(self))
                last = row == len(self)
                after = Position(epoch + 1, 0) if last else Position(epoch, row)
                yield self._window(mine.below(self.first + row), after)
            row = 0

    def _window(self, entries: Iterable[TrajectoryEntry], after: Position) -> Window:
        rows: list[tuple[int, TrainRow]] = []
        left_out = Counter[str]()
        for entry in entries:
            row = self._row(entry)
            if isinstance(row, TrainRow):
                rows.append((entry.position, row))
            else:
                left_out[row] += 1
        parts = self.world.gather((rows, left_out))
        every = sorted((one for part, _ in parts for one in part), key=lambda one: one[0])
        counts = sum((counts for _, counts in parts), Counter[str]())
        return Window(tuple(row for _, row in every), counts, after)

    def _row(self, entry: TrajectoryEntry) -> TrainRow | str:
        """The row, or the reason why there is none."""
        try:
            segments = self.renderer.render(entry.problem.text, entry.trajectory)
        except InputError as error:
            return error.what
        row = train_row(segments, self.learn)
        if len(row.ids) > self.config.max_length:
            return f"longer than data.max_length = {self.config.max_length}"
        return row if row.n_loss else "nothing to learn"


class _Ahead:
    """Entries in order of position, taken up to a bound at a time."""

    def __init__(self, entries: Iterator[TrajectoryEntry]) -> None:
        self.entries = entries
        self.waiting: TrajectoryEntry | None = None

    def below(self, stop: int) -> Iterator[TrajectoryEntry]:
        while True:
            entry = self.waiting or next(self.entries, None)
            self.waiting = None
            if entry is None:
                return
            if entry.position >= stop:
                self.waiting = entry
                return
            yield entry


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem to be solved in a rollout, and how many prompts came before it in this job."""

    number: int
    problem: Problem


class Prompts:
    """The problems of a snapshot, again and again, in the snapshot's own (seeded) order.

    Either kind of snapshot will do; of trajectories, each problem is taken once. On every rank all.
    """

    def __init__(self, config: DataConfig, split: str | None) -> None:
        """Raises InputError, DatabaseError or ConfigError where the snapshot cannot be used."""
        snapshot = Snapshot.open(config.snapshot, config.url)
        self.digest = snapshot.digest
        if snapshot.record.kind is SnapshotKind.PROBLEMS:
            problems = [entry.problem for entry in snapshot.problems(split=split)]
        else:
            problems = [entry.problem for entry in snapshot.rows(split=split)]
        self.problems = list({problem.key: problem for problem in problems}.values())
        if not self.problems:
            raise ConfigError(
                f"There are no problems in {config.snapshot}, split {split}.",
                where="data.snapshot, data.split",
                remedy="`tirgen snapshot show NAME` lists its splits with their sizes",
            )

    def __len__(self) -> int:
        return len(self.problems)

    def take(self, start: int, n: int) -> list[Prompt]:
        """Prompts number start..start+n-1."""
        return [Prompt(i, self.problems[i % len(self.problems)]) for i in range(start, start + n)]
