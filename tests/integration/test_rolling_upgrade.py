"""Old and new versions of the program on one database: what a rolling upgrade rests on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text

from shared.store import Completed, Database, RunState, migrate, queries
from shared.store.trajectories import import_problems
from shared.trajectory import End, Problem, Trajectory
from shared.work import items, slots
from shared.work.items import Failed, LeasedItem
from shared.work.runs import create_run
from shared.work.slices import Handler, RunInfo, SliceSettings, run_slice
from shared.work.slots import Bell

# What a next version's migration may look like: everything that only adds.
NEXT = """
    ALTER TABLE work_items ADD COLUMN priority int NOT NULL DEFAULT 0;
    ALTER TABLE trajectories ADD COLUMN language text;
    ALTER TABLE runs ADD COLUMN budget jsonb;
    ALTER TABLE problems ADD COLUMN language text NOT NULL DEFAULT 'en';
    CREATE TABLE tomorrow (id int PRIMARY KEY, run_id int REFERENCES runs (id) ON DELETE CASCADE);
    CREATE INDEX ON work_items (priority);
    UPDATE alembic_version SET version_num = '9999';
"""


@dataclass(frozen=True)
class Column:
    kind: str
    nullable: bool
    filled: bool  # by a default, where an INSERT does not name it


Schema = dict[tuple[str, str], Column]


def schema(db: Database) -> Schema:
    query = """SELECT table_name, column_name, udt_name, is_nullable = 'YES' AS nullable,
            column_default IS NOT NULL OR is_identity = 'YES' AS filled
        FROM information_schema.columns WHERE table_schema = 'public'"""
    with db.session() as session:
        return {
            (row.table_name, row.column_name): Column(row.udt_name, row.nullable, row.filled)
            for row in session.execute(text(query))
        }


def breaks(old: Schema, new: Schema) -> list[str]:
    """What statements of a program that knows `old` can no longer do with `new`."""
    tables = {table for table, _ in old}
    found = [f"{t}.{c} is gone" for t, c in old.keys() - new.keys()]
    for (table, name), column in new.items():
        before = old.get((table, name))
        where = f"{table}.{name}"
        if before is None:
            if table in tables and not (column.nullable or column.filled):
                found.append(f"{where} is new, and an old INSERT does not fill it")
        elif column.kind != before.kind:
            found.append(f"{where} was {before.kind} and is {column.kind}")
        elif before.nullable and not column.nullable:
            found.append(f"{where} may no longer be NULL")
    return found


def revisions() -> list[str]:
    scripts = ScriptDirectory.from_config(migrate._config())
    return [script.revision for script in scripts.walk_revisions()][::-1]


# 0001 to 0006 were never released: there is no older program that could meet them.
FIRST_RELEASED = "0006"


def test_a_migration_only_adds(db: Database) -> None:
    """So that the version before it works on, until its last process has been replaced."""
    migrate.downgrade(db, "base")
    schemas: dict[str, Schema] = {}
    for revision in revisions():
        migrate.upgrade(db, revision)
        schemas[revision] = schema(db)
    for old, new in pairwise(revisions()):
        if old >= FIRST_RELEASED:
            assert breaks(schemas[old], schemas[new]) == [], f"{old} -> {new}"


def test_controls_of_the_comparison() -> None:
    old = {("t", "a"): Column("text", True, False), ("t", "b"): Column("int4", False, True)}
    a, b = old["t", "a"], old["t", "b"]
    assert breaks(old, old) == []
    assert breaks(old, old | {("t", "c"): a, ("u", "d"): replace(b, filled=False)}) == []
    assert "gone" in breaks(old, {("t", "a"): a})[0]
    assert "was text" in breaks(old, old | {("t", "a"): replace(a, kind="int4")})[0]
    assert "NULL" in breaks(old, old | {("t", "a"): replace(a, nullable=False)})[0]
    assert "INSERT" in breaks(old, old | {("t", "c"): replace(b, filled=False)})[0]


def start(db: Database, name: str) -> Bell:
    problems = [Problem(f"{name} {i}?", "0") for i in range(20)]
    with db.begin() as session:
        import_problems(session, problems)
        run_id = create_run(
            session, name=name, kind="generate", config={}, fingerprint="f", code_version="c"
        )
        items.create_items(session, run_id, [p.key for p in problems], 2, "f")
        slots.open_slots(session, run_id, 1)
    return next(bell for bell in slots.ring(db) if bell.run_id == run_id)


def test_a_worker_goes_on_while_the_schema_is_upgraded_under_it(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a run, and again after its own restart, when it meets a schema it never
    heard of."""
    before = schema(db)
    upgraded = Database(db.url.render_as_string(hide_password=False))
    handled = 0

    async def handle(item: LeasedItem) -> Completed | Failed:
        nonlocal handled
        handled += 1
        if handled == 15:
            await asyncio.to_thread(upgrade)
        made = Trajectory(item.problem.key, (), "", End.ANSWERED, "0", False, handled, 1)
        return Completed(made, (), None, 0.0, "none", None, "test")

    def upgrade() -> None:
        with upgraded.begin() as session:
            session.connection().exec_driver_sql(NEXT)

    @asynccontextmanager
    async def open_handler(run: RunInfo) -> AsyncIterator[Handler]:
        yield handle

    def work(bell: Bell) -> RunState:
        settings = SliceSettings(in_flight=3)
        asyncio.run(run_slice(db, bell, open_handler, lambda run: settings, lambda: False))
        with db.session() as session:
            return queries.funnel(session, bell.run_id).state

    assert work(start(db, "during")) is RunState.DONE
    assert migrate.current(db) == "9999"
    assert breaks(before, schema(db)) == [], "control: this is such a migration"
    with caplog.at_level(logging.WARNING):
        migrate.upgrade(db)  # what every start of a worker does
    assert "9999" in caplog.text
    assert work(start(db, "after")) is RunState.DONE
    assert handled == 80
    upgraded.close()


def test_a_worker_brings_an_older_schema_up_to_date(db: Database) -> None:
    """A new version never works on an old schema: whoever comes first upgrades it."""
    migrate.downgrade(db, revisions()[-2])
    migrate.upgrade(db)
    assert migrate.current(db) == migrate.head()
