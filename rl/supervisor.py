"""Runs one job from here: starts its processes, beats for it, ends it when that is asked for.

    python -m rl.supervisor JOB

Used by `tirgen-rl launch` (in the terminal, or detached) and by workers. The processes live in
keepers (rl/keeper.py), one per host, each at the end of a pipe: if this process dies, however it
dies, they end, and the job's heartbeat with them. A job is tried once here: what fails is failed,
with the end of its log; only a worker that is told to stop gives its job back.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO

from rl import job_rows, metrics
from rl.job_file import CHECKPOINT, RECIPE, Host, Spec, host_commands
from rl.job_rows import Hold, JobLost
from rl.jobs import BEAT_SECONDS, JOB
from rl.keeper import MARK
from rl.logs import LOG, last_lines, read_tail
from rl.verdicts import ERROR_LINES, patiently, verdict
from shared.errors import DatabaseError, InputError
from shared.store.database import Database, resolve_url
from shared.store.models import JobPlace, JobRow, JobState

TICK = 0.1
KILL_SECONDS = 10.0  # from SIGTERM to SIGKILL, but no longer than the grace
OVER_SECONDS = 60.0  # for processes to end once the trainer has said how the job ended
SAVE_SECONDS = 60.0  # the same where a worker stops and the job is to go on elsewhere
INTERRUPT_GRACE = 30.0
FORWARDED = ("TIRGEN_", "HF_", "NCCL_", "OMP_")  # environment that goes to hosts reached by ssh

Keeper = subprocess.Popen[str]

log = logging.getLogger(__name__)


def supervise(
    db: Database,
    job_id: int,
    stopping: Callable[[], bool] = lambda: False,
    tick: Callable[[], object] = lambda: None,
) -> JobState | None:
    """Run a queued job to its end; the state it came to. None if it was not to be had, or lost.

    `stopping`: the worker that this is done for has been told to stop. `tick` is called all along.
    SIGTERM means the same as `stopping`. SIGINT cancels the job; a second one does not wait.
    """
    with db.session() as session:
        row = session.get(JobRow, job_id)
    hold = job_rows.take(db, job_id, socket.gethostname(), os.getpid())
    if row is None or hold is None:
        return None
    keepers: list[Keeper] = []
    with _signals() as told:
        try:
            supervisor = _Supervisor(db, row, hold, stopping, tick, told, keepers)
            return supervisor.run()
        except BaseException as error:
            for keeper in keepers:
                _tell(keeper, "0")
                keeper.wait()
            name, what = type(error).__name__, str(error)
            patiently(lambda: job_rows.end(db, hold, JobState.FAILED, name, what))
            raise


@dataclass
class _Told:
    """Which signals came."""

    terminated: bool = False
    interrupts: int = 0


class _Supervisor:
    def __init__(
        self,
        db: Database,
        row: JobRow,
        hold: Hold,
        stopping: Callable[[], bool],
        tick: Callable[[], object],
        told: _Told,
        keepers: list[Keeper],
    ) -> None:
        self.db, self.hold, self.name = db, hold, row.name
        self.spec = Spec.model_validate(row.spec)
        self.stopping, self.tick, self.told = stopping, tick, told
        self.out = Path(self.spec.out)
        self.keepers = keepers
        self.asked = False  # were the keepers told to end?
        self._known: int | None = None
        self._warned = False
        self._interrupts = 0
        self._over: float | None = None  # since when

    def run(self) -> JobState | None:
        stopped = False
        self._start()
        next_beat = 0.0
        while any(keeper.poll() is None for keeper in self.keepers):
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                try:
                    self._beat()
                except JobLost as error:
                    log.error("%s: its processes are ended", error.what)  # noqa: TRY400
                    self.end_all(0.0)
                    return None
            if self.told.interrupts > self._interrupts:
                self._interrupts = self.told.interrupts
                self._cancel(INTERRUPT_GRACE if self._interrupts == 1 else 0.0)
                next_beat = 0.0
            if (self.told.terminated or self.stopping()) and not stopped:
                stopped = True
                self.ask_all(SAVE_SECONDS if self._goes_on else KILL_SECONDS)
            if any(keeper.poll() for keeper in self.keepers):
                self.ask_all(KILL_SECONDS)  # one host has failed: the others wait in vain
            self.tick()
            time.sleep(TICK)
        self.tick()
        return self._close(stopped)

    def _start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.spec.recipe is not None:
            (self.out / RECIPE).write_text(self.spec.recipe, encoding="utf-8")
        resume = (self.out / CHECKPOINT).exists()
        commands = host_commands(self.spec, self.hold.id, resume=resume)
        mark = secrets.token_hex(8)
        with (self.out / LOG).open("a", encoding="utf-8") as output:
            print(f"[{datetime.now():%F %T}] {self.name}: {' '.join(commands[0])}", file=output)
            output.flush()
            for host, command in zip(self.spec.hosts, commands, strict=True):
                self.keepers.append(self._keeper(host, command, mark, output))

    def _keeper(self, host: Host, command: list[str], mark: str, output: IO[str]) -> Keeper:
        here = host.address in (None, "localhost", socket.gethostname())
        env = {
            **({} if here else _forwarded(os.environ)),
            **self.spec.env,
            "TIRGEN_DATABASE_URL": self.db.url.render_as_string(hide_password=False),
            JOB: f"{self.hold.id}:{self.hold.token}",
            MARK: mark,
        }
        order = {"command": command, "cwd": self.spec.cwd, "env": env, "grace": KILL_SECONDS}
        keeper = [self.spec.python, "-m", "rl.keeper"]
        reached = [] if here else ["ssh", "-o", "BatchMode=yes", str(host.address)]
        process = subprocess.Popen(
            [*reached, *keeper],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a signal to our group is ours to pass on
            text=True,
        )
        # By its input, not its arguments: those are for every user of the host to see.
        _tell(process, json.dumps(order))
        return process

    def ask_all(self, grace: float) -> None:
        """Let all keepers end what they keep, once."""
        if not self.asked:
            for keeper in self.keepers:
                _tell(keeper, f"{grace}")
        self.asked = True

    def end_all(self, grace: float) -> None:
        self.ask_all(grace)
        for keeper in self.keepers:
            keeper.wait()

    def _beat(self) -> None:
        """Where the job's end was asked for, it has its grace to come to it by itself."""
        tail = read_tail(self.out / LOG, self._known)
        try:
            order = job_rows.beat(self.db, self.hold, tail)
        except DatabaseError as error:
            if not self._warned:
                log.warning("no heartbeat: %s", error.what)
            self._warned = True
            return
        self._warned = False
        self._known = tail.n_bytes if tail else self._known
        if order.over:
            self._over = self._over or time.monotonic()
            if time.monotonic() > self._over + OVER_SECONDS:
                self.ask_all(KILL_SECONDS)
        if order.asked is not None and order.asked >= order.grace:
            self.ask_all(min(KILL_SECONDS, order.grace))

    def _cancel(self, grace: float) -> None:
        with suppress(DatabaseError, InputError):
            job_rows.ask_to_stop(self.db, self.name, grace)

    @property
    def _goes_on(self) -> bool:
        return self.spec.place is JobPlace.CELERY

    def _close(self, stopped: bool) -> JobState | None:
        """The trainer's own word counts, if it came to say one."""
        tail = read_tail(self.out / LOG)
        code = next((keeper.returncode for keeper in self.keepers if keeper.returncode), 0)
        state, error_class, error_text = verdict(code)
        if code and tail:
            error_text = f"{error_text}\n{last_lines(tail.text, ERROR_LINES)}"

        def close() -> None:
            logged = metrics.read(self.out / metrics.FILE)
            metrics.catch_up(self.db, self.hold, logged)
            if stopped and code and self._goes_on:
                job_rows.give_back(self.db, self.hold, tail)
            else:
                job_rows.end(self.db, self.hold, state, error_class, error_text, tail)

        patiently(close)
        with self.db.session() as session:
            row = session.get(JobRow, self.hold.id)
        return None if row is None or row.token != self.hold.token else JobState(row.state)


def _tell(process: Keeper, line: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def _forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(FORWARDED)}


@contextmanager
def _signals() -> Iterator[_Told]:
    """SIGTERM and SIGINT noted while the block runs; SIGTERM takes its usual course after it."""
    told = _Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            told.terminated = True
        else:
            told.interrupts += 1

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if told.terminated:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    state = supervise(Database(resolve_url()), int(sys.argv[1]))
    return 0 if state is JobState.DONE else 1


if __name__ == "__main__":
    sys.exit(main())
