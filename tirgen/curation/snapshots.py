"""What can be done with snapshots: the same for the command line and for `tirgen.Client`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.store import Database, Snapshot
from shared.store import snapshots as store
from shared.store.models import SnapshotKind
from shared.store.snapshots import Record
from tirgen.curation import audit, folders, freeze
from tirgen.curation.audit import Difference, Report


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots of one database. Names are theirs alone; nothing is ever overwritten."""

    db: Database

    def create(
        self, name: str, *, where: str = "", filters: str | None = None, seed: int = 0,
        kind: str = SnapshotKind.TRAJECTORIES, splits: Mapping[str, float] | None = None,
    ) -> Record:  # fmt: skip
        """Freeze the trajectories that `where` selects and `filters` let through, shuffled by seed.

        `filters`: a preset or a file. `kind`: "trajectories", or "problems" with their measured
        difficulty. `splits`: shares by name, summing to 1; a problem is in one split only.
        Raises as `tirgen.curation.freeze.create` does.
        """
        shares = {} if splits is None else {"shares": splits}
        request = freeze.Request(name, where, filters, seed, SnapshotKind(kind), **shares)
        return freeze.create(self.db, request)

    def list(self) -> list[Record]:
        """Newest first."""
        with self.db.session() as session:
            return store.records(session)

    def show(self, name: str) -> Record:
        """Raises InputError if there is none of that name."""
        with self.db.session() as session:
            return store.find(session, name)[1]

    def open(self, name: str | Path) -> Snapshot:
        """For reading rows: `for entry in snapshots.open(name).rows(): ...`."""
        return Snapshot.open(name, self.db.url.render_as_string(hide_password=False))

    def verify(self, name: str | Path, execute: bool = False) -> Report:
        """Of a snapshot, or of an exported one where `name` is a folder (a Path, or with a '/')."""
        if store.is_folder(name):
            return audit.verify_folder(Path(name), execute)
        return audit.verify(self.db, str(name), execute)

    def diff(self, first: str, second: str) -> Difference:
        return audit.difference(self.db, first, second)

    def export(self, name: str, to: str | Path) -> Record:
        """Into a folder of Parquet shards that `datasets.load_dataset` reads."""
        return folders.export(self.db, name, Path(to))

    def import_(self, folder: str | Path) -> Record:
        """An exported snapshot, with its runs and trajectories and the same digest."""
        return folders.import_(self.db, Path(folder))

    def delete(self, name: str) -> Record:
        """The record and the manifest; trajectories stay."""
        with self.db.begin() as session:
            return store.delete(session, name)
