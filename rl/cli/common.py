"""What several commands use: the database."""

from __future__ import annotations

import os

from shared.store import Database, migrate, resolve_url


def open_database() -> Database:
    """The configured database. The embedded one is started, and its schema brought up to date; that
    of a server is its owner's business.

    Raises DatabaseError where it cannot be used or has another schema.
    """
    db = Database(resolve_url())
    if os.environ.get("TIRGEN_DATABASE_URL"):
        migrate.require_head(db)
    else:
        migrate.upgrade(db)
    return db
