"""Starting a zygote, and talking to it from outside.

It is exec'ed with a clean environment and closed descriptors, never forked from the caller: what
the caller holds in memory (answers, passwords, keys) is not in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shared.sandbox.limits import MIB, Limits
from shared.sandbox.packets import receive, send
from shared.sandbox.result import Tier
from shared.sandbox.watch import End, LostError

RUNS_PER_ZYGOTE = 20_000  # then it is replaced: whatever a kernel object leaks does not add up
GROWTH = 128 * MIB  # of a zygote's own memory, then it is replaced
_READY = 120.0  # seconds until a new zygote has imported and warmed everything
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # fork wants one thread
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp/sandbox/run",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "1",  # threads share one heap, so that RLIMIT_AS means the same for all
    **dict.fromkeys(_THREADS, "1"),
}


class Zygote:
    """One warm interpreter, seen from outside. Raises LostError from its constructor with the
    reason for which this tier does not hold.

    The counts are the pool's: `active` runs and cells at this moment, open `sessions`, `runs` ever.
    """

    def __init__(self, tier: Tier, search: Sequence[str], preload: Sequence[str], warmup: str,
                 limits: Limits) -> None:  # fmt: skip
        self.active = self.sessions = self.runs = self.memory = 0
        self.scratch: str | None = None
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = here
        root = str(Path(__file__).resolve().parents[2])
        environment = ENVIRONMENT | {"PYTHONPATH": root}
        if (libraries := os.environ.get("LD_LIBRARY_PATH")) is not None:
            environment["LD_LIBRARY_PATH"] = libraries  # some interpreters need it to start
        owner = os.pidfd_open(os.getpid())
        with tempfile.TemporaryFile() as log:
            command = [sys.executable, "-s", "-S", "-P", "-B", "-m", "shared.sandbox.warden"]
            self.process = subprocess.Popen(
                [*command, str(there.fileno()), str(owner)],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(there.fileno(), owner),
                start_new_session=True,  # a Ctrl-C is for the owner, who then closes this
            )
            there.close()
            os.close(owner)
            answer = self._configure(tier, search, preload, warmup, limits)
            if "ready" not in answer:
                self.kill()
                log.seek(0)
                said = log.read().decode("utf-8", "replace").strip()
                raise LostError(answer.get("failed") or said[-2000:] or "it ended without a word")
        self.scratch, self._begun_with = answer["scratch"], int(answer["memory"])

    def _configure(self, tier: Tier, search: Sequence[str], preload: Sequence[str], warmup: str,
                   limits: Limits) -> dict[str, str]:  # fmt: skip
        self.control.settimeout(_READY)
        try:
            send(self.control, {"tier": tier, "search": search, "preload": preload,
                                "warmup": warmup, "limits": asdict(limits)})  # fmt: skip
            body = receive(self.control).body
        except TimeoutError:
            body = b'{"failed": "not ready in time"}'
        except OSError:
            body = b""
        self.control.settimeout(None)
        answer: dict[str, str] = json.loads(body or b"{}")
        return answer

    def request(self, body: dict[str, object], fds: Sequence[int]) -> socket.socket:
        """Send a request; returns the socket on which its answers arrive."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            send(self.control, body, [*fds, there.fileno()])
        except OSError as error:
            here.close()
            raise LostError(f"the zygote is gone: {error}") from error
        finally:
            there.close()
        return here

    def taken(self) -> Zygote:
        """One more run or cell is on it; by whoever holds the pool's lock."""
        self.active += 1
        self.runs += 1
        return self

    def note(self, end: End) -> None:
        self.memory = max(self.memory, end.zygote)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def worn(self) -> bool:
        grown = self.memory - self._begun_with > GROWTH
        return self.runs >= RUNS_PER_ZYGOTE or grown

    def close(self) -> None:
        """Ask it to end, and make sure that it has."""
        with contextlib.suppress(OSError):
            send(self.control, {"stop": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.control.close()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


def search_path() -> list[str]:
    """Where this interpreter finds installed packages, without links. The checkout is not one."""
    own = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    seen = [p for p in sys.path if p in own or p.endswith(("site-packages", "dist-packages"))]
    return list(dict.fromkeys(os.path.realpath(p) for p in seen))


def host_paths(search: Sequence[str]) -> list[str]:
    """What of the host's paths a traceback could show, longest first."""
    library = os.path.realpath(sysconfig.get_paths()["stdlib"])
    return sorted({*search, library, sysconfig.get_paths()["stdlib"]}, key=len, reverse=True)
