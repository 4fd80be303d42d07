"""Reading a snapshot: the same checked rows from a database or from an exported folder.

    snapshot = Snapshot.open("gsm-v1", url="postgresql://...")   # or Snapshot.open("./gsm-v1")
    for entry in snapshot.rows(rank=0, world=8, start=1200):
        entry.position, entry.problem, entry.trajectory

What `rows` promises:
- The manifest's digest is checked before the first row, and each problem's key and each body's
  hash with its row: what comes out is what was frozen, or an error.
- Rows come in order of position. Rank r of w gets the positions p with p % w == r, so that ranks
  share a snapshot exactly, and a job that has seen every position below `start` goes on there,
  with any number of ranks. Workers of a rank share its rows in the same way.
- Pages are read one at a time, or a few ahead in a thread while the caller has more to do with one
  than it takes to read: memory does not grow with the snapshot.
- A lost connection is opened again, and the page that was under way is read again as a whole: no
  row is lost or doubled. The digest is checked anew, since that server may be another one.
- A snapshot may be opened before a fork and read after it: each call has a connection of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

from shared.errors import ConfigError
from shared.store.models import SnapshotKind
from shared.store.snapshot_database import PATIENCE, DatabaseSource
from shared.store.snapshot_parquet import ParquetSource
from shared.store.snapshot_rows import (
    ProblemEntry,
    Shard,
    Source,
    StoredRow,
    TrajectoryEntry,
    problem_entry,
    trajectory_entry,
    unpack,
)
from shared.store.snapshots import Record, is_folder

AHEAD = 2  # pages that are read before they are asked for
SLOW = 10.0  # a caller who has this many times as much to do with a page as it takes to read it

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen selection. Cheap to hold, to pickle and to carry over a fork."""

    source: Source

    @classmethod
    def open(
        cls, name: str | Path, url: str | None = None, *, patience: float = PATIENCE
    ) -> Snapshot:
        """The snapshot `name` of a database, or the exported one in a folder.

        A Path, or a text with a slash in it, is a folder. `url`: default as for `tirgen`.
        `patience`: seconds that the server may be away before a stream gives up.
        Raises InputError if there is no such snapshot or folder, DatabaseError if its record was
        altered or the server cannot be used, ConfigError for a bad `url`.
        """
        if is_folder(name):
            return cls(ParquetSource.open(Path(name)))
        return cls(DatabaseSource.open(str(name), url, patience))

    @property
    def record(self) -> Record:
        return self.source.record

    @property
    def digest(self) -> str:
        """What a checkpoint should carry: equal digests mean equal rows in the same order."""
        return self.record.digest

    def __len__(self) -> int:
        return self.record.n_rows

    def rows(
        self, rank: int = 0, world: int = 1, start: int = 0, *,
        worker: int = 0, workers: int = 1, split: str | None = None,
    ) -> Iterator[TrajectoryEntry]:  # fmt: skip
        """The rows of `rank` at positions >= `start`, within `split` if one is named.

        Raises ConfigError for arguments that fit no row and for a snapshot of problems; while
        reading, DatabaseError or InputError where something was altered or cannot be read.
        """
        shard = self._shard(SnapshotKind.TRAJECTORIES, rank, world, start, worker, workers, split)
        return self._entries(shard, trajectory_entry)

    def problems(
        self, rank: int = 0, world: int = 1, start: int = 0, *,
        worker: int = 0, workers: int = 1, split: str | None = None,
    ) -> Iterator[ProblemEntry]:  # fmt: skip
        """As `rows`, of a snapshot of problems."""
        shard = self._shard(SnapshotKind.PROBLEMS, rank, world, start, worker, workers, split)
        return self._entries(shard, problem_entry)

    def _shard(
        self, kind: SnapshotKind, rank: int, world: int, start: int, worker: int, workers: int,
        split: str | None,
    ) -> Shard:  # fmt: skip
        record = self.record
        if record.kind is not kind:
            call = "problems()" if record.kind is SnapshotKind.PROBLEMS else "rows()"
            what = f"snapshot {record.name} is one of {record.kind}"
            raise ConfigError(what, where="Snapshot", remedy=f"read it with .{call}")
        for index, of, what in ((rank, world, "rank"), (worker, workers, "worker")):
            if not 0 <= index < of:
                raise ConfigError(f"there is no {what} {index} of {of}", where=what,
                                  remedy="they count from 0")  # fmt: skip
        if start < 0:
            raise ConfigError(f"start is {start}", where="start", remedy="positions begin at 0")
        first, stop = record.range(split)
        # Worker after worker, row by row, gives the rank's own order.
        return Shard(rank + world * worker, world * workers, max(first, start), stop)

    def _entries(
        self, shard: Shard, checked: Callable[[StoredRow, str, bytes | None], _Entry]
    ) -> Iterator[_Entry]:
        where = f"snapshot {self.record.name}"
        for page in _ahead(self.source, shard):
            for row, plain in page:
                yield checked(row, where, plain)


Page = list[tuple[StoredRow, bytes | None]]


def _ahead(source: Source, shard: Shard) -> Iterator[Page]:
    """The shard's pages, AHEAD of them read and unpacked in a thread while the caller works.

    A caller that does little with a page is better served without: two threads that both want the
    interpreter take longer together than one after the other.
    """
    stop = Event()
    pages = source.pages(shard, stop)

    def read() -> tuple[Page | None, float]:
        began = time.monotonic()
        page = next(pages, None)
        unpacked = None if page is None else list(zip(page, unpack(page), strict=True))
        return unpacked, time.monotonic() - began

    with ThreadPoolExecutor(1, thread_name_prefix="snapshot") as pool:
        waiting: deque[Future[tuple[Page | None, float]]] = deque()
        is_slow = True
        try:
            while True:
                page, took = waiting.popleft().result() if waiting else read()
                if page is None:
                    return
                while is_slow and len(waiting) < AHEAD:
                    waiting.append(pool.submit(read))
                began = time.monotonic()
                yield page
                is_slow = time.monotonic() - began > SLOW * took
        finally:
            stop.set()
            for unread in waiting:
                unread.cancel()
            pool.submit(pages.close)  # type: ignore[attr-defined]
