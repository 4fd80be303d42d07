"""A process of the jail as the warden, its parent, knows it."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Child:
    """`ended` is called with its wait status and usage when it is reaped."""

    pid: int
    pidfd: int
    ended: Callable[[int, resource.struct_rusage], None]
    running: bool = True  # model code runs in it
    threads: int = 0  # started in all

    def cpu(self) -> float:
        """CPU seconds of all its threads until now."""
        return time.clock_gettime((~self.pid << 3) | 2)  # CPUCLOCK_SCHED of another process

    def signal(self, number: signal.Signals) -> None:
        """It is not reaped yet, so this cannot miss."""
        signal.pidfd_send_signal(self.pidfd, number)


def ended_facts(status: int, usage: resource.struct_rusage) -> dict[str, Any]:
    """Wait status, CPU seconds, peak memory in bytes, and the peak memory of the warden."""
    cpu = usage.ru_utime + usage.ru_stime
    return {"status": status, "cpu": cpu, "memory": usage.ru_maxrss * 1024, "zygote": peak()}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
