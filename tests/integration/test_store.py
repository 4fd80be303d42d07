"""Rows say what was generated, come back unchanged, and are never altered."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from shared.errors import ConfigError, DatabaseError
from shared.sandbox.result import CodeError, Outcome, RunResult, Tier
from shared.store import Completed, Database, libpq_conninfo, migrate, queries, trajectories
from shared.store.database import resolve_url
from shared.store.models import Base, ItemState, ProblemRow, RunRow, RunState, WorkItemRow
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict, clean

PROBLEM = Problem(text="What is 6 times 7?", answer="42", source="test")


def result(outcome: Outcome = Outcome.OK, tier: Tier = Tier.A) -> RunResult:
    error = CodeError("ValueError", "no", 1, "") if outcome is Outcome.MODEL_ERROR else None
    return RunResult(outcome, "42\n", "", error, tier, 0.25, 0.125, 1 << 33, 0)


def trajectory(**changes: object) -> Trajectory:
    failed = ToolCall("import  sympy.abc, os", "ValueError: no", result(Outcome.MODEL_ERROR))
    call = ToolCall("from math import prod\nprint(prod([6, 7]))", "42", result(tier=Tier.B))
    steps = (
        Step("Multiply.", call, original="6 * 7 = 41", discarded=(failed,)),
        Step("Once more.", failed),
        Step("So \\boxed{42}."),
    )
    made = Trajectory(
        PROBLEM.key, steps, "Multiply. …", End.ANSWERED, "42", False, 2**62, 17, {"note": "x"}
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def completed(made: Trajectory, rejected_by: Check | None = None) -> Completed:
    verdicts = (
        Verdict(Check.EXECUTED, True, "1", "2 calls"),
        Verdict(Check.ANSWER, rejected_by is None, "1", "\0", {"nan": float("nan")}),
    )
    return Completed(made, verdicts, rejected_by, 1.5, "nano", "nano", "abc")


def add_item(session: Session) -> tuple[int, int]:
    trajectories.import_problems(session, [PROBLEM])
    run = RunRow(
        name="r", kind="generate", config={}, fingerprint="f", code_version="c", created_by="u",
        host="h", n_items=1,
    )  # fmt: skip
    session.add(run)
    session.flush()
    item = WorkItemRow(
        run_id=run.id, problem_key=PROBLEM.key, sample_index=0, fingerprint="f",
        idempotency_key="k",
    )  # fmt: skip
    session.add(item)
    session.flush()
    return run.id, item.id


def write(db: Database, made: Trajectory) -> int:
    with db.begin() as session:
        run_id, item_id = add_item(session)
        return trajectories.write_trajectory(session, run_id, item_id, completed(made))


# Schema


def test_models_and_migrations_describe_the_same_schema(db: Database) -> None:
    with db.session() as session:
        context = MigrationContext.configure(
            session.connection(), opts={"compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_downgrade_leaves_nothing_and_upgrade_restores_all(db: Database) -> None:
    def objects() -> tuple[list[str], list[str], int]:
        with db.session() as session:
            found = inspect(session.connection())
            functions = "SELECT count(*) FROM pg_proc WHERE proname = 'refuse_change'"
            n = session.execute(text(functions)).scalar_one()
            return sorted(found.get_table_names()), found.get_view_names(), n

    before = objects()
    assert migrate.current(db) == migrate.head()
    migrate.downgrade(db, "base")
    assert objects() == (["alembic_version"], [], 0)
    with pytest.raises(DatabaseError, match="schema is missing"):
        migrate.require_head(db)
    migrate.upgrade(db)
    assert objects() == before
    migrate.require_head(db)


def test_upgrades_at_once_take_turns(db: Database) -> None:
    migrate.downgrade(db, "base")
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(migrate.upgrade, db) for _ in range(4)]:
            done.result()
    assert migrate.current(db) == migrate.head()


def test_failed_migration_leaves_the_schema_as_it_was(db: Database) -> None:
    with db.begin() as session:
        session.execute(text("CREATE VIEW in_the_way AS SELECT * FROM verdicts"))
    with pytest.raises(DBAPIError):
        migrate.downgrade(db, "base")
    assert migrate.current(db) == migrate.head()
    with db.session() as session:
        assert session.execute(text("SELECT count(*) FROM current_verdicts")).scalar_one() == 0


@pytest.mark.parametrize("table", ["trajectories", "steps", "verdicts"])
@pytest.mark.parametrize(
    "change", ["UPDATE {} SET duration = 0", "DELETE FROM {}", "TRUNCATE {} CASCADE"]
)
def test_written_rows_cannot_be_changed(db: Database, table: str, change: str) -> None:
    write(db, trajectory())
    with pytest.raises(DBAPIError, match="never changed"), db.begin() as session:
        session.execute(text(change.format(table)))


# Trajectories


def test_row_counts_what_the_trajectory_holds(db: Database) -> None:
    trajectory_id = write(db, trajectory())
    with db.session() as session:
        columns = (
            "n_steps, n_calls, n_failed_calls, n_corrections, n_tokens, sandbox_tier, vetted, "
            "seed, end_reason, answer, cleaned, duration"
        )
        row = session.execute(text(f"SELECT {columns} FROM trajectories")).one()
        assert tuple(row) == (3, 2, 1, 1, 17, "B", True, 2**62, "answered", "42", False, 1.5)
        steps = session.execute(
            text("SELECT position, has_call, outcome, error_type, peak_memory, imports FROM steps")
        ).all()
        assert [tuple(step) for step in steps] == [
            (0, True, "ok", None, 1 << 33, ["math"]),
            (1, True, "model_error", "ValueError", 1 << 33, ["os", "sympy"]),
            (2, False, None, None, None, []),
        ]
        calls = session.execute(text("SELECT sandbox_tier, replayed, bytes_cut FROM steps")).all()
        assert [tuple(c) for c in calls] == [("B", False, 0), ("A", False, 0), (None, None, None)]
        assert trajectories.read(session, trajectory_id) == trajectory()
        with pytest.raises(DatabaseError, match="no such trajectory"):
            trajectories.read(session, trajectory_id + 1)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.text(st.characters(), max_size=30), st.floats())
def test_any_text_survives_the_codec_up_to_cleaning(written: str, number: float) -> None:
    made = trajectory(text=written, answer=written, meta={written: number})
    encoded = trajectories.encode(made)
    back = trajectories.decode(encoded.body)
    assert back.text == clean(written)[0]
    assert trajectories.encode(back).content_hash == encoded.content_hash
    assert not trajectories.encode(back).cleaned
    if not encoded.cleaned:
        assert back == made


def test_hostile_text_is_stored_cleaned_and_says_so(db: Database) -> None:
    trajectory_id = write(db, trajectory(text="a\0b\ud800", answer="\0", meta={"x": float("inf")}))
    with db.session() as session:
        back = trajectories.read(session, trajectory_id)
        assert (back.text, back.answer, back.meta) == (
            "a\ufffdb\ufffd",
            "\ufffd",
            {"x": "Infinity"},
        )
        assert session.execute(text("SELECT cleaned FROM trajectories")).scalar_one()


def test_altered_body_is_noticed(db: Database) -> None:
    trajectory_id = write(db, trajectory())
    forged = trajectories.encode(trajectory(text="forged")).body
    with db.begin() as session:
        session.execute(text("ALTER TABLE trajectories DISABLE TRIGGER ALL"))
        session.execute(text("UPDATE trajectories SET body = :body"), {"body": forged})
        with pytest.raises(DatabaseError, match="content hash"):
            trajectories.read(session, trajectory_id)


def test_hash_covers_what_was_generated_and_not_how_fast() -> None:
    slow = ToolCall("print(1)", "1", replace(result(), duration=9.0))
    quick = ToolCall("print(1)", "1", result())
    hashes = [
        trajectories.encode(trajectory(steps=(Step("t", call),))).content_hash
        for call in (slow, quick, replace(quick, observation="2"))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_newest_verdict_of_each_check_is_the_current_one(db: Database) -> None:
    trajectory_id = write(db, trajectory())
    with db.begin() as session:
        later = Verdict(Check.ANSWER, None, "2", "undecided")
        trajectories.add_verdicts(session, [(trajectory_id, later)])
        query = "SELECT check_name, passed, version FROM current_verdicts ORDER BY check_name"
        current = session.execute(text(query)).all()
        assert [tuple(row) for row in current] == [("answer", None, "2"), ("executed", True, "1")]


def test_imports_are_found_without_parsing_hostile_code() -> None:
    code = "import numpy as np, os.path\n  from sympy.abc import x\nx = 'import y'\nimport ,\n"
    assert trajectories.imported_modules(code) == ["numpy", "os", "sympy"]
    assert trajectories.imported_modules("-" * 10**6 + "\0 import") == []


def test_problem_is_imported_once(db: Database) -> None:
    other = replace(PROBLEM, text="nul \0 and \ud800")
    relabelled = replace(PROBLEM, subject="algebra")
    with db.begin() as session:
        assert trajectories.import_problems(session, [PROBLEM, other, relabelled]) == 2
        assert trajectories.import_problems(session, [other]) == 0
        row = session.scalars(select(ProblemRow).where(ProblemRow.key == other.key)).one()
        assert row.text == "nul \ufffd and \ufffd"
        assert Problem(row.text, row.answer).key == other.key


def test_copied_rows_are_what_insert_would_have_written(db: Database) -> None:
    """Lists, missing values, JSON, times' defaults; nothing at all is nothing."""
    trajectories.copy_in(None, RunRow, [])  # type: ignore[arg-type]
    row = {
        "name": "a\tb\\n\u00e9", "kind": "k", "config": {"x": [1, None, "\u00e9"]},
        "fingerprint": "", "code_version": "c", "created_by": "u", "host": "h",
        "finished_at": None,
    }  # fmt: skip
    with db.begin() as session:
        trajectories.copy_in(session, RunRow, [row])
        found = session.query(RunRow).one()
        assert {name: getattr(found, name) for name in row} == row
        assert (found.state, found.n_items, found.id) == (RunState.RUNNING, 0, 1)


# Queries


def test_funnel_accounts_for_every_item(db: Database) -> None:
    with db.begin() as session:
        run_id, _ = add_item(session)
        found = queries.funnel(session, run_id)
        assert found.reconciles
        assert found.items[ItemState.QUEUED] == found.n_open == 1
        session.execute(text("UPDATE work_items SET state = 'failed', error_class = 'timeout'"))
        found = queries.funnels(session)[0]
        assert (found.n_open, found.failed, found.reconciles) == (0, {"timeout": 1}, True)
        session.execute(text("DELETE FROM work_items"))
        assert not queries.funnel(session, run_id).reconciles


# Connections


def test_read_only_session_refuses_to_write(db: Database) -> None:
    with pytest.raises(DBAPIError, match="read-only"), db.session() as session:
        session.execute(text("INSERT INTO problems (key) VALUES ('x')"))


def test_unreachable_server_is_named_without_its_password() -> None:
    db = Database("postgresql://user:secret@127.0.0.1:1/nowhere")
    with pytest.raises(DatabaseError) as caught, db.begin() as session:
        session.execute(text("SELECT 1"))
    assert "127.0.0.1:1/nowhere" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_other_dialect_is_a_config_error_without_the_password() -> None:
    for url in ("sqlite:///x.db", "mysql://u:secret@h/d", "secret"):
        with pytest.raises(ConfigError) as caught:
            resolve_url({"TIRGEN_DATABASE_URL": url})
        assert "TIRGEN_DATABASE_URL" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_conninfo_and_url_name_the_same_server(database_url: str) -> None:
    import psycopg

    with psycopg.connect(libpq_conninfo(database_url)) as connection:
        assert connection.info.dbname in database_url


def test_connections_do_not_cross_a_fork(db: Database) -> None:
    """A child that used the parent's socket would take its reply, or end its session."""
    pid_query = text("SELECT pg_backend_pid()")
    with db.session() as session:
        parents = session.execute(pid_query).scalar_one()
    read, written = os.pipe()
    child = os.fork()
    if child == 0:
        with db.session() as session:
            os.write(written, str(session.execute(pid_query).scalar_one()).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert int(os.read(read, 100)) != parents
    with db.session() as session:
        assert session.execute(pid_query).scalar_one() == parents
