"""The connection to PostgreSQL: which server, one engine per process, errors a person can use.

Every call is synchronous; code in an event loop goes through `asyncio.to_thread`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    TimeoutError,
)
from sqlalchemy.orm import Session

from shared.errors import ConfigError, DatabaseError
from shared.store.embedded import EmbeddedPostgres

DRIVER = "postgresql+psycopg"
# A server that vanished without a word (its host is down, the network is cut) is noticed after half
# a minute, in a wait for it as well as in one that sends. Milliseconds, seconds, seconds, tries.
KEEPALIVE = {
    "tcp_user_timeout": 30_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
}
# States in which PostgreSQL cannot be used, but which psycopg does not count as operational errors.
ENDED = "25P03"  # it has ended the connection: the transaction was idle for too long
READ_ONLY = "25006"  # a standby, which is about to take over or to be left
URL_REMEDY = "write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or leave it out"


def tirgen_home(environ: Mapping[str, str] = os.environ) -> Path:
    """TIRGEN_HOME, or ./.tirgen."""
    return Path(environ.get("TIRGEN_HOME") or ".tirgen").expanduser().resolve()


def resolve_url(environ: Mapping[str, str] = os.environ) -> str:
    """TIRGEN_DATABASE_URL if set; otherwise the embedded server of TIRGEN_HOME, started if need be.

    Raises ConfigError for a malformed address or another dialect, DatabaseError if the embedded
    server does not start.
    """
    given = environ.get("TIRGEN_DATABASE_URL")
    if not given:
        return EmbeddedPostgres(tirgen_home(environ)).start()
    return str(_checked(given, "TIRGEN_DATABASE_URL").render_as_string(hide_password=False))


def libpq_conninfo(url: str) -> str:
    """A SQLAlchemy URL as libpq's key=value string (what kombu's pgmq transport understands)."""
    parsed = _checked(url, "database URL")
    options: dict[str, Any] = {
        "host": parsed.host,
        "port": parsed.port,
        "user": parsed.username,
        "password": parsed.password,
        "dbname": parsed.database,
        **{key: v if isinstance(v, str) else ",".join(v) for key, v in parsed.query.items()},
    }
    return make_conninfo(**{key: v for key, v in options.items() if v is not None})


class Database:
    """One PostgreSQL database. Connects at first use; may be carried over a fork.

    `url`: postgresql://… or postgresql+psycopg://….
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url, "database URL")
        self.engine = create_engine(
            self.url,
            pool_pre_ping=True,  # a restarted server costs no failed transaction
            pool_size=4,
            max_overflow=4,  # with a few processes per host, well below max_connections
            connect_args={"connect_timeout": 10, "application_name": "tirgen"} | KEEPALIVE,
        )
        # Connections of the parent must neither be used nor closed in a child.
        engine = weakref.ref(self.engine)
        os.register_at_fork(after_in_child=lambda: _forget_connections(engine()))

    @property
    def location(self) -> str:
        """Host (or socket folder) and database, for messages: no user, no password."""
        host = self.url.host or self.url.query.get("host") or "localhost"
        port = f":{self.url.port}" if self.url.port else ""
        return f"{host}{port}/{self.url.database}"

    @property
    def conninfo(self) -> str:
        return libpq_conninfo(self.url.render_as_string(hide_password=False))

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """A transaction: committed at the end of the block, rolled back if the block raises.

        Raises DatabaseError where the server is unreachable or gone.
        """
        session = Session(self.engine, expire_on_commit=False)
        with self._wrapped(ENDED, READ_ONLY), session, session.begin():
            yield session

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A read-only transaction: PostgreSQL itself refuses any write. Raises as `begin` does."""
        read_only = self.engine.execution_options(postgresql_readonly=True)
        with self._wrapped(ENDED), Session(read_only, expire_on_commit=False) as session:
            yield session

    def end_idle_transactions(self, seconds: float) -> None:
        """From now on the server ends a transaction of ours that waits for us for so long.

        A host that vanishes in the middle of one would else keep its locks for hours, the sweeper's
        among them. For processes whose transactions are short.
        """
        milliseconds = str(int(seconds * 1000))

        def limit(connection: psycopg.Connection[Any], record: object) -> None:
            query = "SELECT set_config('idle_in_transaction_session_timeout', %s, false)"
            connection.execute(query, (milliseconds,))
            connection.commit()

        event.listen(self.engine, "connect", limit)
        self.engine.dispose()

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _wrapped(self, *states: str) -> Iterator[None]:
        """DatabaseError for what the driver calls operational, and for these SQLSTATEs."""
        try:
            yield
        except (DBAPIError, TimeoutError, psycopg.OperationalError) as error:
            if not _is_unusable(error, states):
                raise
            raise DatabaseError(
                f"PostgreSQL cannot be used: {str(getattr(error, 'orig', error)).strip()}",
                where=self.location,
                remedy="start it (`tirgen up`), or correct TIRGEN_DATABASE_URL; `tirgen doctor` "
                "tells more",
            ) from error


def _checked(url: str, name: str) -> URL:
    """Parsed, with our driver. The address itself stays out of the message: it holds a password."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"{name} is not an address", where=name, remedy=URL_REMEDY) from error
    if parsed.drivername not in ("postgresql", DRIVER):
        what = f"{name} names {parsed.drivername!r}; only PostgreSQL is supported"
        raise ConfigError(what, where=name, remedy=URL_REMEDY)
    return parsed.set(drivername=DRIVER)


def _is_unusable(error: Exception, states: Sequence[str]) -> bool:
    if not isinstance(error, DBAPIError) or isinstance(error, OperationalError | InterfaceError):
        return True
    return getattr(error.orig, "sqlstate", None) in states


def _forget_connections(engine: Any) -> None:
    if engine is not None:
        engine.dispose(close=False)
