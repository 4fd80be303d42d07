"""Making a snapshot: select, filter, order, write the rows, seal them with a record.

Nothing is written before the name, the expression, the filters and the splits have been checked.
Rows and record are one transaction over one state of the database: a crash leaves nothing, and a
snapshot that exists is whole.
"""

from __future__ import annotations

import getpass
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from psycopg.errors import SerializationFailure
from sqlalchemy import BigInteger, Select, any_, insert, literal, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared.errors import DatabaseError, InputError
from shared.store import Database, snapshots
from shared.store.models import (
    ManifestRow,
    RunRow,
    SnapshotKind,
    SnapshotRow,
    SnapshotRunRow,
    TrajectoryRow,
)
from shared.store.snapshot_rows import UNREADABLE
from shared.store.snapshots import COLUMNS, Record
from shared.store.trajectories import copy_in, decode
from shared.trajectory import Check, clean, content_hash
from shared.version import code_version
from tirgen import query
from tirgen.curation import chain as chains
from tirgen.curation import splits
from tirgen.curation.base import PREFIX
from tirgen.curation.lineage import origin

BATCH = 1000  # rows per round trip

# The verifier's verdicts, and those of the filters that were applied: not of other snapshots' ones.
_CURRENT = text(
    """
    SELECT id, trajectory_id, check_name AS check, passed, version, reason, evidence
    FROM current_verdicts
    WHERE trajectory_id = ANY(:ids)
      AND (NOT starts_with(check_name, :prefix) OR check_name = ANY(:filters))
    ORDER BY trajectory_id, check_name
    """
)

# Every answer to these problems in these runs counts, whatever the expression and the filters
# chose: a pass rate over chosen answers would measure the choice.
_DIFFICULTY = text(
    """
    SELECT t.problem_key, count(*) FILTER (WHERE v.passed) AS n_passed, count(*) AS n_samples
    FROM trajectories t JOIN current_verdicts v ON v.trajectory_id = t.id
    WHERE t.problem_key = ANY(:keys) AND t.run_id = ANY(:runs)
      AND v.check_name = :check AND v.passed IS NOT NULL
    GROUP BY t.problem_key
    """
)


@dataclass(frozen=True, slots=True)
class Request:
    """What to freeze. `filters`: a preset or a file; `shares`: of each split, summing to 1."""

    name: str
    where: str = ""
    filters: str | None = None
    seed: int = 0
    kind: SnapshotKind = SnapshotKind.TRAJECTORIES
    shares: Mapping[str, float] = field(default_factory=lambda: splits.WHOLE)


class _Fact(NamedTuple):
    id: int
    problem_key: str
    content_hash: str
    run_id: int


def create(db: Database, request: Request) -> Record:
    """Freeze what `request` describes.

    Raises ConfigError for a bad name, expression, filter or split, InputError for a name that is
    taken and for a selection that leaves nothing (with the funnel), DatabaseError where a stored
    trajectory does not match its content hash.
    """
    snapshots.check_name(request.name)
    splits.checked(request.shares)
    query.check(query.Query(request.where))
    chain = chains.load(request.filters) if request.filters else None
    with db.session() as session:
        if session.scalar(select(SnapshotRow.id).where(SnapshotRow.name == request.name)):
            snapshots.refuse_taken(request.name)
    chosen, n_all = _selected(db, request.where)
    funnel = [_stage("where", n_all, len(chosen))]
    if chain is not None and chosen:
        curated = chains.apply(db, chain, _these(chosen), seed=request.seed)
        funnel += [_stage(s.name, s.before, s.after, s.version) for s in curated.stages]
        chosen = curated.kept
    with db.begin() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        used = [f"{PREFIX}{stage['stage']}" for stage in funnel[1:]]
        rows = _Rows(session, request, _facts(session, chosen), used)
        if request.kind is SnapshotKind.PROBLEMS:
            funnel.append(_stage("one row per problem", len(chosen), rows.n))
        _check_funnel(request, funnel, rows)
        _check_measured(session, request, rows.run_ids)
        _hold(session, request, rows.run_ids)
        snapshot_id = snapshots.reserve(session)
        digest = snapshots.digest_of(request.kind, rows.n, rows.write(snapshot_id))
        lineage = {
            "where": request.where,
            "filters": chain.spec() if chain is not None else None,
            "seed": request.seed,
            "shares": dict(request.shares),
            "funnel": funnel,
            **origin(session, snapshot_id, request.kind, rows.run_ids),
            "code_version": code_version(),
        }
        record = Record(
            request.name, request.kind, digest, rows.n, rows.splits, clean(lineage)[0],
            getpass.getuser(), datetime.now(UTC),
        )  # fmt: skip
        behind = [{"snapshot_id": snapshot_id, "run_id": run_id} for run_id in rows.run_ids]
        session.execute(insert(SnapshotRunRow), behind)
        snapshots.seal(session, snapshot_id, record)
    return record


class _Rows:
    """The rows to be: which, in what order, in which split; written batch by batch.

    Of a row, only its place and its subject (a trajectory's id or a problem's key) are held.
    """

    def __init__(
        self, session: Session, request: Request, facts: Iterable[_Fact], filters: Sequence[str]
    ) -> None:
        self._session, self._request, self._filters = session, request, list(filters)
        run_ids: set[int] = set()
        order: dict[int | str, tuple[int, int]] = {}
        for fact in facts:
            run_ids.add(fact.run_id)
            is_problem = request.kind is SnapshotKind.PROBLEMS
            content = fact.problem_key if is_problem else fact.content_hash
            order[fact.problem_key if is_problem else fact.id] = (
                splits.index(fact.problem_key, request.seed, request.shares),
                splits.place(content, request.seed),
            )
        self.run_ids = sorted(run_ids)
        self._order = sorted((*place, subject) for subject, place in order.items())
        self.n = len(self._order)
        counts = Counter(split for split, _, _ in self._order)
        self.splits = {name: counts[i] for i, name in enumerate(request.shares)}

    def write(self, snapshot_id: int) -> Iterator[bytes]:
        """Insert the rows; the manifest's lines as they are inserted."""
        kind, names = self._request.kind, list(self._request.shares)
        for first in range(0, self.n, BATCH):
            batch = self._order[first : first + BATCH]
            subjects = [subject for _, _, subject in batch]
            is_problems = kind is SnapshotKind.PROBLEMS
            described = self._problems(subjects) if is_problems else self._trajectories(subjects)
            places = [
                {"snapshot_id": snapshot_id, "position": first + i, "split": names[split]}
                for i, (split, _, _) in enumerate(batch)
            ]
            rows = [{**place, **own} for place, own in zip(places, described, strict=True)]
            copy_in(self._session, ManifestRow, rows)
            for row in rows:
                yield ("\t".join(str(row[name]) for name in COLUMNS[kind]) + "\n").encode()

    def _trajectories(self, ids: Sequence[int | str]) -> Iterator[dict[str, Any]]:
        columns = select(
            TrajectoryRow.id, TrajectoryRow.problem_key, TrajectoryRow.content_hash,
            TrajectoryRow.body,
        )  # fmt: skip
        found = self._session.execute(columns.where(TrajectoryRow.id.in_(ids)))
        rows = {row.id: row for row in found}
        wanted = {"ids": ids, "prefix": PREFIX, "filters": self._filters}
        verdicts: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for verdict in self._session.execute(_CURRENT, wanted).mappings():
            verdicts[verdict["trajectory_id"]].append(dict(verdict))
        for id in ids:
            row = rows[id]
            used = verdicts[row.id]
            _check_body(row.id, row.content_hash, row.body)
            yield {
                "problem_key": row.problem_key,
                "trajectory_id": row.id,
                "content_hash": row.content_hash,
                "body_hash": hashlib.sha256(row.body).hexdigest(),
                "verdict_ids": [verdict["id"] for verdict in used],
                "verdicts_hash": snapshots.verdicts_hash(used),
            }

    def _problems(self, keys: Sequence[int | str]) -> Iterator[dict[str, Any]]:
        wanted = {"keys": keys, "runs": self.run_ids, "check": Check.ANSWER.value}
        rates = {
            row.problem_key: (row.n_passed, row.n_samples)
            for row in self._session.execute(_DIFFICULTY, wanted)
        }
        for key in keys:
            n_passed, n_samples = rates.get(key, (0, 0))
            yield {"problem_key": key, "n_passed": n_passed, "n_samples": n_samples}


def _selected(db: Database, where: str) -> tuple[list[int], int]:
    """The ids of the trajectories that `where` selects, and how many there are in all."""
    with query.run(db, query.Query(where, columns=("id",))) as rows:
        ids = [row[0] for row in rows]
    return ids, query.count(db, "")


def _these(ids: Sequence[int]) -> Select[Any]:
    return select(TrajectoryRow.id).where(TrajectoryRow.id == any_(literal(ids, ARRAY(BigInteger))))


def _facts(session: Session, ids: Sequence[int]) -> Iterator[_Fact]:
    columns = select(
        TrajectoryRow.id, TrajectoryRow.problem_key, TrajectoryRow.content_hash,
        TrajectoryRow.run_id,
    )  # fmt: skip
    for first in range(0, len(ids), BATCH):
        wanted = columns.where(TrajectoryRow.id.in_(ids[first : first + BATCH]))
        yield from (_Fact(*row) for row in session.execute(wanted))


def _stage(name: str, before: int, after: int, version: object = "") -> dict[str, Any]:
    return {"stage": name, "version": str(version), "before": before, "after": after}


def _check_funnel(request: Request, funnel: Sequence[Mapping[str, Any]], rows: _Rows) -> None:
    """Every row that goes into a stage comes out of it, falls there, and is counted."""
    where = f"snapshot {request.name}"
    story = ", ".join(f"{s['before']} -> {s['after']} ({s['stage']})" for s in funnel)
    ends = [funnel[0]["before"], *(stage["after"] for stage in funnel)]
    if [stage["before"] for stage in funnel] != ends[:-1] or ends[-1] != rows.n:
        what = f"the funnel does not reconcile with {rows.n} rows: {story}"
        raise DatabaseError(what, where=where, remedy="this is a bug of tirgen: please report it")
    if rows.n == 0:
        raise InputError(f"nothing is left to freeze: {story}", where=where,
                         remedy="widen --where, or loosen --filters")  # fmt: skip
    empty = [name for name, n in rows.splits.items() if n == 0]
    if empty:
        raise InputError(
            f"split {empty[0]} would be empty: there are only {rows.n} rows, whole problems each",
            where=where, remedy="give it a larger share, or take another --seed",
        )  # fmt: skip


def _check_measured(session: Session, request: Request, run_ids: Sequence[int]) -> None:
    """Evaluations are runs like others; trained on by accident, their questions measure nothing."""
    if re.search(r"\bkind\b", request.where):
        return
    of_kind = select(RunRow.name).where(RunRow.id.in_(run_ids), RunRow.kind == "evaluate")
    names = session.scalars(of_kind.order_by(RunRow.id)).all()
    if names:
        raise InputError(
            f"{len(names)} of the selected runs are evaluations ({', '.join(names[:3])}): trained"
            " on, their questions would measure nothing any more",
            where="--where",
            remedy="add: and kind == 'generate' (or name the kind you mean, if you do mean it)",
        )


def _hold(session: Session, request: Request, run_ids: Sequence[int]) -> None:
    """Keep the runs from being deleted until the snapshot is there, and keeps them itself."""
    held = select(RunRow.id).where(RunRow.id.in_(run_ids))
    try:
        session.execute(held.with_for_update(read=True, key_share=True)).all()
    except OperationalError as error:
        if not isinstance(error.orig, SerializationFailure):
            raise
        what = "a run was deleted while its trajectories were being frozen"
        where = f"snapshot {request.name}"
        raise DatabaseError(what, where=where, remedy="create the snapshot again") from error


def _check_body(id: int, frozen_hash: str, body: bytes) -> None:
    """A damaged row is found here, so that the body's own hash can stand for it from now on."""
    try:
        found = content_hash(decode(body).identity())
    except UNREADABLE as error:
        found = repr(error)
    if found != frozen_hash:
        raise DatabaseError(
            "the stored trajectory does not match its content hash",
            where=f"trajectory {id}, {found}", remedy="restore this row from a backup",
        )  # fmt: skip
