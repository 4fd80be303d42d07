"""The end of a job, as those see it who started its program: what an exit status says, and that it
is recorded even where the database restarts this moment."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

from rl.job_rows import TERMINATED
from shared.errors import DatabaseError
from shared.store.models import JobState

ERROR_LINES = 40  # of the log, told with a failure
PATIENCE = 600.0  # seconds that a database may be away

log = logging.getLogger(__name__)


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


def patiently(call: Callable[[], object], patience: float = PATIENCE) -> None:
    """Call until the database answers. Raises DatabaseError where it does not come back."""
    deadline = time.monotonic() + patience
    while True:
        try:
            call()
        except DatabaseError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("trying again: %s", error.what)
            time.sleep(1.0)
        else:
            return
