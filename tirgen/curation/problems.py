"""Problems that are in the database already, for the next run of a policy-aligned loop.

They come from a snapshot or from the trajectories that an expression selects, and are narrowed to
those that an earlier run could not solve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from shared.errors import InputError
from shared.store import Database, snapshots
from shared.store.models import ManifestRow, ProblemRow, TrajectoryRow, WorkItemRow
from shared.store.queries import find_run
from shared.trajectory import Problem
from tirgen import query
from tirgen.curation.rates import measured

BATCH = 1000  # problems whose rates are asked for at once


def stored(
    db: Database, *, snapshot: str | None = None, where: str | None = None, run: str | None = None
) -> list[Problem]:
    """The distinct problems of a snapshot, of the trajectories of an expression, or of a run.

    In the snapshot's order, else by key. Raises InputError where there is no such snapshot or run,
    or no problem at all; ConfigError for what is no expression.
    """
    with db.session() as session:
        chosen: list[Select[Any]] = []
        if snapshot is not None:
            chosen.append(_of_snapshot(session, snapshot))
        if where is not None:
            keys = query.joined(select(TrajectoryRow.problem_key).distinct())
            wanted = keys.where(query.matching(session, where))
            chosen.append(wanted.order_by(TrajectoryRow.problem_key))
        if run is not None:
            item = WorkItemRow
            of_run = select(item.problem_key).where(item.run_id == find_run(session, run).id)
            chosen.append(of_run.distinct().order_by(item.problem_key))
        keys_in_order: dict[str, None] = dict.fromkeys(
            key for one in chosen for key in session.scalars(one)
        )
        found = list(_problems(session, list(keys_in_order)))
    if not found:
        what = "it selects no problem"
        raise InputError(what, where=f"--where {where}" if where is not None else str(snapshot))
    return found


def unsolved(
    db: Database, problems: Sequence[Problem], run: str, max_rate: float = 0.0
) -> list[Problem]:
    """Those of `problems` whose pass rate in `run` is known and at most `max_rate`.

    Raises InputError where there is no such run, or none of the problems is left.
    """
    kept: list[Problem] = []
    n_unmeasured = 0
    with db.session() as session:
        run_id = find_run(session, run).id
        listed = iter(problems)
        while batch := list(islice(listed, BATCH)):
            rates = measured(session, [run_id], [problem.key for problem in batch])
            kept += [
                p for p in batch if p.key in rates and rates[p.key].k <= max_rate * rates[p.key].n
            ]
            n_unmeasured += sum(p.key not in rates for p in batch)
    if not kept:
        raise InputError(
            f"no problem has a pass rate of at most {max_rate:g} in run {run!r}: "
            f"{n_unmeasured} of {len(problems)} were not sampled in it, the others were solved",
            where="--unsolved-by",
            remedy="allow more with --max-rate, or name a run that sampled these problems",
        )
    return kept


def _of_snapshot(session: Session, name: str) -> Select[Any]:
    id, _ = snapshots.find(session, name)
    rows = select(ManifestRow.problem_key).where(ManifestRow.snapshot_id == id)
    return rows.order_by(ManifestRow.position)


def _problems(session: Session, keys: Sequence[str]) -> Iterator[Problem]:
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        rows = session.scalars(select(ProblemRow).where(ProblemRow.key.in_(batch)))
        found = {
            row.key: Problem(
                row.text, row.answer, row.source, row.external_id, row.subject, row.level
            )
            for row in rows
        }
        yield from (found[key] for key in batch)
