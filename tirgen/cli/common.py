"""What every command uses: the database."""

from __future__ import annotations

from shared.store import Database, resolve_url
from shared.store import migrate as migrations


def open_database(migrate: bool = True) -> Database:
    """The configured database, with its schema brought up to date unless `migrate` is off."""
    database = Database(resolve_url())
    if migrate:
        migrations.upgrade(database)
    return database
