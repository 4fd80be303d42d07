"""What every command uses: the database, the terminal, the output formats."""

from __future__ import annotations

from enum import StrEnum

from rich.console import Console

from shared.store import Database, resolve_url
from shared.store import migrate as migrations

console = Console()


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


def open_database(migrate: bool = True) -> Database:
    """The configured database, with its schema brought up to date unless `migrate` is off."""
    database = Database(resolve_url())
    if migrate:
        migrations.upgrade(database)
    return database
