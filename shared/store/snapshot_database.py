"""A snapshot in PostgreSQL: its manifest and its pages, over a connection that may be lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import Any, TypeVar

import psycopg
from psycopg.errors import QueryCanceled
from psycopg.rows import tuple_row

from shared.errors import DatabaseError
from shared.store import migrate
from shared.store.database import Database, resolve_url
from shared.store.snapshot_rows import PAGE, Shard, StoredRow
from shared.store.snapshots import Record, digest_of, find, manifest

PATIENCE = 300.0  # seconds that a server may be away before a stream gives up
MAX_DELAY = 5.0  # seconds between two attempts

# A page is a few hundred rows of big tables, wherever the planner's statistics stand.
SESSION = (
    "SET default_transaction_read_only = on; SET enable_seqscan = off; "
    "SET enable_hashjoin = off; SET enable_mergejoin = off"
)

ROWS = """
SELECT r.position, r.split, r.problem_key, p.text, p.answer, p.source, p.external_id, p.subject,
       p.level, r.content_hash, r.body_hash, t.body, r.n_passed, r.n_samples
FROM snapshot_rows r
JOIN problems p ON p.key = r.problem_key
LEFT JOIN trajectories t ON t.id = r.trajectory_id
WHERE r.snapshot_id = %s
    AND r.position = ANY(ARRAY(SELECT generate_series(%s::int, %s::int, %s::int)))
ORDER BY r.position
"""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class DatabaseSource:
    record: Record
    snapshot_id: int
    conninfo: str = field(repr=False)
    location: str
    patience: float

    @classmethod
    def open(cls, name: str, url: str | None, patience: float) -> DatabaseSource:
        """Raises as `Snapshot.open` does."""
        db = Database(url or resolve_url())
        try:
            migrate.require_head(db)
            with db.session() as session:
                snapshot_id, record = find(session, name)
            return cls(record, snapshot_id, db.conninfo, db.location, patience)
        finally:
            db.close()

    def pages(self, shard: Shard, stop: Event) -> Iterator[list[StoredRow]]:
        line = _Line(self, stop)
        positions = shard.positions()
        try:
            for first in range(0, len(positions), PAGE):
                wanted = positions[first : first + PAGE]
                rows = line.ask(partial(self._page, wanted))
                if [row.position for row in rows] != list(wanted):
                    raise self._gone()
                yield rows
        finally:
            line.close()

    def check(self, connection: psycopg.Connection[Any]) -> None:
        """Raises DatabaseError unless the manifest has the record's digest."""
        lines = manifest(connection, self.snapshot_id, self.record.kind)
        if digest_of(self.record.kind, self.record.n_rows, lines) != self.record.digest:
            raise DatabaseError(
                "the snapshot's manifest was altered: it does not match its digest",
                where=f"snapshot {self.record.name}, {self.location}",
                remedy="restore it from a backup or an export",
            )

    def _page(self, wanted: range, connection: psycopg.Connection[Any]) -> list[StoredRow]:
        with connection.cursor(binary=True, row_factory=tuple_row) as cursor:
            cursor.execute(ROWS, (self.snapshot_id, wanted[0], wanted[-1], wanted.step))
            return list(map(StoredRow._make, cursor.fetchall()))

    def _gone(self) -> DatabaseError:
        return DatabaseError(
            "rows of the snapshot are gone: it was deleted while it was read",
            where=f"snapshot {self.record.name}, {self.location}",
            remedy="import an export of it, or train on another snapshot",
        )


class _Line:
    """A connection to the server of `source` that is opened again when it breaks."""

    def __init__(self, source: DatabaseSource, stop: Event) -> None:
        self._source, self._stop = source, stop
        self._connection: psycopg.Connection[Any] | None = None

    def ask(self, question: Callable[[psycopg.Connection[Any]], _Result]) -> _Result:
        """The answer, however often the connection breaks meanwhile.

        Raises DatabaseError once the server has been away for the source's patience.
        """
        source = self._source
        give_up, delay = time.monotonic() + source.patience, 0.05
        while True:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                    source.check(self._connection)
                return question(self._connection)
            except psycopg.Error as error:
                self.close()
                if not _is_lost(error) or time.monotonic() > give_up or self._stop.is_set():
                    raise DatabaseError(
                        f"the snapshot cannot be read on: {str(error).strip()}",
                        where=source.location,
                        remedy="start the server (`tirgen doctor` tells more), then resume from "
                        "the last position",
                    ) from error
            self._stop.wait(delay)
            delay = min(2 * delay, MAX_DELAY)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> psycopg.Connection[Any]:
        connection = psycopg.connect(
            self._source.conninfo, autocommit=True, connect_timeout=10,
            application_name="tirgen snapshot",
            keepalives_idle=30, keepalives_interval=10, keepalives_count=3,
        )  # fmt: skip
        connection.execute(SESSION.encode())
        return connection


def _is_lost(error: psycopg.Error) -> bool:
    """Whether another connection may do better."""
    lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return lost and not isinstance(error, QueryCanceled)
