"""Snapshots into folders and back: the same rows, the same record, the same digest.

Contract: a folder appears under its name only when it is whole and has been read back; an import is
one transaction. An import brings a run per original run along, called SNAPSHOT/RUN, with its items,
trajectories, steps and verdicts under new ids.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from shared.errors import InputError
from shared.store import Database, ItemState, RunState, TrajectoryEntry, snapshots, trajectories
from shared.store import snapshot_parquet as parquet
from shared.store.models import (
    Base,
    ManifestRow,
    RunRow,
    SnapshotRow,
    SnapshotRunRow,
    VerdictRow,
    WorkItemRow,
)
from shared.store.snapshot_parquet import File, ParquetSource
from shared.store.snapshots import Record
from shared.store.trajectories import Completed, Encoded, copy_in
from shared.trajectory import Check, canonical_json
from shared.work.runs import create_run
from tirgen.curation.card import card
from tirgen.curation.whole import Entry, WholeRow, from_database, from_folder

SHARD_ROWS = 20_000  # rows of a shard: some 500 MB
BATCH = 500  # rows per round trip

Pair = tuple[WholeRow, Entry]


def export(db: Database, name: str, folder: Path, shard_rows: int = SHARD_ROWS) -> Record:
    """Write snapshot `name` to `folder`, which must not exist yet or be empty.

    Raises InputError for a folder that is in use or cannot be written, DatabaseError where
    anything in the database was altered, ConfigError without pyarrow.
    """
    with db.session() as session:
        snapshot_id, record = snapshots.find(session, name)
    parquet.pyarrow()
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError("there is something already", where=str(folder),
                             remedy="name a folder that does not exist")  # fmt: skip
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "data").mkdir(parents=True)
        rows = from_database(db, snapshot_id, record)
        files = list(_write_shards(unfinished, record, rows, shard_rows))
        parquet.write_manifest(unfinished, record, files)
        (unfinished / "README.md").write_text(card(record), encoding="utf-8")
        ParquetSource.open(unfinished).check()
        unfinished.replace(folder)
    except OSError as error:
        raise InputError(
            f"the export cannot be written: {error.strerror}",
            where=str(error.filename or folder), remedy="name a folder that you may write",
        ) from error  # fmt: skip
    return record


def import_(db: Database, folder: Path) -> Record:
    """Bring an exported snapshot into the database, under its own name.

    Raises InputError where the folder was altered or the name of the snapshot or of one of its
    runs is taken. Nothing is kept of an import that fails.
    """
    source = ParquetSource.open(folder)
    record = source.record
    snapshots.check_name(record.name)
    with db.session() as session:
        if session.scalar(select(SnapshotRow.id).where(SnapshotRow.name == record.name)):
            snapshots.refuse_taken(record.name)
    for file in source.files:
        source.check_file(file)
    try:
        with db.begin() as session:
            _Import(session, record, str(folder)).take(from_folder(source))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the folder is not of the format that this version reads: {error!r}",
            where=str(folder), remedy="export the snapshot with this version of tirgen",
        ) from error  # fmt: skip
    return record


def _write_shards(
    folder: Path, record: Record, rows: Iterator[WholeRow], shard_rows: int
) -> Iterator[File]:
    first = 0
    for split, n in record.splits.items():
        n_shards = -(-n // shard_rows)
        for shard in range(n_shards):
            path = f"data/{split}-{shard:05d}-of-{n_shards:05d}.parquet"
            wanted = min(shard_rows, n - shard * shard_rows)
            written = (_columns(whole, record) for whole in islice(rows, wanted))
            n_written = parquet.write_shard(folder / path, record.kind, written)
            yield parquet.describe(folder, path, first, n_written)
            first += n_written


def _columns(whole: WholeRow, record: Record) -> dict[str, Any]:
    """One row of a shard; `whole` is checked first."""
    entry = whole.entry(f"snapshot {record.name}")
    common = {name: value for name, value in whole.row._asdict().items() if value is not None}
    if not isinstance(entry, TrajectoryEntry):
        return {**common, "pass_rate": entry.pass_rate}
    made, origin = entry.trajectory, whole.origin or {}
    return {
        **common,
        "response": made.text,
        "answer": made.answer,
        "steps": [
            {
                "thought": step.thought,
                "code": step.call.code if step.call else None,
                "observation": step.call.observation if step.call else None,
                "outcome": step.call.result.outcome.value if step.call else None,
            }
            for step in made.steps
        ],
        "n_calls": made.n_calls,
        "n_tokens": made.n_tokens,
        "run": origin["run"],
        "model": origin["reasoner_model"],
        "verdicts_hash": whole.verdicts_hash,
        "verdicts": canonical_json([dict(verdict) for verdict in whole.verdicts]).decode(),
        "origin": canonical_json(dict(origin)).decode(),
    }


class _Import:
    """One snapshot on its way into the database, in the transaction of `session`."""

    def __init__(self, session: Session, record: Record, where: str) -> None:
        self._session, self._record, self._where = session, record, where
        self._runs: dict[str, int] = {}
        self._n_items: Counter[int] = Counter()

    def take(self, rows: Iterator[WholeRow]) -> None:
        session = self._session
        snapshot_id = snapshots.reserve(session)
        while batch := list(islice(rows, BATCH)):
            entries = [whole.entry(self._where) for whole in batch]
            trajectories.import_problems(session, [entry.problem for entry in entries])
            own = self._write(list(zip(batch, entries, strict=True)))
            manifest = [
                {
                    "snapshot_id": snapshot_id, "position": whole.row.position,
                    "split": whole.row.split, "problem_key": whole.row.problem_key, **more,
                }
                for whole, more in zip(batch, own, strict=True)
            ]  # fmt: skip
            copy_in(session, ManifestRow, manifest)
        for run_id, n in self._n_items.items():
            done = update(RunRow).where(RunRow.id == run_id)
            session.execute(done.values(n_items=n, state=RunState.DONE, finished_at=func.now()))
            session.execute(insert(SnapshotRunRow).values(snapshot_id=snapshot_id, run_id=run_id))
        snapshots.seal(session, snapshot_id, self._record)

    def _write(self, rows: Sequence[Pair]) -> list[dict[str, Any]]:
        """What the manifest says of each row, once what it refers to is there."""
        if not rows[0][0].origin:
            return [{"n_passed": w.row.n_passed, "n_samples": w.row.n_samples} for w, _ in rows]
        item_ids = self._items(rows)
        ids: dict[int, int] = {}
        for run, of_run in _grouped(rows).items():
            made = [(item_ids[w.row.position], _completed(w, entry)) for w, entry in of_run]
            written = trajectories.write_trajectories(self._session, self._run(run), made)
            ids |= {w.row.position: id for (w, _), id in zip(of_run, written, strict=True)}
        verdict_ids = iter(
            _reserve(self._session, VerdictRow, sum(len(w.verdicts) for w, _ in rows))
        )
        used = {w.row.position: [next(verdict_ids) for _ in w.verdicts] for w, _ in rows}
        copy_in(self._session, VerdictRow, (
            {
                "id": id, "trajectory_id": ids[w.row.position], "check_name": v["check"],
                "passed": v["passed"], "version": v["version"], "reason": v["reason"],
                "evidence": v["evidence"], "duration": v["duration"],
            }
            for w, _ in rows
            for id, v in zip(used[w.row.position], w.verdicts, strict=True)
        ))  # fmt: skip
        return [
            {
                "trajectory_id": ids[w.row.position], "content_hash": w.row.content_hash,
                "body_hash": w.row.body_hash, "verdict_ids": used[w.row.position],
                "verdicts_hash": w.verdicts_hash,
            }
            for w, _ in rows
        ]  # fmt: skip

    def _items(self, rows: Sequence[Pair]) -> dict[int, int]:
        """The rows' work items, in the state that they ended in; ids by position."""
        ids = _reserve(self._session, WorkItemRow, len(rows))
        items = []
        for id, (whole, entry) in zip(ids, rows, strict=True):
            origin = whole.origin or {}
            run_id = self._run(origin["run"])
            self._n_items[run_id] += 1
            items.append({
                "id": id, "run_id": run_id, "problem_key": entry.problem.key,
                "sample_index": origin["sample"], "fingerprint": origin["fingerprint"],
                "idempotency_key": f"{self._record.name}/{whole.row.position}",
                "state": ItemState.VETTED if origin["vetted"] else ItemState.REJECTED,
                "attempt": 1, "reject_check": origin["reject_check"],
            })  # fmt: skip
        copy_in(self._session, WorkItemRow, items)
        return {whole.row.position: id for id, (whole, _) in zip(ids, rows, strict=True)}

    def _run(self, name: str) -> int:
        """The run that stands for the original one of that name, made when it is first met."""
        if name not in self._runs:
            of = next(run for run in self._record.lineage["runs"] if run["name"] == name)
            self._runs[name] = create_run(
                self._session, name=f"{self._record.name}/{name}", kind=of["kind"],
                config=of["config"], fingerprint=of["fingerprint"],
                code_version=of["code_version"],
            )  # fmt: skip
        return self._runs[name]


def _grouped(rows: Sequence[Pair]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = defaultdict(list)
    for whole, entry in rows:
        groups[(whole.origin or {})["run"]].append((whole, entry))
    return groups


def _completed(whole: WholeRow, entry: Entry) -> Completed:
    assert isinstance(entry, TrajectoryEntry)
    origin, row = whole.origin or {}, whole.row
    kept = Encoded(row.body or b"", origin["body_bytes"], entry.content_hash, origin["cleaned"])
    return Completed(
        entry.trajectory, (), Check(origin["reject_check"]) if origin["reject_check"] else None,
        origin["duration"], origin["reasoner_model"], origin["extractor_model"],
        origin["code_version"], stored=kept,
    )  # fmt: skip


def _reserve(session: Session, table: type[Base], n: int) -> list[int]:
    """Ids for n rows to come."""
    sequence = func.pg_get_serial_sequence(table.__tablename__, "id")
    statement = select(func.nextval(sequence)).select_from(func.generate_series(1, n))
    return [int(id) for id in session.scalars(statement)]
