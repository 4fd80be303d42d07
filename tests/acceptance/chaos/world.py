"""Everything that a chaos run needs and may lose: database, broker, model, workers, a network.

It is built inside namespaces of its own (driver.py), so that ports are free, a cable can be cut, a
disk can fill, and nothing outlives the run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from shared.errors import TirgenError
from shared.store import Database, EmbeddedPostgres, migrate
from shared.trajectory import Problem
from shared.work.celery_app import check_broker, make_app, prepare_broker
from tests.acceptance.chaos.brokers import Broker, terminate
from tests.acceptance.chaos.endpoint import question
from tests.acceptance.chaos.worker import DRAIN, IN_FLIGHT
from tirgen import runs
from tirgen.config import RunConfig, load

ROOT = Path(__file__).parents[3]
HERE, FAR, NOWHERE = "10.77.0.1", "10.77.0.2", "02:00:00:00:00:99"
ENDPOINT_PORTS = (18000, 18001)
RUN = "chaos"
SETTINGS = {"listen_addresses": "*", "max_wal_size": "96MB", "min_wal_size": "32MB"}


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.05)


@dataclass
class Worker:
    name: str
    processes: int
    far: bool = False  # behind a cable of its own
    clock: float = 0.0  # seconds by which its clock is wrong
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def capacity(self) -> int:
        return self.processes * IN_FLIGHT

    @property
    def root(self) -> psutil.Process:
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.root, *self.root.children(recursive=True)]
        return []


class World:
    def __init__(self, home: Path, broker: str, workers: list[Worker]) -> None:
        self.home, self.workers = home, workers
        self.postgres = EmbeddedPostgres(home / "db")
        self.broker = Broker(broker, home, HERE)
        self.endpoints: dict[int, subprocess.Popen[bytes]] = {}  # by port
        self.cable: subprocess.Popen[bytes] | None = None
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("TIRGEN_", "OPENAI_"))}
        self.environ = environ | {
            "PYTHONPATH": str(ROOT),
            "TIRGEN_HOME": str(home),
            "TIRGEN_DATABASE_URL": f"postgresql://tirgen@{HERE}:5432/tirgen",
        }
        if self.broker.url:
            self.environ["TIRGEN_BROKER_URL"] = self.broker.url

    def start(self, items: int) -> None:
        self._lay_cable()
        self._start_database()
        self.broker.start()
        for port in ENDPOINT_PORTS:
            self.start_endpoint(port)
        self.db = Database(self.postgres.start())
        migrate.upgrade(self.db)
        self.app = make_app(self.db, self.environ)
        prepare_broker(self.db, self.app)
        until(self._broker_answers, "the broker answers")
        self.run_id = runs.start(
            self.db, RUN, self.config(), [self.problem(i) for i in range(items)], 1,
            sum(worker.processes for worker in self.workers),
        )  # fmt: skip
        for worker in self.workers:
            self.start_worker(worker)

    @staticmethod
    def config() -> RunConfig:
        """Patient enough for a model that is away for seconds."""
        patience = ("max_retries=20", "connect_timeout=2", "timeout=20", "deadline=55")
        more = [f"{role}.endpoint.{key}" for role in ("reasoner", "extractor") for key in patience]
        url = ",".join(f"http://{HERE}:{port}/v1" for port in ENDPOINT_PORTS)
        return load("nano", None, [*more, f"in_flight={IN_FLIGHT}"], url, "fake")

    @staticmethod
    def problem(i: int, note: str = "") -> Problem:
        return Problem(f"{question(i)}{note}", str(7 * i), "chaos", str(i))

    def start_endpoint(self, port: int) -> None:
        self.endpoints[port] = self._spawn("endpoint", [str(port)], f"endpoint-{port}")

    def start_worker(self, worker: Worker) -> None:
        arguments = [str(worker.processes), str(worker.clock)]
        worker.process = self._spawn("worker", arguments, worker.name, worker.far)

    def wind(self, worker: Worker, seconds: float) -> float:
        """Its next process has a clock that is wrong by so much; how long the old one drained."""
        assert worker.process is not None
        took = terminate(worker.process, 3 * DRAIN)
        worker.clock = seconds
        return took

    def cut(self) -> None:
        """Frames of the far side go to nobody; neither side is told."""
        self._far(
            "ip", "neigh", "replace", HERE, "lladdr", NOWHERE, "dev", "v1", "nud", "permanent"
        )

    def mend(self) -> None:
        self._far("ip", "neigh", "del", HERE, "dev", "v1")

    def stop(self) -> float:
        """All workers by SIGTERM, at once, then the rest; seconds that the slowest took."""
        started = time.monotonic()
        for worker in self.workers:
            if worker.process is not None:
                worker.process.terminate()
        for worker in self.workers:
            if worker.process is not None:
                worker.process.wait(3 * DRAIN)
        took = time.monotonic() - started
        until(lambda: not self.orphans(), "all that workers started has ended", 15)
        return took

    def close(self) -> None:
        self.db.close()
        self.broker.stop()
        for endpoint in self.endpoints.values():
            endpoint.kill()
            endpoint.wait()
        self.postgres.stop()

    def orphans(self) -> list[str]:
        """Processes of ours that have lost their parent, or all that are left without workers."""
        known = {p.process.pid for p in self.workers if p.process and p.process.poll() is None}
        found = []
        for process in psutil.process_iter(["pid", "ppid", "cmdline", "status"]):
            facts = process.info
            words = " ".join(facts["cmdline"] or ())
            ours = "chaos.worker" in words or "shared.sandbox" in words
            if not ours or facts["status"] == psutil.STATUS_ZOMBIE or facts["pid"] in known:
                continue
            above = {facts["pid"], facts["ppid"]}
            with contextlib.suppress(psutil.NoSuchProcess):
                above |= {parent.pid for parent in process.parents()}
                if not above & known:
                    found.append(f"{facts['pid']} (of {facts['ppid']}): {words[:120]}")
        return found

    def _broker_answers(self) -> bool:
        try:
            check_broker(self.app)
        except TirgenError:
            return False
        return True

    def _start_database(self) -> None:
        self.postgres.start()
        with psycopg.connect(self.postgres.conninfo, autocommit=True) as connection:
            for name, value in SETTINGS.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        self.postgres.stop()
        with (self.postgres.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.77.0.0/24 trust\n")
        self.postgres.start()

    def _lay_cable(self) -> None:
        for command in (
            "ip link set lo up",
            "ip link add v0 type veth peer name v1",
            f"ip addr add {HERE}/24 dev v0",
            "ip link set v0 up",
        ):
            subprocess.run(command.split(), check=True)
        self.cable = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        mine = Path("/proc/self/ns/net").readlink()
        theirs = Path(f"/proc/{self.cable.pid}/ns/net")
        until(lambda: theirs.readlink() != mine, "there is another network", 10)
        subprocess.run(["ip", "link", "set", "v1", "netns", str(self.cable.pid)], check=True)
        self._far("ip", "addr", "add", f"{FAR}/24", "dev", "v1")
        self._far("ip", "link", "set", "v1", "up")
        self._far("ip", "link", "set", "lo", "up")

    def _far(self, *command: str) -> None:
        assert self.cable is not None
        subprocess.run(["nsenter", "-n", "-t", str(self.cable.pid), *command], check=True)

    def _spawn(
        self,
        module: str,
        arguments: list[str],
        log: str | None = None,
        far: bool = False,
    ) -> subprocess.Popen[bytes]:
        assert self.cable is not None
        prefix = ["nsenter", "-n", "-t", str(self.cable.pid)] if far else []
        program = [sys.executable, "-m", f"tests.acceptance.chaos.{module}"]
        with (self.home / f"{log or module}.log").open("ab") as output:
            return subprocess.Popen(
                [*prefix, *program, *arguments],
                env=self.environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
