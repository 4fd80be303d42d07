"""How often problems were solved: the view `pass_rates`, as filters and new runs ask it.

A run without the tool (budgets.calls = 0) measures what the reasoner solves alone; its trajectories
are never vetted, but their answers are graded like all others. A sample whose answer could not be
decided counts neither as solved nor as a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from shared.errors import ConfigError
from shared.store import Database
from shared.store.models import RunRow, pass_rates
from tirgen.curation.base import Rate, Row

_CALLS = RunRow.config["budgets"]["calls"].as_integer()


class Stored:
    """The `Context` of filters that are applied to a database."""

    def __init__(self, db: Database, seed: int) -> None:
        self._db, self.seed = db, seed
        self._alone: dict[str, list[int]] = {}

    def rates(self, rows: Sequence[Row], runs: Sequence[str], *, tool: bool) -> list[Rate]:
        rated: dict[int, Rate] = {}
        with self._db.session() as session:
            for wanted, some in self._grouped(session, rows, runs, tool):
                found = measured(session, wanted, [row.problem_key for row in some])
                rated |= {row.id: found.get(row.problem_key, Rate(0, 0)) for row in some}
        return [rated[row.id] for row in rows]

    def require_runs(self, runs: Sequence[str], *, tool: bool) -> None:
        with self._db.session() as session:
            if runs:
                _named(session, runs)
            elif not tool and session.scalar(select(RunRow.id).where(without_tool())) is None:
                raise ConfigError(
                    "no run without the tool says what the reasoner solves alone",
                    where="filter cot_solvable",
                    remedy="sample it: tirgen generate FILE --no-tool --samples 4 --run NAME",
                )

    def _grouped(
        self, session: Session, rows: Sequence[Row], runs: Sequence[str], tool: bool
    ) -> Iterator[tuple[list[int], list[Row]]]:
        """Rows with the runs that measure them."""
        if runs:
            yield _named(session, runs), list(rows)
        elif tool:
            for run_id in {row.run_id for row in rows}:
                yield [run_id], [row for row in rows if row.run_id == run_id]
        else:
            for model in {row.model for row in rows}:
                yield self._of(session, model), [row for row in rows if row.model == model]

    def _of(self, session: Session, model: str) -> list[int]:
        """Runs of that reasoner without the tool."""
        if model not in self._alone:
            reasoner = RunRow.config["reasoner"]["endpoint"]["model"].as_string()
            wanted = select(RunRow.id).where(without_tool(), reasoner == model)
            self._alone[model] = list(session.scalars(wanted))
        return self._alone[model]


def without_tool() -> ColumnElement[bool]:
    """Whether a run measures the reasoner alone."""
    return func.coalesce(_CALLS, 1) == 0


def measured(session: Session, runs: Sequence[int], problems: Sequence[str]) -> dict[str, Rate]:
    """Problem key -> its rate over all of `runs` together; where there are samples."""
    rate = pass_rates.c
    statement = (
        select(
            rate.problem_key,
            func.sum(rate.n_passed),
            func.sum(rate.n_samples),
            func.array_agg(RunRow.name.distinct()),
        )
        .join(RunRow, RunRow.id == rate.run_id)
        .where(rate.run_id == func.any(list(runs)), rate.problem_key == func.any(list(problems)))
        .group_by(rate.problem_key)
    )
    return {
        key: Rate(int(k), int(n), tuple(sorted(names)))
        for key, k, n, names in session.execute(statement)
        if n
    }


def _named(session: Session, names: Sequence[str]) -> list[int]:
    wanted = select(RunRow.name, RunRow.id).where(RunRow.name == func.any(list(names)))
    found = {name: id for name, id in session.execute(wanted)}  # noqa: C416 (a Row is no pair)
    missing = [name for name in names if name not in found]
    if missing:
        remedy = "`tirgen runs` lists them"
        raise ConfigError(f"there is no run named {missing[0]!r}", where="filters", remedy=remedy)
    return list(found.values())
