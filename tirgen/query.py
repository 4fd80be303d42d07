"""Queries over stored trajectories: from field names and an expression to a stream of rows.

Everything is read in a read-only transaction, and all but a page through a server-side cursor, so
that memory does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from psycopg.errors import QueryCanceled
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    Select,
    and_,
    any_,
    cast,
    func,
    literal,
    or_,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import Session

from shared.errors import ConfigError, DatabaseError, InputError
from shared.store import Database
from shared.store.models import ConsensusRow, ProblemRow, RunRow, TrajectoryRow, WorkItemRow
from shared.store.roles import READER
from shared.store.trajectories import decode
from tirgen.expression import HELP, named, searches, where
from tirgen.fields import FIELDS, NUMBERS, Field, Kind
from tirgen.stats import wilson

STATEMENT_TIMEOUT = 120  # seconds, per round trip to the server
BATCH = 1000  # rows per round trip
PAGE_TIMEOUT = 30  # milliseconds for a page that is planned as one
BODIES = 50  # of them where bodies are searched, which may be large

DEFAULT_COLUMNS = ("id", "run", "problem_id", "vetted", "answer", "reference", "n_calls")

# What the demo prints and `--help` shows; a test runs each of them.
EXAMPLES = (
    "tirgen query 'vetted and n_calls >= 2' --order -n_calls",
    "tirgen query 'not vetted and reject_check == \"answer\"' --columns id,answer,reference",
    'tirgen query \'any_step(outcome == "timeout") and "sympy" in imports\'',
    "tirgen query 'n_corrections > 0' --columns id,subject,n_failed_calls,n_corrections,end",
    "tirgen query --group-by subject,level --columns n_tokens,n_calls",
)

# The reader's role where there is one (`tirgen db roles`). The fraction is what PostgreSQL plans a
# cursor for: all rows, where it would think of the first tenth. The page cost is that of a database
# in memory or on flash; the default, of a spinning disk, makes it shun indexes.
_READ_AS = text("""
    SELECT set_config('statement_timeout', :timeout, true),
        set_config('cursor_tuple_fraction', '1', true),
        set_config('random_page_cost', '1.1', true),
        (SELECT set_config('role', rolname, true) FROM pg_roles
         WHERE rolname = :reader AND pg_has_role(rolname, 'MEMBER')
             AND has_table_privilege(rolname, to_regclass('trajectories'), 'SELECT'))
""")


@dataclass(frozen=True, slots=True)
class Query:
    """`order`: field names, with a minus for descending. `limit`: None for all.

    `after`: the id of the last trajectory of the page before, under the same order.
    """

    where: str = ""
    columns: tuple[str, ...] = DEFAULT_COLUMNS
    order: tuple[str, ...] = ()
    limit: int | None = None
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Groups:
    """Counts and rates by the values of `by`; by nothing, of all. Means of the fields `means`.

    Of a list of texts, each member is a value: its trajectory counts for every one.
    """

    where: str = ""
    by: tuple[str, ...] = ()
    means: tuple[str, ...] = ()
    limit: int | None = None

    @property
    def columns(self) -> dict[str, Kind]:
        """Name and kind of every column. Raises ConfigError for unknown fields."""
        by = [named(name, "--group-by") for name in self.by]
        kinds = {f.name: Kind.TEXT if f.kind is Kind.TEXTS else f.kind for f in by}
        rates = ("rate", "low", "high", *(f"mean_{n}" for n in self.means))
        counts = dict.fromkeys(("n", "n_vetted"), Kind.INTEGER)
        return kinds | counts | dict.fromkeys(rates, Kind.NUMBER)


def statement(query: Query) -> Select[Any]:
    """The SELECT of `query`, all but its condition and page, in a total order.

    Raises ConfigError for unknown fields.
    """
    columns = [named(name, "--columns") for name in query.columns]
    if not columns:
        raise ConfigError("no columns are asked for", where="--columns", remedy=HELP)
    order = [
        (field.column.desc() if descending else field.column.asc()).nulls_last()
        for field, descending in _order(query)
    ]
    chosen = joined(select(*(field.column.label(field.name) for field in columns)))
    return chosen.order_by(*order, TrajectoryRow.id)


def check(query: Query | Groups) -> None:
    """Raise ConfigError for any mistake that can be found without a database."""
    searches(query.where)
    if isinstance(query, Query):
        statement(query)
    else:
        _grouped(query)


@contextmanager
def run(db: Database, query: Query) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Rows, streamed: memory does not grow with their number.

    Read-only. Raises ConfigError before the first row, InputError where there is no trajectory
    `after`, DatabaseError where a round trip takes longer than STATEMENT_TIMEOUT.
    """
    check(query)
    with _reading(db) as session:
        wanted = statement(query)
        if query.after is not None:
            wanted = wanted.where(_following(session, query, query.after))
        yield islice(_selected(session, wanted, query.where, query.limit), query.limit)


@contextmanager
def grouped(db: Database, groups: Groups) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Rows of `groups.columns`, the largest group first. Read-only; raises as `run` does."""
    check(groups)
    with _reading(db) as session:
        wanted = _grouped(groups, matching(session, groups.where))
        rows = session.execute(wanted.execution_options(yield_per=BATCH))
        yield islice((_rated(tuple(row), len(groups.by)) for row in rows), groups.limit)


def count(db: Database, expression: str) -> int:
    """How many trajectories `expression` selects."""
    with grouped(db, Groups(expression)) as rows:
        return int(next(rows)[0])


def matching(session: Session, expression: str) -> ColumnElement[bool]:
    """`tirgen.expression.where` for the whole language: what contains() asks is answered first.

    Then the condition holds the ids that were found, and memory grows with their number.
    """
    if not searches(expression):
        return where(expression)
    found = _selected(session, joined(select(TrajectoryRow.id)), expression, None)
    ids = literal([id for (id,) in found], ARRAY(BigInteger))
    return TrajectoryRow.id == any_(ids)


def candidates(db: Database, expression: str) -> Select[Any]:
    """The ids of the trajectories that `expression` selects, as a SELECT to run or to extend."""
    with _reading(db) as session:
        return joined(select(TrajectoryRow.id)).where(matching(session, expression))


def joined(wanted: Select[Any]) -> Select[Any]:
    """`wanted` over every table that fields come from.

    Outer joins on unique keys: PostgreSQL drops those whose columns are not used.
    """
    return (
        wanted.select_from(TrajectoryRow)
        .outerjoin(RunRow, RunRow.id == TrajectoryRow.run_id)
        .outerjoin(ProblemRow, ProblemRow.key == TrajectoryRow.problem_key)
        .outerjoin(WorkItemRow, WorkItemRow.id == TrajectoryRow.item_id)
        .outerjoin(
            ConsensusRow,
            and_(
                ConsensusRow.run_id == TrajectoryRow.run_id,
                ConsensusRow.problem_key == TrajectoryRow.problem_key,
            ),
        )
    )


def _page(session: Session, wanted: Select[Any], limit: int) -> list[tuple[Any, ...]] | None:
    """The first rows, planned for being few; None where that takes long.

    With a LIMIT, PostgreSQL likes to walk the ids until enough rows have matched. That is quick,
    unless the matches are many fewer than it thinks or all lie far away. Then a plan that finds
    all matches first is the better one.
    """
    soon = text("SELECT set_config('statement_timeout', :timeout, true)")
    try:
        with session.begin_nested():
            session.execute(soon, {"timeout": f"{PAGE_TIMEOUT}ms"})
            page = [tuple(row) for row in session.execute(wanted.limit(limit))]
            session.execute(soon, {"timeout": f"{STATEMENT_TIMEOUT}s"})
            return page
    except OperationalError as error:
        if not isinstance(error.orig, QueryCanceled):
            raise
        return None


def _selected(
    session: Session, wanted: Select[Any], expression: str, limit: int | None
) -> Iterator[tuple[Any, ...]]:
    """Rows of `wanted` where `expression` holds; at least `limit`, if there are as many.

    A body is opaque to SQL. So SQL tells what the expression would come to for every answer that
    contains() could give, and a body is unpacked only where that makes a difference.
    """
    texts = searches(expression)
    batch = min(limit or BATCH, BATCH if not texts else BODIES)
    if not texts:
        chosen = wanted.where(where(expression))
        if limit is not None and limit <= BATCH:
            page = _page(session, chosen, limit)
            if page is not None:
                yield from page
                return
        rows = session.execute(chosen.execution_options(yield_per=batch))
        yield from (tuple(row) for row in rows)
        return
    answers = list(product((False, True), repeat=len(texts)))
    conditions = [where(expression, dict(zip(texts, answer, strict=True))) for answer in answers]
    chosen = wanted.add_columns(TrajectoryRow.body, *conditions).where(or_(*conditions))
    n = len(answers)
    for row in session.execute(chosen.execution_options(yield_per=batch)):
        *values, body = row[:-n]
        holds = dict(zip(answers, row[-n:], strict=True))
        if all(holds.values()) or holds[_answer(body, texts)]:
            yield tuple(values)


def _answer(body: bytes, texts: Sequence[str]) -> tuple[bool, ...]:
    whole = decode(body).text
    return tuple(text in whole for text in texts)


def _order(query: Query) -> list[tuple[Field, bool]]:
    """Fields to sort by, and whether descending."""
    order = [(named(n.removeprefix("-"), "--order"), n.startswith("-")) for n in query.order]
    for field, _ in order:
        if field.kind is Kind.TEXTS:
            what = f"{field.name!r} is a list of texts and has no order"
            raise ConfigError(what, where="--order", remedy=HELP)
    return order


def _following(session: Session, query: Query, after: int) -> ColumnElement[bool]:
    """What comes after that trajectory in the order of `query`."""
    order = _order(query)
    columns = [TrajectoryRow.id, *(field.column for field, _ in order)]
    last = session.execute(joined(select(*columns)).where(TrajectoryRow.id == after)).first()
    if last is None:
        remedy = "give the id of the last trajectory that you have seen"
        raise InputError(f"there is no trajectory {after}", where="--after", remedy=remedy)
    later: ColumnElement[bool] = TrajectoryRow.id > after
    for (field, descending), value in reversed(list(zip(order, last[1:], strict=True))):
        same = field.column.is_not_distinct_from(value)
        if value is None:  # missing values come last
            later = and_(same, later)
            continue
        bound = literal(value, field.column.type)
        beyond = field.column < bound if descending else field.column > bound
        later = or_(beyond, field.column.is_(None), and_(same, later))
    return later


def _grouped(groups: Groups, condition: ColumnElement[bool] | None = None) -> Select[Any]:
    by = [named(name, "--group-by") for name in groups.by]
    if sum(field.kind is Kind.TEXTS for field in by) > 1:
        raise ConfigError("only one of the fields may be a list of texts", where="--group-by")
    means = [named(name, "--columns") for name in groups.means]
    for field in means:
        if field.kind not in (*NUMBERS, Kind.BOOLEAN):
            what = f"{field.name!r} is {field.kind.article}, and has no mean"
            raise ConfigError(what, where="--columns", remedy="name numbers, or True or False")
    keys = [func.unnest(field.column) if field.kind is Kind.TEXTS else field.column for field in by]
    numbers = [
        cast(field.column, Integer) if field.kind is Kind.BOOLEAN else field.column
        for field in means
    ]
    labelled = [key.label(f"k{i}") for i, key in enumerate(keys)]
    labelled += [number.label(f"m{i}") for i, number in enumerate(numbers)]
    each = joined(select(TrajectoryRow.vetted, *labelled))
    rows = (each if condition is None else each.where(condition)).subquery()
    k = [rows.c[f"k{i}"] for i in range(len(by))]
    m = [cast(func.avg(rows.c[f"m{i}"]), Double) for i in range(len(means))]
    n = func.count()
    wanted = select(*k, n, func.count().filter(rows.c.vetted), *m).select_from(rows)
    return wanted.group_by(*k).order_by(n.desc(), *k) if k else wanted


def _rated(row: tuple[Any, ...], n_keys: int) -> tuple[Any, ...]:
    """With the rate of vetted ones and its 95 % interval (Wilson)."""
    keys, (n, vetted, *means) = row[:n_keys], row[n_keys:]
    low, high = wilson(vetted, n) or (None, None)
    return (*keys, n, vetted, vetted / n if n else None, low, high, *means)


def kinds(columns: Sequence[str]) -> Mapping[str, Kind]:
    return {name: FIELDS[name].kind for name in columns}


@contextmanager
def _reading(db: Database) -> Iterator[Session]:
    with db.session() as session:
        session.execute(_READ_AS, {"timeout": f"{STATEMENT_TIMEOUT}s", "reader": READER})
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
