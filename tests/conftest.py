"""Databases for tests: one embedded PostgreSQL per session, a fresh migrated database per test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import pytest
from sqlalchemy import make_url, text

from shared.store import migrate
from shared.store.database import Database, libpq_conninfo
from shared.store.embedded import EmbeddedPostgres

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; nothing of the tests is there
# The suite is of CPUs, on every machine; what a GPU can show has a folder and a start of its own.
collect_ignore = [] if os.environ.get("TIRGEN_TEST_GPU") else ["gpu"]
if collect_ignore:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running embedded server whose own database is migrated and otherwise empty."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("tirgen-home"))
    url = server.start()
    database = Database(url)
    migrate.upgrade(database)
    database.close()
    yield url
    server.stop()


NewDatabase = Callable[[], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def new_database(postgres_url: str) -> NewDatabase:
    """Makes databases: `with new_database() as url` is one, a copy of the migrated, empty one."""
    url = make_url(postgres_url)
    admin = libpq_conninfo(postgres_url) + " dbname=postgres"

    @contextmanager
    def new() -> Iterator[str]:
        name = f"test_{next(_numbers)}"
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {url.database}".encode())
        yield url.set(database=name).render_as_string(hide_password=False)
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

    return new


@pytest.fixture
def database_url(new_database: NewDatabase) -> Iterator[str]:
    """URL of a database of the test's own."""
    with new_database() as url:
        yield url


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def login(db: Database) -> Iterator[Callable[[str], Database]]:
    """A connection of somebody who is a member of one role and nothing else."""
    made: list[Database] = []

    def become(role: str) -> Database:
        name = f"login_{role}"
        with db.begin() as session:
            session.execute(text(f"CREATE ROLE {name} LOGIN IN ROLE {role}"))
        url = db.url.set(username=name).render_as_string(hide_password=False)
        made.append(Database(url))
        return made[-1]

    yield become
    for one in made:
        one.close()
    with db.begin() as session:
        there = text("SELECT rolname FROM pg_roles WHERE rolname ~ '^(login_)?tirgen_'")
        for role in session.scalars(there).all():
            session.execute(text(f"DROP OWNED BY {role} CASCADE"))
            session.execute(text(f"DROP ROLE {role}"))
