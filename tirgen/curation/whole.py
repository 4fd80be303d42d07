"""Whole rows of a snapshot, from a database or a folder: what is exported, imported and verified.

Training needs less (`shared.store.Snapshot`). Here each row comes with its verdicts and origin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text

from shared.errors import DatabaseError
from shared.store import Database, ProblemEntry, TrajectoryEntry, snapshots
from shared.store.models import SnapshotKind, VerdictRow
from shared.store.snapshot_parquet import ParquetSource, stored_rows
from shared.store.snapshot_rows import StoredRow, problem_entry, trajectory_entry
from shared.store.snapshots import Record
from shared.trajectory import content_hash

BATCH = 500  # rows per round trip

# Of a trajectory's row and its work item: what its body does not say.
ORIGIN = (
    "run", "sample", "fingerprint", "vetted", "reject_check", "duration", "reasoner_model",
    "extractor_model", "code_version", "cleaned", "body_bytes",
)  # fmt: skip

_ROWS = text(
    """
    SELECT r.position, r.split, r.problem_key, p.text, p.answer, p.source, p.external_id,
           p.subject, p.level, r.content_hash, r.body_hash, t.body, r.n_passed, r.n_samples,
           r.verdict_ids, r.verdicts_hash,
           runs.name, w.sample_index, w.fingerprint, t.vetted, w.reject_check, t.duration,
           t.reasoner_model, t.extractor_model, t.code_version, t.cleaned, t.body_bytes
    FROM snapshot_rows r
    JOIN problems p ON p.key = r.problem_key
    LEFT JOIN trajectories t ON t.id = r.trajectory_id
    LEFT JOIN runs ON runs.id = t.run_id
    LEFT JOIN work_items w ON w.id = t.item_id
    WHERE r.snapshot_id = :snapshot AND r.position >= :first AND r.position < :stop
    ORDER BY r.position
    """
)

Entry = TrajectoryEntry | ProblemEntry


@dataclass(frozen=True, slots=True)
class WholeRow:
    """`verdicts`: of each what `snapshots.SAID` names, and its `duration`. `origin`: see ORIGIN."""

    row: StoredRow
    verdicts: tuple[Mapping[str, Any], ...] = ()
    verdicts_hash: str | None = None
    origin: Mapping[str, Any] | None = None

    def entry(self, where: str) -> Entry:
        """The row, every part of it checked. Raises DatabaseError for what was altered."""
        if self.row.body_hash is None:
            return problem_entry(self.row, where)
        entry = trajectory_entry(self.row, where)
        if content_hash(entry.trajectory.identity()) != entry.content_hash:
            raise self._altered("its trajectory does not have its content hash", where)
        if snapshots.verdicts_hash(self.verdicts) != self.verdicts_hash:
            raise self._altered("a verdict is not what was frozen", where)
        return entry

    def _altered(self, what: str, where: str) -> DatabaseError:
        return DatabaseError(
            f"row {self.row.position} was altered: {what}",
            where=where,
            remedy="restore it from a backup or an export",
        )


def from_database(db: Database, snapshot_id: int, record: Record) -> Iterator[WholeRow]:
    """All rows in order, BATCH at a time. Rows that are gone are left out."""
    n = len(StoredRow._fields)
    for first in range(0, record.n_rows, BATCH):
        with db.session() as session:
            page = {"snapshot": snapshot_id, "first": first, "stop": first + BATCH}
            rows = session.execute(_ROWS, page).all()
            ids = [id for row in rows for id in row.verdict_ids or ()]
            columns = select(
                VerdictRow.id, VerdictRow.check_name.label("check"), VerdictRow.passed,
                VerdictRow.version, VerdictRow.reason, VerdictRow.evidence, VerdictRow.duration,
            )  # fmt: skip
            found = session.execute(columns.where(VerdictRow.id.in_(ids))).mappings()
            verdicts = {one["id"]: {k: v for k, v in one.items() if k != "id"} for one in found}
        for row in rows:
            used = tuple(verdicts[id] for id in row.verdict_ids or () if id in verdicts)
            origin = dict(zip(ORIGIN, row[n + 2 :], strict=True))
            yield WholeRow(StoredRow(*row[:n]), used, row.verdicts_hash, origin)


def from_folder(source: ParquetSource) -> Iterator[WholeRow]:
    """All rows in order, a row group at a time; the caller has checked the files.

    Raises InputError for a row that is not of the format.
    """
    more = ["verdicts", "verdicts_hash", "origin"]
    if source.record.kind is SnapshotKind.PROBLEMS:
        more = []
    for file in source.files:
        for _, table in source.tables(file, [*source.columns, *more]):
            rows = stored_rows(table)
            if not more:
                yield from map(WholeRow, rows)
                continue
            columns = (table.column(name).to_pylist() for name in more)
            for row, verdicts, verdicts_hash, origin in zip(rows, *columns, strict=True):
                yield WholeRow(row, tuple(json.loads(verdicts)), verdicts_hash, json.loads(origin))
