"""Keeping a database: deletion of runs, size, vacuum, backup and restore, roles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner, Result

from shared.errors import DatabaseError, InputError
from shared.store import Completed, Database, ItemState, libpq_conninfo, migrate, roles, upkeep
from shared.store.models import Base
from shared.store.retention import delete_run
from shared.store.trajectories import read
from shared.work import items
from shared.work.celery_app import make_app, prepare_broker, publish
from shared.work.slots import Bell
from tests import stored
from tests.cli import error_of, said
from tirgen.cli import db as db_commands
from tirgen.cli import read as read_commands
from tirgen.cli import runs as run_commands

Tirgen = Callable[..., Result]


@pytest.fixture
def tirgen(monkeypatch: pytest.MonkeyPatch, database_url: str) -> Tirgen:
    app = typer.Typer()
    app.add_typer(db_commands.app, name="db")
    app.add_typer(run_commands.app, name="runs")
    app.command()(read_commands.query)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", database_url)

    def run(*arguments: Any, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)

    return run


@pytest.fixture
def filled(db: Database) -> Database:
    stored.fill(db)
    return db


def contents(db: Database) -> dict[str, list[Any]]:
    """Every row of every table."""
    with db.session() as session:
        return {
            table.name: sorted(session.execute(text(f"SELECT t::text FROM {table.name} t")).all())
            for table in Base.metadata.sorted_tables
        }


# runs delete


def test_a_deleted_run_takes_along_what_hangs_on_it_and_nothing_else(
    tirgen: Tirgen, filled: Database
) -> None:
    before = contents(filled)
    told = said(tirgen("runs", "delete", "one", input="y\n"))
    assert "24 items, 20 trajectories, 60 verdicts" in told
    after = contents(filled)
    of_two = {"runs": 2, "work_items": 3, "trajectories": 1, "verdicts": 3, "model_usage": 6}
    assert {name: len(after[name]) for name in of_two} == of_two
    assert after["problems"] == before["problems"]
    for name in of_two:
        assert set(after[name]) <= set(before[name])
    with filled.session() as session:
        assert read(session, 21).steps


def test_deletion_asks_first_and_no_means_no(tirgen: Tirgen, filled: Database) -> None:
    before = contents(filled)
    assert tirgen("runs", "delete", "one", input="n\n").exit_code == 1
    assert tirgen("runs", "delete", "one").exit_code == 1  # nobody there to ask
    assert contents(filled) == before
    said(tirgen("runs", "delete", "one", "--yes"))
    left = json.loads(said(tirgen("runs", "--format", "json")))
    assert [run["run"] for run in left] == ["none", "two"]


def test_running_and_unknown_runs_are_not_deleted(tirgen: Tirgen, filled: Database) -> None:
    running = error_of(tirgen("runs", "delete", "two", "--yes"))
    assert (running.exit_code, running.remedy) == (2, "end it first: tirgen cancel two")
    assert error_of(tirgen("runs", "delete", "nope", "--yes")).exit_code == 2


def test_a_run_in_a_snapshot_is_kept_and_the_snapshots_named(
    tirgen: Tirgen, filled: Database
) -> None:
    from tirgen.curation import freeze

    for name in ("second", "first"):
        freeze.create(filled, freeze.Request(name, 'run == "one"'))
    before = contents(filled)
    error = error_of(tirgen("runs", "delete", "one", "--yes"))
    assert (error.exit_code, error.what) == (2, "run 'one' is kept by snapshots: first, second")
    assert contents(filled) == before


def test_only_the_named_run_is_let_go(filled: Database) -> None:
    """The trigger itself refuses other runs' trajectories, and parts of one that stays."""
    attempts = (
        "DELETE FROM trajectories WHERE run_id = 2",
        "DELETE FROM steps WHERE trajectory_id = 1",
        "DELETE FROM verdicts WHERE trajectory_id = 1",
        "UPDATE trajectories SET answer = 'x' WHERE run_id = 1",
        "TRUNCATE trajectories CASCADE",
    )
    named = "SELECT set_config('tirgen.delete_run', '1', true)"
    for attempt in attempts:
        with filled.begin() as session:
            session.execute(text(named))
            with pytest.raises(DBAPIError, match="never changed"):
                session.execute(text(attempt))
            session.rollback()
    delete_run(filled, "one")  # and none of this outlives its transaction
    with pytest.raises(DBAPIError, match="never changed"), filled.begin() as session:
        session.execute(text("DELETE FROM trajectories"))


def test_every_table_decides_what_a_deleted_run_means_to_it() -> None:
    """A reference to a run, an item or a trajectory cascades; of snapshots it never does."""
    for table in Base.metadata.sorted_tables:
        for key in table.foreign_keys:
            if key.column.table.name in ("runs", "work_items", "trajectories"):
                expected = None if table.name.startswith("snapshot") else "CASCADE"
                assert key.ondelete == expected, f"{table.name}.{key.parent.name}"


# size and vacuum


def test_size_lists_every_table_and_their_sum(tirgen: Tirgen, filled: Database) -> None:
    said(tirgen("db", "vacuum"))
    rows = json.loads(said(tirgen("db", "size", "--format", "json")))
    assert {row["table"] for row in rows} == {t.name for t in Base.metadata.tables.values()} | {
        "alembic_version"
    }
    of = {row["table"]: row for row in rows}
    assert of["trajectories"]["rows"] == 21
    assert all(row["data"] + row["indexes"] == row["together"] for row in rows)
    assert [r["together"] for r in rows] == sorted((r["together"] for r in rows), reverse=True)
    assert upkeep.together(upkeep.sizes(filled)).rows == sum(row["rows"] for row in rows)
    assert "trajectories" in said(tirgen("db", "size"))


# backup and restore


@pytest.fixture
def other(database_url: str) -> Iterator[Database]:
    """A second database on the same server, without tables."""
    url = make_url(database_url).set(database="other")
    admin = libpq_conninfo(database_url) + " dbname=postgres"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("CREATE DATABASE other")
    database = Database(url.render_as_string(hide_password=False))
    yield database
    database.close()
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("DROP DATABASE other WITH (FORCE)")


def test_a_restored_backup_is_the_same_database(
    tirgen: Tirgen, filled: Database, other: Database, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every row; and what is written once is so there, too; and work goes on there."""
    prepare_broker(filled, make_app(filled))
    file = tmp_path / "tirgen.dump"
    said(tirgen("db", "backup", file))
    assert [path.name for path in tmp_path.iterdir()] == ["tirgen.dump"]
    assert error_of(tirgen("db", "backup", file)).what == "the file exists"

    url = other.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", url)
    assert migrate.head() in said(tirgen("db", "restore", file))
    assert contents(other) == contents(filled)
    migrate.require_head(other)
    with pytest.raises(DBAPIError, match="never changed"), other.begin() as session:
        session.execute(text("DELETE FROM trajectories"))
    with other.begin() as session:
        run = stored.add_run(session, "after", 1)
        assert stored.add_item(session, run, 30, ItemState.VETTED) == 22
    assert error_of(tirgen("db", "restore", file)).what == "the database is not empty"


def test_a_backup_that_fails_leaves_nothing(db: Database, other: Database, tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="pg_dump failed"):
        upkeep.backup(db, tmp_path / "none" / "x.dump")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "bad.dump").write_bytes(b"PGDMP, but no more")
    with pytest.raises(DatabaseError, match="pg_restore failed"):
        upkeep.restore(other, tmp_path / "bad.dump")
    with pytest.raises(InputError, match="no such file"):
        upkeep.restore(other, tmp_path / "none.dump")
    assert upkeep.sizes(other) == []


# roles


def refused(db: Database, statement: str) -> bool:
    try:
        with db.begin() as session:
            session.execute(text(statement))
    except DBAPIError as error:
        assert isinstance(error.orig, psycopg.errors.InsufficientPrivilege), error  # noqa: PT017
        return True
    return False


WRITES = (
    "INSERT INTO problems (key, text, answer, source, external_id) VALUES ('k', '', '', '', '')",
    "UPDATE runs SET n_items = n_items",
    "UPDATE work_items SET attempt = attempt",
    "DELETE FROM run_slots",
    "DELETE FROM endpoint_status",
)
NEVER = (
    "DELETE FROM problems",
    "DELETE FROM runs",
    "TRUNCATE model_usage",
    "DROP TABLE model_usage",
    "ALTER TABLE trajectories DISABLE TRIGGER ALL",
    "UPDATE alembic_version SET version_num = 'x'",
    "CREATE ROLE someone",
)


def test_each_role_may_do_its_work_and_no_more(
    tirgen: Tirgen, filled: Database, login: Callable[[str], Database],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    said(tirgen("db", "roles"))
    assert all(role in said(tirgen("db", "roles")) for role in roles.ROLES)  # again: no harm
    writer, reader, trainer = map(login, (roles.WRITER, roles.READER, roles.TRAINER))
    for statement in WRITES:
        assert not refused(writer, statement), statement
        assert refused(reader, statement), statement
        assert refused(trainer, statement), statement
    for statement in NEVER:
        for database in (writer, reader, trainer):
            assert refused(database, statement), statement
    assert not refused(reader, "SELECT * FROM work_items")
    assert refused(trainer, "SELECT * FROM work_items")
    assert refused(trainer, "SELECT * FROM model_usage")
    for name in roles.TRAINER_READS:
        assert not refused(trainer, f"SELECT * FROM {name}"), name

    # The reader's commands work, and so does the writer's whole way of an item and its message.
    url = reader.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", url)
    assert len(said(tirgen("query", "vetted", "--format", "jsonl")).splitlines()) == 13
    assert not migrate.upgrade(writer)
    (item, *_) = items.lease(writer, 2, "o", 1, 600.0)
    made = stored.trajectory(1)
    items.complete(writer, item, Completed(made, (), None, 1.0, "m", None, "c"))
    prepare_broker(writer, make_app(writer))
    publish(make_app(writer), [Bell("generate", 2, 0, 1)])


def test_queries_run_as_the_reader_where_there_is_one(
    filled: Database, login: Callable[[str], Database]
) -> None:
    """So that not even a superuser's query can do more than read. Control: before, it is itself."""
    from tirgen import query

    def whoami() -> str:
        with query._reading(filled) as session:
            return str(session.scalar(text("SELECT current_user")))

    assert whoami() == "tirgen"
    roles.create(filled)
    assert whoami() == roles.READER
    with filled.session() as session:
        assert session.scalar(text("SELECT current_user")) == "tirgen"


def test_roles_need_somebody_who_may_make_them(
    db: Database, login: Callable[[str], Database]
) -> None:
    roles.create(db)
    with pytest.raises(DatabaseError, match="may not make roles"):
        roles.create(login(roles.WRITER))
