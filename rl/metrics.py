"""What a job measures, step by step: to a file always, to the database and trackers where wanted.

Contract. OUT/metrics.jsonl has every step once, each written through to the system before `log`
returns: kill -9 loses none. A job that resumes at step s makes steps >= s anew, so its first `log`
cuts them off, in the file and in the database. The database may be away: steps wait and are sent
when it is back, also those of an earlier start that never were. Neither a database nor a tracker
that fails ends a training; both are warned about, once.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rl import job_rows
from rl.job_rows import Hold
from rl.jobs import Job
from rl.trackers import TRACKERS, Run, Tracker
from shared.config import choose
from shared.errors import DatabaseError
from shared.store.database import Database
from shared.trajectory import clean

FILE = "metrics.jsonl"
RESERVED = frozenset({"step", "time"})
RETRY_SECONDS = 2.0
CLOSE_SECONDS = 20.0  # how long the end waits for a database that is away
BATCH = 500  # steps per statement

log = logging.getLogger(__name__)


class Metrics(Protocol):
    """Names are paths ("reward/episode", "time/generate"); values are numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Of the ranks that do not report."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def open_metrics(
    trackers: Sequence[str],
    out: Path,
    job: Job | None,
    *,
    config: Mapping[str, Any],
    project: str = "tirgen-rl",
) -> Metrics:
    """The metrics of rank 0. Raises ConfigError for a tracker that is unknown or not installed."""
    for name in trackers:
        choose(name, TRACKERS, "tracker", "log.trackers")
    run = Run(project, job.name if job else out.name, out, config)
    made = [(name, TRACKERS[name](run)) for name in trackers]
    out.mkdir(parents=True, exist_ok=True)
    sender = None
    if job is not None and job.db is not None and job.hold is not None:
        sender = Sender(job.db, job.hold)
    return Recorder(out / FILE, sender, made)


class Recorder:
    """Steps come in order, each once: what belongs to one step is logged together."""

    def __init__(
        self, file: Path, sender: Sender | None, trackers: Sequence[tuple[str, Tracker]] = ()
    ) -> None:
        self.file, self.sender = file, sender
        self.trackers = [_Warned(name, tracker) for name, tracker in trackers]
        self._lines: TextIO | None = None
        self._last = -1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Raises ValueError for a step that is not after the last one, and for a name that the
        file needs itself; OSError where the file cannot be written."""
        if step <= self._last or step < 0:
            raise ValueError(f"step {step} after step {self._last}: a step is logged once")
        if RESERVED & values.keys():
            raise ValueError(f"not a name for a metric: {', '.join(RESERVED & values.keys())}")
        plain = {name: float(value) for name, value in values.items()}
        now = time.time()
        if self._lines is None:
            earlier = cut(self.file, step)
            self._lines = self.file.open("a", encoding="utf-8")
            if self.sender is not None:
                self.sender.begin(step, earlier)
        stored = clean(plain)[0]
        self._lines.write(json.dumps({"step": step, "time": now, **stored}) + "\n")
        self._lines.flush()
        self._last = step
        if self.sender is not None:
            self.sender.add((step, json.dumps(stored), now))
        for tracker in self.trackers:
            tracker.log(step, plain)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        for tracker in self.trackers:
            tracker.close()
        if self.sender is not None:
            self.sender.close()


Logged = tuple[int, str, float]  # step, values as JSON, time


def read(file: Path) -> list[Logged]:
    """The whole lines of a metrics file; nothing where there is none."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
            step, at = int(values.pop("step")), float(values.pop("time"))
        except (ValueError, TypeError, AttributeError, KeyError):
            continue  # the last one of a process that was killed
        found.append((step, json.dumps(values), at))
    return found


def cut(file: Path, step: int) -> list[Logged]:
    """Leave the steps before `step` in the file, and return them."""
    found = read(file)
    kept = [logged for logged in found if logged[0] < step]
    whole = "".join(
        json.dumps({"step": n, "time": at, **json.loads(values)}) + "\n" for n, values, at in kept
    )
    if file.exists() and file.read_bytes() != whole.encode():
        part = file.with_name(f".{file.name}.part")
        part.write_text(whole, encoding="utf-8")
        part.replace(file)
    return kept


def catch_up(db: Database, hold: Hold, logged: Sequence[Logged]) -> None:
    """Send steps that the database may not have; those that it has stay as they are."""
    for start in range(0, len(logged), BATCH):
        job_rows.add_metrics(db, hold, logged[start : start + BATCH])


class Sender(threading.Thread):
    """Brings steps into the database, in order, whenever it is there."""

    def __init__(self, db: Database, hold: Hold) -> None:
        super().__init__(name="metrics", daemon=True)
        self.db, self.hold = db, hold
        self._wake = threading.Condition()
        self._waiting: list[Logged] = []
        self._undo: int | None = None
        self._closing = False

    def begin(self, step: int, earlier: Sequence[Logged]) -> None:
        """Forget what the database has from `step` on; send what it lacks of the steps before."""
        self._undo, self._waiting = step, list(earlier)
        self.start()

    def add(self, logged: Logged) -> None:
        with self._wake:
            self._waiting.append(logged)
            self._wake.notify()

    def close(self) -> None:
        """Wait for the last steps, but not for ever."""
        if not self.is_alive():
            return
        with self._wake:
            self._closing = True
            self._wake.notify()
        self.join(CLOSE_SECONDS)
        if self._waiting:
            log.warning(
                "%d steps are not in the database; %s has them, and a resumed job sends them",
                len(self._waiting), FILE,
            )  # fmt: skip

    def run(self) -> None:
        warned = False
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._waiting or self._undo is not None or self._closing
                )
                batch = self._waiting[:BATCH]
                if not batch and self._undo is None:
                    return
            try:
                if self._undo is not None:
                    job_rows.undo_steps(self.db, self.hold, self._undo)
                    self._undo = None
                if batch:
                    job_rows.add_metrics(self.db, self.hold, batch)
            except DatabaseError as error:
                if not warned:
                    log.warning("metrics wait for the database: %s", error.what)
                warned = True
                time.sleep(RETRY_SECONDS)
                continue
            except Exception:
                log.exception("metrics are no longer sent to the database; %s has them", FILE)
                return
            warned = False
            with self._wake:
                del self._waiting[: len(batch)]


class _Warned:
    """A tracker whose failures are told once and then ignored."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker, self._failed = name, tracker, False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self.tracker.log(step, values)
        except Exception as error:  # noqa: BLE001 (a tracker's trouble must not end a training)
            self._warn(error)

    def close(self) -> None:
        try:
            self.tracker.close()
        except Exception as error:  # noqa: BLE001 (as above)
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._failed:
            log.warning("%s does not take metrics: %s: %s", self.name, type(error).__name__, error)
        self._failed = True
