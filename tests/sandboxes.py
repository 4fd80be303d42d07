"""What the sandbox's tests share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil

from shared.sandbox import Sandbox


@contextlib.contextmanager
def bare(**options: object) -> Iterator[Sandbox]:
    """One zygote that preloads nothing: quick to start."""
    with Sandbox(**{"zygotes": 1, "preload": (), "warmup": "", **options}) as opened:  # type: ignore[arg-type]
        yield opened


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.02)


def processes(sandbox: Sandbox) -> list[psutil.Process]:
    """Of the sandbox: launchers, zygotes, runs, states."""
    found = []
    for zygote in list(sandbox._all):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(zygote.process.pid)
            found += [process, *process.children(recursive=True)]
    return found


def lose_zygotes(sandbox: Sandbox) -> None:
    """Kill them from outside, and wait until nothing of them is left."""
    dying = processes(sandbox)
    for zygote in list(sandbox._all):
        zygote.process.kill()
    assert not psutil.wait_procs(dying, timeout=60)[1]
