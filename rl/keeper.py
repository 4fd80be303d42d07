"""Runs one command of a job on one host, and answers for the end of every process of it.

    python -m rl.keeper < order

The first line of standard input is the order, JSON: command, cwd, env, grace. After that it waits.
When its input ends, whoever started it wants the end or is dead: it sends SIGTERM to the ranks,
and after `grace` seconds SIGKILL to all there is. A line with a number before that is another
grace. SIGTERM and SIGINT to the keeper mean the same.

Whose processes they are is told by a mark in their environment, which they inherit: torchrun starts
each rank in a session of its own, so that neither a process group nor a session holds them all.
Ranks end in order on SIGTERM; torchrun gets none, since it would kill ranks that still save.

Nothing but the standard library: it starts in a moment, on any host, also by ssh.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

MARK = "TIRGEN_JOB_MARK"
TICK = 0.05


def main() -> int:
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end of our input says the same
    lines = _Lines(0)
    order = json.loads(lines.wait())
    mark, grace = order["env"][MARK], float(order["grace"])
    child = subprocess.Popen(
        order["command"],
        cwd=order["cwd"],
        env=os.environ | order["env"],
        stdin=subprocess.DEVNULL,
    )
    while child.poll() is None and not told and not lines.ended:
        for line in lines.read(TICK):
            grace = float(line)
            lines.ended = True
    end(mark, child, grace)
    code = child.wait()
    return 128 - code if code < 0 else code


def end(mark: str, child: subprocess.Popen[Any], grace: float) -> None:
    """Return when no process with this mark is left."""
    deadline = time.monotonic() + grace
    asked: set[int] = set()
    while found := marked(mark):
        over = child.poll() is not None or time.monotonic() >= deadline
        for pid in found if over else leaders(found, child.pid) - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if over else signal.SIGTERM)
            asked.add(pid)
        time.sleep(TICK)


def marked(mark: str) -> dict[int, bool]:
    """Living processes with this mark; whether each is a rank of torchrun's, or below one."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):  # another user's, or gone
            environment = (entry / "environ").read_bytes().split(b"\0")
            if wanted in environment:
                found[int(entry.name)] = any(one.startswith(b"RANK=") for one in environment)
    return found


def leaders(found: dict[int, bool], child: int) -> set[int]:
    """The ranks themselves, not what they have started; without torchrun, the command itself."""
    ranks = {pid for pid, is_rank in found.items() if is_rank}
    return {pid for pid in ranks if _parent(pid) not in ranks} or {child} & found.keys()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class _Lines:
    """Lines of a pipe as they come. `ended` once its other end is closed."""

    def __init__(self, fd: int) -> None:
        self.fd, self.ended = fd, False
        self._rest = b""

    def read(self, seconds: float) -> list[str]:
        """The lines that come within so many seconds."""
        if select.select([self.fd], [], [], seconds)[0]:
            piece = os.read(self.fd, 1 << 16)
            self.ended = not piece
            self._rest += piece
        *whole, self._rest = self._rest.split(b"\n")
        return [line.decode() for line in whole]

    def wait(self) -> str:
        """The first line."""
        while not self.ended:
            for line in self.read(60.0):
                return line
        raise SystemExit("rl.keeper: no order came")


if __name__ == "__main__":
    sys.exit(main())
