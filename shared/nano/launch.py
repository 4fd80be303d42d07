"""Start and stop a nano server as a process of its own, for whoever supervises it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from shared.errors import EndpointError

_READY_S = 60.0
_STOP_S = 10.0


@dataclass(frozen=True)
class NanoProcess:
    """A running server. `url` is the OpenAI base URL, ending in /v1."""

    pid: int
    port: int
    url: str
    log: Path


def start_server(
    model_dir: Path, port: int = 0, *, log: Path, name: str = "nano", host: str = "127.0.0.1",
    dev: bool = False,
) -> NanoProcess:  # fmt: skip
    """Start a detached server and wait until it answers /health; port 0 takes a free one.

    The socket is bound here and inherited, so a port in use is found at once and a free one
    cannot be lost in between. Raises EndpointError(kind="unreachable") with the end of the log.
    """
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise EndpointError(
            f"the nano server cannot listen on {host}:{port}: {error}",
            kind="unreachable",
            retryable=False,
            remedy="stop what uses this port, or choose another",
        ) from error
    with listener, log.open("ab") as output:
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "shared.nano.server", "--fd", str(listener.fileno()),
             "--model", str(model_dir), "--name", name, *(["--dev"] if dev else [])],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        if _healthy(host, port):
            return NanoProcess(process.pid, port, f"http://{host}:{port}/v1", log)
        time.sleep(0.05)
    process.kill()
    process.wait()
    raise EndpointError(
        "the nano server did not start",
        kind="unreachable",
        retryable=False,
        where=str(log),
        raw=log.read_text(encoding="utf-8", errors="replace")[-2000:],
    )


def stop_server(pid: int) -> bool:
    """End a server started by anyone of this user: SIGTERM, then SIGKILL. False if it was gone.

    A process of another kind that got the same number is left alone.
    """
    if not is_server(pid):
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return True
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline:
            _reap(pid)
            if not is_server(pid):
                return True
            time.sleep(0.02)
    return True


def is_server(pid: int) -> bool:
    """Whether this process is a living nano server (Linux: a zombie's command line is empty)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"shared.nano.server" in command.split(b"\0")


def _reap(pid: int) -> None:
    """Collect the exit status if the server is our own child, so that no zombie stays."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def _healthy(host: str, port: int) -> bool:
    connection = HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
