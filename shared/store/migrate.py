"""The schema's version: upgrade, downgrade, which one is there. No alembic.ini is needed.

Old and new versions of the program may work on one database while an upgrade rolls over the hosts:
a migration only adds (tests/integration/test_rolling_upgrade.py), and what a version no longer
needs goes with the migrations of the one after it. So a schema that is newer than the program is
left as it is, and works.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, select

import migrations
from shared.errors import DatabaseError
from shared.store.database import Database

LOCK_KEY = 0x7469_7267_656E  # "tirgen": one migration at a time in a database


log = logging.getLogger(__name__)


def upgrade(db: Database, revision: str = "head") -> None:
    """Bring the schema to `revision`; several callers at once take turns. All or nothing.

    A schema that this version of the program does not know, hence a newer one, stays as it is.
    """
    with _locked(db) as config:
        context = MigrationContext.configure(config.attributes["connection"])
        found = context.get_current_revision()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if found is not None and found not in known:
            log.warning("the schema (%s) is newer than this program, which goes on with it", found)
            return
        command.upgrade(config, revision)


def downgrade(db: Database, revision: str) -> None:
    """Take the schema back to `revision` ("base": no tables at all, all data gone)."""
    with _locked(db) as config:
        command.downgrade(config, revision)


def current(db: Database) -> str | None:
    """Revision of the schema in the database; None where there is none."""
    with db.session() as session:
        return MigrationContext.configure(session.connection()).get_current_revision()


def head() -> str:
    """Newest revision that this version of the program knows."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def require_head(db: Database) -> None:
    """Raise DatabaseError unless the schema is the one this version of the program works with."""
    found = current(db)
    if found != head():
        raise DatabaseError(
            f"the database's schema is {found or 'missing'}, this program needs {head()}",
            where=db.location,
            remedy="run `tirgen db upgrade`; if the database is newer, install that tirgen version",
        )


def _config() -> Config:
    assert migrations.__file__ is not None
    config = Config()
    folder = str(Path(migrations.__file__).parent)
    config.set_main_option("script_location", folder.replace("%", "%%"))
    return config


@contextmanager
def _locked(db: Database) -> Iterator[Config]:
    with db.begin() as session:
        session.execute(select(func.pg_advisory_xact_lock(LOCK_KEY)))
        config = _config()
        config.attributes["connection"] = session.connection()
        yield config
