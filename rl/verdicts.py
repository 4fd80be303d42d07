"""What the exit status of a job's program says."""

from __future__ import annotations

import signal

from rl.job_rows import TERMINATED
from shared.store.models import JobState

ERROR_LINES = 40  # of the log, told with a failure


def verdict(code: int) -> tuple[JobState, str | None, str | None]:
    """State, error class, text. A shell's way of telling signals: 128 and their number."""
    if code == 0:
        return JobState.DONE, None, None
    if code < 0:
        return JobState.FAILED, "keeper", f"its keeper ended by signal {-code}"
    if code <= 128:
        return JobState.FAILED, "exit", f"exit status {code}"
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return JobState.FAILED, "exit", f"exit status {code}"
    if name == "SIGTERM":
        return JobState.FAILED, TERMINATED, "ended by SIGTERM"
    hint = ": out of memory, perhaps" if name == "SIGKILL" else ""
    return JobState.FAILED, "killed", f"ended by {name}{hint}"
