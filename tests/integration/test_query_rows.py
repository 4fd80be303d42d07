"""Rows of a query: order, pages, groups; any number of them; nothing is written, or endless."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from shared.errors import ConfigError, DatabaseError, InputError
from shared.store import Database
from shared.store.models import TrajectoryRow
from shared.store.trajectories import import_problems, read
from tests import stored
from tirgen import query
from tirgen.expression import where
from tirgen.fields import FIELDS, Kind
from tirgen.query import Groups, Query
from tirgen.stats import wilson


@pytest.fixture
def filled(db: Database) -> Database:
    stored.fill(db)
    return db


def rows(db: Database, expression: str, *columns: str, **more: Any) -> list[tuple[Any, ...]]:
    with query.run(db, Query(expression, columns or ("id",), **more)) as found:
        return list(found)


# Order and pages


def test_order_is_total_and_limit_holds(filled: Database) -> None:
    found = rows(filled, "", "n_tokens", "id", order=("-n_tokens",))
    assert found == sorted(found, key=lambda row: (-row[0], row[1]))
    assert rows(filled, "", "n_tokens", "id", order=("-n_tokens",), limit=3) == found[:3]
    subjects = [s for (s,) in rows(filled, "", "subject", order=("-subject",))]
    assert subjects == sorted(filter(None, subjects), reverse=True) + [None] * subjects.count(None)


@pytest.mark.parametrize(
    "order",
    [(), ("-id",), ("n_tokens",), ("-subject", "n_tokens"), ("subject", "-answer"), ("-vetted",)],
)
def test_pages_hold_every_row_once_and_in_order(filled: Database, order: tuple[str, ...]) -> None:
    """Also where values are missing or equal."""
    whole = rows(filled, "n_calls > 0", order=order)
    pages: list[tuple[Any, ...]] = []
    after = None
    while page := rows(filled, "n_calls > 0", order=order, limit=4, after=after):
        pages += page
        (after,) = page[-1]
    assert pages == whole
    assert len(whole) == 21


def test_page_after_nothing_is_an_error(filled: Database) -> None:
    with pytest.raises(InputError, match="no trajectory 999"):
        rows(filled, "", after=999)


@pytest.mark.parametrize("expression", ["vetted and n_calls > 1", 'contains("Multiply")'])
def test_page_that_takes_too_long_is_planned_anew(
    filled: Database, monkeypatch: pytest.MonkeyPatch, expression: str
) -> None:
    """The rows are the same; control: it really was stopped."""
    expected = rows(filled, expression, limit=5)
    stopped = []
    page = query._page

    def slowly(session: Session, wanted: Any, limit: int) -> Any:
        monkeypatch.setattr(query, "PAGE_TIMEOUT", 1)
        found = page(session, wanted.add_columns(func.pg_sleep(1)), limit)
        stopped.append(found is None)
        return found

    monkeypatch.setattr(query, "_page", slowly)
    assert rows(filled, expression, limit=5) == expected
    assert all(stopped)
    assert len(stopped) == (0 if "contains" in expression else 1)


def test_body_search_stops_when_it_has_enough(
    filled: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only bodies that can matter are unpacked, and no more of them than the limit needs."""
    unpacked: list[bytes] = []
    decode = query.decode
    monkeypatch.setattr(query, "decode", lambda body: unpacked.append(body) or decode(body))
    assert len(rows(filled, 'contains("Multiply") and id > 1', limit=3)) == 3
    assert len(unpacked) == 3
    unpacked.clear()
    n_vetted = query.count(filled, "vetted")
    assert len(rows(filled, 'vetted or contains("nowhere")')) == n_vetted
    assert len(unpacked) == 21 - n_vetted


# Groups


def test_groups_are_what_python_counts(filled: Database) -> None:
    table = rows(filled, "n_tokens > 0", "subject", "level", "vetted", "n_tokens", "cleaned")
    groups = Groups("n_tokens > 0", ("subject", "level"), ("n_tokens", "cleaned"))
    with query.grouped(filled, groups) as found:
        listed = list(found)
    assert list(groups.columns) == [
        "subject", "level", "n", "n_vetted", "rate", "low", "high",
        "mean_n_tokens", "mean_cleaned",
    ]  # fmt: skip
    members: dict[Any, list[tuple[Any, ...]]] = {}
    for subject, level, *facts in table:
        members.setdefault((subject, level), []).append(tuple(facts))
    assert {row[:2] for row in listed} == set(members)
    assert [row[2] for row in listed] == sorted((row[2] for row in listed), reverse=True)
    for subject, level, n, n_vetted, rate, low, high, tokens, cleaned in listed:
        its = members[subject, level]
        assert (n, n_vetted) == (len(its), sum(vetted for vetted, *_ in its))
        assert (rate, (low, high)) == (n_vetted / n, wilson(n_vetted, n))
        assert tokens == pytest.approx(sum(t for _, t, _ in its) / n)
        assert cleaned == 0


def test_a_trajectory_counts_for_every_member_of_a_list(filled: Database) -> None:
    with query.grouped(filled, Groups("", ("outcomes",))) as found:
        counts = {row[0]: row[1] for row in found}
    each = [o for (outcomes,) in rows(filled, "", "outcomes") for o in outcomes]
    assert counts == Counter(each)


def test_groups_of_nothing_and_of_searched_bodies(filled: Database) -> None:
    with query.grouped(filled, Groups("id < 0")) as found:
        assert list(found) == [(0, 0, None, None, None)]
    with query.grouped(filled, Groups("id < 0", ("run",))) as found:
        assert list(found) == []
    with filled.session() as session:
        texts = [read(session, id).text for (id,) in rows(filled, "")]
    n = sum("Multiply" in text for text in texts)
    assert 0 < n < 21
    assert query.count(filled, 'contains("Multiply")') == n
    assert query.count(filled, 'not contains("Multiply")') == 21 - n


@pytest.mark.parametrize(
    "groups",
    [
        Groups(by=("rum",)),
        Groups(means=("rum",)),
        Groups(by=("run",), means=("answer",)),
        Groups(by=("imports", "outcomes")),
        Groups(where="rum == 1"),
    ],
)
def test_mistake_in_groups_is_found_without_a_database(groups: Groups) -> None:
    with pytest.raises(ConfigError):
        query.check(groups)


# What reading cannot do


def test_query_cannot_write(filled: Database) -> None:
    """PostgreSQL itself refuses, whatever the expression became."""
    with (
        pytest.raises(DBAPIError, match="read-only transaction"),
        query._reading(filled) as session,
    ):
        session.execute(text("UPDATE runs SET name = 'x'"))


def test_slow_query_is_stopped(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "STATEMENT_TIMEOUT", 1)
    with pytest.raises(DatabaseError, match="stopped after 1 s"), query._reading(db) as session:
        session.execute(text("SELECT pg_sleep(50)"))


def test_conditions_on_indexed_fields_can_use_an_index(filled: Database) -> None:
    """Forbidden to read whole tables, PostgreSQL finds another way; for slow ones there is none."""
    literals = {
        Kind.TEXT: "'x'", Kind.INTEGER: "1", Kind.NUMBER: "1.5", Kind.BOOLEAN: "True",
        Kind.TIME: "'2026-05-01 12:00'",
    }  # fmt: skip
    served = set()
    with query._reading(filled) as session:
        session.execute(text("SELECT set_config('enable_seqscan', 'off', true)"))
        for name, field in FIELDS.items():
            value = repr(str(field.values[0])) if field.values else literals.get(field.kind, "'x'")
            is_list = field.kind is Kind.TEXTS
            condition = where(f"{value} in {name}" if is_list else f"{name} == {value}")
            wanted = query.joined(select(TrajectoryRow.id)).where(condition)
            compiled = wanted.compile(session.connection())
            plan = session.connection().exec_driver_sql(f"EXPLAIN {compiled}", compiled.params)
            used = [line for (line,) in plan if "Index Cond: " in line]
            column = field.column.property.columns[0].name
            if any(re.search(rf"\b{column}\b.* (=|@>) ", line) for line in used):
                served.add(name)
    assert {name for name, field in FIELDS.items() if field.indexed} <= served
    assert not served & {"answer", "seed", "problem", "duration", "n_bytes"}


def test_unused_tables_are_not_read(filled: Database) -> None:
    with query._reading(filled) as session:
        wanted = query.statement(Query("", ("id", "answer"))).where(where("n_calls > 1"))
        compiled = wanted.compile(session.connection(), compile_kwargs={"literal_binds": True})
        plan = str(session.execute(text(f"EXPLAIN {compiled}")).all())
    assert "trajectories" in plan
    assert not [t for t in ("runs", "problems", "work_items") if t in plan]


MANY = 10_000
MEASURE = """
import json, sys
from shared.store import Database, ItemState
from tirgen import query
db = Database(sys.argv[1])
if sys.argv[3] == "control":
    query.BATCH = int(sys.argv[2])
with query.run(db, query.Query("", ("id", "answer"), limit=int(sys.argv[2]))) as rows:
    n = sum(len(answer) for _, answer in rows)
status = open("/proc/self/status").read()  # ru_maxrss would count the parent's memory too
peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
print(json.dumps({"n": n, "peak": peak}))
"""


def test_memory_does_not_grow_with_rows(db: Database) -> None:
    """10 000 rows of 4 kB take no more than 1 000; control: fetched at once, they do."""
    with db.begin() as session:
        stored.add_run(session, "big", MANY)
        import_problems(session, [stored.problem(0)])
        key = stored.problem(0).key
        session.execute(
            text(
                "INSERT INTO work_items (run_id, problem_key, sample_index, fingerprint, "
                "idempotency_key, state) SELECT 1, :key, i, 'f', i::text, 'vetted' "
                "FROM generate_series(1, :n) i"
            ),
            {"key": key, "n": MANY},
        )
        session.execute(
            text(
                "INSERT INTO trajectories (run_id, item_id, problem_key, content_hash, end_reason, "
                "answer, vetted, thinking, seed, n_steps, n_calls, n_failed_calls, n_corrections, "
                "n_tokens, duration, imports, outcomes, error_types, reasoner_model, code_version, "
                "cleaned, body, body_bytes) "
                "SELECT 1, id, :key, '', 'answered', repeat('x', 4096), true, false, 0, 1, 1, 0, "
                "0, 1, 1, '{}', '{}', '{}', 'm', 'c', false, '', 0 FROM work_items"
            ),
            {"key": key},
        )

    def peak(limit: int, how: str = "streamed") -> int:
        url = db.url.render_as_string(hide_password=False)
        command = [sys.executable, "-c", MEASURE, url, str(limit), how]
        said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert said["n"] == limit * 4096
        return int(said["peak"])

    few, many, control = peak(MANY // 10), peak(MANY), peak(MANY, "control")
    assert many - few < 10
    assert control - few > 25
