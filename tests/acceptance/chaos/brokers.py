"""The brokers of a chaos run, started from the programs of their packages, and how to lose them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
from celery import Celery
from kombu.exceptions import KombuError

from shared.errors import BrokerError
from tests.processes import kill

RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
PORTS = {"rabbitmq": 25672, "redis": 26379}


class Broker:
    """`pgmq` is the database itself: it has no process of its own."""

    def __init__(self, name: str, home: Path, host: str) -> None:
        self.name, self.home = name, home / name
        self.process: subprocess.Popen[bytes] | None = None
        port = PORTS.get(name)
        self.url = {
            "pgmq": None,
            "rabbitmq": f"amqp://guest:guest@{host}:{port}//",
            "redis": f"redis://{host}:{port}/0",
        }[name]

    @staticmethod
    def installed(name: str) -> bool:
        found = {"pgmq": True, "rabbitmq": RABBITMQ.exists(), "redis": shutil.which("redis-server")}
        return bool(found[name])

    def start(self) -> None:
        if self.name == "pgmq":
            return
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                env=os.environ | self._environ(),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """kill -9 of all its processes; what it had only in memory is gone."""
        if self.process is not None:
            root = psutil.Process(self.process.pid)
            everything = [root]
            with contextlib.suppress(psutil.NoSuchProcess):
                everything += root.children(recursive=True)
            kill(*everything)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        self.kill()
        for process in psutil.process_iter(["name", "pid"]):
            if self.name == "rabbitmq" and process.info["name"] == "epmd":
                process.kill()

    def purge(self, app: Celery, queue: str) -> None:
        """Lose every message that waits. Raises BrokerError."""
        connection = app.connection_for_write()
        gone = connection.connection_errors + connection.channel_errors + (KombuError, OSError)
        try:
            with connection, connection.channel() as channel:
                channel.queue_purge(queue)
        except gone as error:
            raise BrokerError(str(error)) from error

    def _command(self) -> list[str]:
        if self.name == "redis":
            options = ["--port", str(PORTS["redis"]), "--bind", "0.0.0.0", "--protected-mode", "no"]
            return ["redis-server", *options, "--save", "", "--appendonly", "no"]
        config = self.home / "rabbitmq.conf"
        config.write_text("loopback_users = none\n")
        return [str(RABBITMQ)]

    def _environ(self) -> dict[str, str]:
        if self.name == "redis":
            return {}
        return {
            "HOME": str(self.home),
            "RABBITMQ_NODENAME": "chaos@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "0.0.0.0",
            "RABBITMQ_NODE_PORT": str(PORTS["rabbitmq"]),
            "RABBITMQ_DIST_PORT": "25673",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(self.home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.home / "logs"),
            "RABBITMQ_CONFIG_FILE": str(self.home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.home / "plugins"),
            "RABBITMQ_PID_FILE": str(self.home / "pid"),
        }


def terminate(process: subprocess.Popen[bytes], seconds: float) -> float:
    """SIGTERM, and how long its end took; raises TimeoutExpired after `seconds`."""
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(seconds)
    return time.monotonic() - started
