"""The embedded stack: what `tirgen up` starts in TIRGEN_HOME and `tirgen down` stops.

Three parts, each replaced by an address in the environment: PostgreSQL with the broker on it
(TIRGEN_DATABASE_URL, TIRGEN_BROKER_URL), the nano policy (TIRGEN_BASE_URL), and Celery workers
(TIRGEN_WORKERS=0 where they run elsewhere). Everything here may be called again at any moment, by
any number of processes, and after any crash: what runs is left alone, what is gone is started.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError, TirgenError
from shared.nano.launch import is_server, start_server, stop_server
from shared.store.database import tirgen_home
from shared.store.embedded import EmbeddedPostgres

WEIGHTS = Path(__file__).parent.parent / "shared" / "nano" / "weights"
DRAIN_SECONDS = 60.0  # how long `down` waits for a worker to finish or give back its work


@dataclass(frozen=True, slots=True)
class Part:
    """One line of `tirgen status`."""

    name: str
    running: bool
    detail: str


class Stack:
    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.environ = environ
        self.home = tirgen_home(environ)
        self.database_url = environ.get("TIRGEN_DATABASE_URL")
        self.broker_url = environ.get("TIRGEN_BROKER_URL")
        self.base_url = environ.get("TIRGEN_BASE_URL")
        self.postgres = EmbeddedPostgres(self.home)
        self.nano_file = self.home / "nano.json"
        self.worker_file = self.home / "worker.pid"

    def start_nano(self) -> str:
        """The address of the policy: the configured one, or nano's, started if need be.

        The port is kept from one start to the next, so that a run's address stays valid, unless
        another program has taken it meanwhile.
        """
        if self.base_url:
            return self.base_url
        with self._lock():
            known = self._nano()
            if known and is_server(int(known["pid"])):
                return str(known["url"])
            port = int(known["port"]) if known else 0
            log = self.home / "nano.log"
            started = start_server(WEIGHTS, port if _is_free(port) else 0, log=log)
            facts = {"pid": started.pid, "port": started.port, "url": started.url}
            self.nano_file.write_text(json.dumps(facts))
            return started.url

    def is_nano(self, url: str) -> bool:
        """Is this the address of this home's nano, up or not?"""
        return self._nano().get("url") == url

    @property
    def has_workers(self) -> bool:
        """False where they run elsewhere."""
        return self.environ.get("TIRGEN_WORKERS") != "0"

    def start_worker(self) -> int | None:
        """The pid of the detached Celery worker; None where workers run elsewhere."""
        if not self.has_workers:
            return None
        with self._lock():
            pid = self._worker()
            if pid is not None:
                return pid
            log = self.home / "worker.log"
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tirgen", "worker"],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # survives the terminal
                )
            self.worker_file.write_text(str(process.pid))
            return process.pid

    def up(self) -> None:
        """Start every part that is not configured to be elsewhere."""
        if not self.database_url:
            self.postgres.start()
        self.start_nano()
        self.start_worker()

    def down(self) -> None:
        """Stop every part that was started here; a worker first finishes or gives back its work."""
        if not self.home.exists():
            return
        with self._lock():
            pid = self._worker()
            if pid is not None:
                _end(pid)
            self.worker_file.unlink(missing_ok=True)
            known = self._nano()
            if known:
                stop_server(int(known["pid"]))
        self.postgres.stop()

    def status(self) -> list[Part]:
        server = self.postgres.status()
        nano, worker = self._nano(), self._worker()
        nano_up = bool(nano) and is_server(int(nano["pid"]))
        broker = self.broker_url or self.database_url
        return [
            Part("database", True, "TIRGEN_DATABASE_URL")
            if self.database_url
            else Part("database", server.running, f"embedded, {server.data}"),
            Part("broker", True, "TIRGEN_BROKER_URL" if self.broker_url else "on the database")
            if broker
            else Part("broker", server.running, "on the database (pgmq)"),
            Part("policy", True, self.base_url)
            if self.base_url
            else Part("policy", nano_up, f"nano, {nano['url']}" if nano_up else "nano"),
            Part("worker", worker is not None, f"pid {worker}" if worker else "none started here"),
        ]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            handle = (self.home / "stack.lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"TIRGEN_HOME cannot be written: {error.strerror}",
                where=str(self.home),
                remedy="set TIRGEN_HOME to a folder of yours",
            ) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _nano(self) -> dict[str, str | int]:
        try:
            facts: dict[str, str | int] = json.loads(self.nano_file.read_text())
        except (OSError, ValueError):
            return {}
        return facts

    def _worker(self) -> int | None:
        try:
            pid = int(self.worker_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if _is_worker(pid) else None


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def _is_worker(pid: int) -> bool:
    """A living `tirgen worker`, not a zombie nor another process of the same number."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"worker" in command and any(b"tirgen" in word for word in command)


def _end(pid: int) -> None:
    """SIGTERM, so that it drains; SIGKILL to all of its session if that takes too long."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + DRAIN_SECONDS
    while _is_worker(pid):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            raise TirgenError(
                f"The worker {pid} did not stop within {DRAIN_SECONDS:.0f} s and was killed.",
                remedy="nothing is lost: its samples are generated again by the next worker",
            )
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # if it is our own child
        time.sleep(0.05)
