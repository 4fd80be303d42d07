"""Is a snapshot still what was frozen, and in what do two of them differ?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import text

from shared.endpoints import Usage
from shared.errors import ConfigError, DatabaseError, InputError
from shared.grading import Grader
from shared.sandbox import Sandbox
from shared.store import Database, TrajectoryEntry, snapshots
from shared.store.models import SnapshotKind
from shared.store.snapshot_parquet import ParquetSource
from shared.store.snapshots import Record
from shared.trajectory import Check, Verdict
from tirgen.agents.verifier import Verifier
from tirgen.config import parse
from tirgen.curation.whole import WholeRow, from_database, from_folder

AT_ONCE = 32  # trajectories under re-execution


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was frozen. `position` None: not one row's fault."""

    position: int | None
    what: str


@dataclass(frozen=True, slots=True)
class Report:
    """`n_executed`: trajectories whose code was run again; None where that was not asked for."""

    record: Record
    n_checked: int
    n_executed: int | None
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        return not self.findings


def verify(db: Database, name: str, execute: bool = False) -> Report:
    """Check record, digest, and of every row the problem, the body, the hashes and the verdicts.

    `execute`: run all code again too, and compare outcomes and observations. Findings are
    collected, not raised. Raises InputError if there is no such snapshot, DatabaseError if its
    record was altered, ConfigError and SandboxError where its code cannot be run.
    """
    with db.session() as session:
        snapshot_id, record = snapshots.find(session, name)
        lines = snapshots.manifest(snapshots.driver(session), snapshot_id, record.kind)
        digest = snapshots.digest_of(record.kind, record.n_rows, lines)
    findings = []
    if digest != record.digest:
        findings.append(Finding(None, f"the manifest was altered: its digest is now {digest}"))
    return _report(record, lambda: from_database(db, snapshot_id, record), execute, findings)


def verify_folder(folder: Path, execute: bool = False) -> Report:
    """The same of an exported snapshot, and every byte of its shards.

    Raises InputError if the folder is no export or its manifest file was altered.
    """
    source = ParquetSource.open(folder)
    findings = []
    checks: list[Callable[[], None]] = [partial(source.check_file, file) for file in source.files]
    for check in (*checks, source.check):
        try:
            check()
        except InputError as error:
            findings.append(Finding(None, error.what))
    if findings:  # what is damaged need not be readable
        return Report(source.record, 0, None, tuple(findings))
    return _report(source.record, lambda: from_folder(source), execute, findings)


def _report(
    record: Record, rows: Callable[[], Iterator[WholeRow]], execute: bool, findings: list[Finding]
) -> Report:
    n_checked = n_executed = 0
    for whole in rows():
        n_checked += 1
        try:
            whole.entry(f"snapshot {record.name}")
        except DatabaseError as error:
            findings.append(Finding(whole.row.position, error.what))
    if n_checked != record.n_rows:
        findings.append(Finding(None, f"there are {n_checked} rows, not {record.n_rows}"))
    if execute and not findings:
        differing = asyncio.run(_execute(record, rows()))
        n_executed = n_checked
        findings += differing
    return Report(record, n_checked, n_executed if execute else None, tuple(findings))


async def _execute(record: Record, rows: Iterator[WholeRow]) -> list[Finding]:
    """What the verifier's check `reproduced` says of every trajectory, by its own run's rules."""
    if record.kind is SnapshotKind.PROBLEMS:
        raise ConfigError(f"snapshot {record.name} is one of problems: it has no code",
                          where="--execute", remedy="leave it out")  # fmt: skip
    runs = record.lineage["runs"]
    configs = {run["name"]: parse(run["config"], f"run {run['name']}") for run in runs}
    findings = []
    async with Sandbox() as sandbox:
        verifiers = {name: Verifier(c, sandbox, Grader()) for name, c in configs.items()}

        async def reproduced(whole: WholeRow) -> Verdict:
            entry = whole.entry(f"snapshot {record.name}")
            assert isinstance(entry, TrajectoryEntry)
            verifier = verifiers[(whole.origin or {})["run"]]
            only = {Check.REPRODUCED}
            [verdict] = await verifier.verify(entry.problem, entry.trajectory, Usage(), only)
            return verdict

        while batch := list(islice(rows, AT_ONCE)):
            verdicts = await asyncio.gather(*map(reproduced, batch))
            findings += [
                Finding(w.row.position, f"step {v.evidence['step']} gave {v.reason} when run again")
                for w, v in zip(batch, verdicts, strict=True)
                if not v.passed
            ]
    return findings


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows by what became of them from one snapshot to the other, in numbers.

    `rejudged`: in both, with other verdicts or another measured difficulty. `crossing`: problems
    that are in different splits, so that training on one spoils what the other holds out.
    """

    in_both: int
    only_in_first: int
    only_in_second: int
    rejudged: int
    other_split: int
    crossing: int
    lineage: Mapping[str, tuple[Any, Any]]  # what was done otherwise

    @property
    def is_empty(self) -> bool:
        return not (self.only_in_first or self.only_in_second or self.rejudged or self.other_split)


_DIFFERENCE = text(
    """
    WITH rows AS (
        SELECT snapshot_id, problem_key, split, coalesce(body_hash, problem_key) AS what,
               coalesce(verdicts_hash, n_passed || '/' || n_samples) AS said,
               row_number() OVER (
                   PARTITION BY snapshot_id, coalesce(body_hash, problem_key) ORDER BY position
               ) AS copy
        FROM snapshot_rows WHERE snapshot_id IN (:first, :second)
    ),
    a AS (SELECT * FROM rows WHERE snapshot_id = :first),
    b AS (SELECT * FROM rows WHERE snapshot_id = :second)
    SELECT count(*) FILTER (WHERE a.what IS NOT NULL AND b.what IS NOT NULL) AS in_both,
           count(*) FILTER (WHERE b.what IS NULL) AS only_in_first,
           count(*) FILTER (WHERE a.what IS NULL) AS only_in_second,
           count(*) FILTER (WHERE a.said <> b.said) AS rejudged,
           count(*) FILTER (WHERE a.split <> b.split) AS other_split,
           (SELECT count(DISTINCT problem_key) FROM a JOIN b USING (problem_key)
            WHERE a.split <> b.split) AS crossing
    FROM a FULL JOIN b USING (what, copy)
    """
)
_DONE = ("where", "filters", "seed", "shares", "code_version")


def difference(db: Database, first: str, second: str) -> Difference:
    """In what two snapshots of one kind differ, whatever databases they were made in.

    Raises InputError if there is no such snapshot, ConfigError for two kinds.
    """
    with db.session() as session:
        (id_1, one), (id_2, two) = (snapshots.find(session, name) for name in (first, second))
        if one.kind is not two.kind:
            raise ConfigError(
                f"{first} is one of {one.kind}, {second} one of {two.kind}",
                where="tirgen snapshot diff", remedy="compare two of a kind",
            )  # fmt: skip
        counts = session.execute(_DIFFERENCE, {"first": id_1, "second": id_2}).mappings().one()
    pairs = {name: (one.lineage.get(name), two.lineage.get(name)) for name in _DONE}
    return Difference(**counts, lineage={k: (a, b) for k, (a, b) in pairs.items() if a != b})
