"""Queries over stored trajectories: from field names and an expression to a stream of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg.errors import QueryCanceled
from sqlalchemy import Select, func, select, text
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import Session

from shared.errors import ConfigError, DatabaseError
from shared.store import Database
from shared.store.models import ProblemRow, RunRow, TrajectoryRow, WorkItemRow
from tirgen.expression import HELP, named, where

STATEMENT_TIMEOUT = 120  # seconds, per round trip to the server
BATCH = 1000  # rows per round trip

DEFAULT_COLUMNS = ("id", "run", "problem_id", "vetted", "answer", "reference", "n_calls")

# What the demo prints and `--help` shows; a test runs each of them.
EXAMPLES = (
    "tirgen query 'vetted and n_calls >= 2' --order -n_calls",
    "tirgen query 'not vetted and reject_check == \"answer\"' --columns id,answer,reference",
    "tirgen query 'n_corrections > 0' --columns id,subject,n_failed_calls,n_corrections,end",
)


@dataclass(frozen=True, slots=True)
class Query:
    """`order`: field names, with a minus for descending. `limit`: None for all."""

    where: str = ""
    columns: tuple[str, ...] = DEFAULT_COLUMNS
    order: tuple[str, ...] = ()
    limit: int | None = None


def statement(query: Query) -> Select[Any]:
    """The SELECT of `query`, in a total order. Raises ConfigError as `where` does."""
    columns = [named(name, "--columns") for name in query.columns]
    if not columns:
        raise ConfigError("no columns are asked for", where="--columns", remedy=HELP)
    order = []
    for name in query.order:
        column = named(name.removeprefix("-"), "--order").column
        order.append((column.desc() if name.startswith("-") else column.asc()).nulls_last())
    chosen = joined(select(*(field.column.label(field.name) for field in columns)))
    chosen = chosen.where(where(query.where)).order_by(*order, TrajectoryRow.id)
    return chosen if query.limit is None else chosen.limit(query.limit)


@contextmanager
def run(db: Database, query: Query) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Rows, streamed through a server-side cursor: memory does not grow with their number.

    Read-only. Raises ConfigError before the first row, DatabaseError where a round trip takes
    longer than STATEMENT_TIMEOUT.
    """
    wanted = statement(query).execution_options(yield_per=BATCH)
    with _reading(db) as session:
        yield (tuple(row) for row in session.execute(wanted))


def count(db: Database, expression: str) -> int:
    """How many trajectories `expression` selects."""
    with _reading(db) as session:
        wanted = joined(select(func.count(TrajectoryRow.id))).where(where(expression))
        return int(session.execute(wanted).scalar_one())


def joined(wanted: Select[Any]) -> Select[Any]:
    """`wanted` over every table that fields come from.

    Outer joins on unique keys: PostgreSQL drops those whose columns are not used.
    """
    return (
        wanted.select_from(TrajectoryRow)
        .outerjoin(RunRow, RunRow.id == TrajectoryRow.run_id)
        .outerjoin(ProblemRow, ProblemRow.key == TrajectoryRow.problem_key)
        .outerjoin(WorkItemRow, WorkItemRow.id == TrajectoryRow.item_id)
    )


@contextmanager
def _reading(db: Database) -> Iterator[Session]:
    with db.session() as session:
        session.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}s'"))
        try:
            yield session
        except DataError as error:
            what = f"PostgreSQL refuses a value: {str(error.orig).strip()}"
            raise ConfigError(what, where="the expression", remedy=HELP) from error
        except OperationalError as error:
            if not isinstance(error.orig, QueryCanceled):
                raise
            raise DatabaseError(
                f"the query was stopped after {STATEMENT_TIMEOUT} s",
                where=db.location,
                remedy="narrow it (run == 'NAME' and ...), or leave out --order",
            ) from error
