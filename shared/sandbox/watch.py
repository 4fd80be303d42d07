"""The outside of one run: reads what it writes, ends it when it has used its share, judges it.

CPU time decides a timeout and wall time is a backstop, so that a busy host changes no outcome. The
clock starts when the process does, never while a run waits for a free zygote. Output is cut while
it is read. The outcome comes from the exit status that `wait4` gave and from what was decided here;
the exception's facts are the run's own claim, and count only where the exit status says failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from shared.sandbox.limits import Limits
from shared.sandbox.packets import Packet, receive
from shared.sandbox.result import CodeError, Outcome, RunResult, Tier

_STARTUP = 20.0  # seconds in which a live zygote has forked and a killed process is reaped
_FACTS = 64 << 10
_PAGE = os.sysconf("SC_PAGE_SIZE")


class LostError(Exception):
    """The other side is gone or breaks the protocol: nothing can be said about the run."""


class GoneError(LostError):
    """The state that a cell was to start from is not there any more."""


class BrokenError(Exception):
    """A session's own processes do not behave: hostile code has been at work in it."""


class Ended(StrEnum):
    """Why a run was killed from here."""

    TIMEOUT = "timeout"
    FLOOD = "flood"
    CANCELLED = "cancelled"


class Cancel:
    """A flag that a selector can wait for."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_set = False
        self._lock = threading.Lock()

    def set(self) -> None:
        with self._lock:
            self.is_set = True
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def __enter__(self) -> Cancel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the jail: its pid as seen from here, and a descriptor that cannot be reused."""

    pid: int
    pidfd: int

    @classmethod
    def from_pidfd(cls, pidfd: int) -> Process:
        info = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        found = re.search(r"^Pid:\s*(-?\d+)", info, re.MULTILINE)
        return cls(int(found[1]) if found else -1, pidfd)

    def cpu(self) -> float:
        """CPU seconds of all its threads; 0.0 when it has ended (`wait4` knows better then)."""
        if self.pid <= 0:
            return 0.0
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # CPUCLOCK_SCHED of another process
        except OSError:
            return 0.0

    def faults(self) -> int:
        """Pages that it has come by, and not by its fork; 0 when it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # or a /proc that hides it
            return 0
        return int(fields[7])  # minflt

    def held(self, before: int) -> int:
        """Bytes of memory that it does not share with what it was when it had `before` faults, at
        most: each began with a fault (there are no huge pages in the jail) and is anonymous. Read
        from outside: it cannot lie."""
        try:
            _, resident, shared = Path(f"/proc/{self.pid}/statm").read_text().split()[:3]
        except OSError:
            return 0
        return max(0, min(self.faults() - before, int(resident) - int(shared))) * _PAGE

    def kill(self) -> bool:
        """False where it has been reaped already."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        os.close(self.pidfd)


class Pipe:
    """What a run writes to one descriptor: the first `keep` bytes, and how many more there were."""

    def __init__(self, keep: int) -> None:
        self.keep, self.kept, self.cut = keep, bytearray(), 0
        self.source, self.sink = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.source, False)

    def read(self) -> bool:
        """Take what is there now; False at the end."""
        try:
            data = os.read(self.source, 1 << 16)
        except BlockingIOError:
            return True
        room = self.keep - len(self.kept)
        self.kept += data[:room]
        self.cut += max(0, len(data) - room)
        return bool(data)

    def drain(self) -> None:
        before = -1
        while before != (before := len(self.kept) + self.cut) and self.read():
            pass

    @property
    def size(self) -> int:
        return len(self.kept) + self.cut

    def text(self) -> str:
        return self.kept.decode("utf-8", "replace")


@dataclass(slots=True)
class End:
    """How the process ended: its wait status, or `kept` where a cell became a session's state.

    Bytes: `memory` its peak, `held` what a kept state holds beyond the one before, `zygote` the
    zygote's own peak.
    """

    status: int
    cpu: float
    memory: int
    kept: bool = False
    held: int = 0
    zygote: int = 0


@dataclass
class Watch:
    """Use: ask the zygote with `descriptors` and a status socket, `until_end`, then `result`."""

    limits: Limits
    timeout: float
    cancel: int  # an eventfd; readable means: give up
    ours: bool = True  # what is asked to start it is our own; False: a session's, which may not
    may_be_kept: bool = False  # it is a cell, whose state may outlive it
    end: End | None = None
    process: Process | None = None
    killed: Ended | None = None
    _used: float = 0.0  # CPU seconds, and page faults, of the process before it began with this
    _faults: int = 0
    _began: float = field(default_factory=time.monotonic)
    _killed_at: float = 0.0

    def __post_init__(self) -> None:
        self.out, self.err = Pipe(self.limits.output), Pipe(self.limits.output)
        self.facts = Pipe(_FACTS)
        self.selector = selectors.DefaultSelector()
        for pipe in (self.out, self.err, self.facts):
            self.selector.register(pipe.source, selectors.EVENT_READ, lambda p=pipe: self._read(p))
        self.selector.register(self.cancel, selectors.EVENT_READ, self._cancelled)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.selector.close()
        self.give_away()
        for pipe in (self.out, self.err, self.facts):
            os.close(pipe.source)

    @property
    def descriptors(self) -> list[int]:
        return [self.out.sink, self.err.sink, self.facts.sink]

    def give_away(self) -> None:
        """Close our copies of what the run writes to."""
        for pipe in (self.out, self.err, self.facts):
            if pipe.sink >= 0:
                os.close(pipe.sink)
                pipe.sink = -1

    def until_end(self, status: socket.socket) -> End:
        """Follow what the zygote says on `status`.

        Raises LostError where the zygote is gone or the process neither starts nor ends when it
        must, GoneError and BrokenError as it says. No process is left in either case, except that
        of a cell that was kept.
        """
        self.give_away()
        self.selector.register(status, selectors.EVENT_READ, lambda: self._told(receive(status)))
        try:
            while self.end is None:
                for key, _ in self.selector.select(self._next_look()):
                    key.data()
                self._police()
        finally:
            if self.process is not None:
                if self.end is None:
                    self.process.kill()
                self.process.close()
        for pipe in (self.out, self.err, self.facts):
            pipe.drain()
        return self.end

    def kill(self, why: Ended) -> None:
        if self.killed is None and (self.process is None or self.process.kill()):
            self.killed, self._killed_at = why, time.monotonic()

    # ---- inside ----------------------------------------------------------------------------------

    def _told(self, packet: Packet) -> None:
        if not packet.body:
            raise LostError("the zygote died")
        body = packet.json()
        if "started" in body:
            self.process, self._began = Process.from_pidfd(packet.fds[0]), time.monotonic()
            self._used = body.get("cpu", 0.0)
            self._faults = self.process.faults() if self.may_be_kept else 0
            if self.killed is not None:
                self.process.kill()
        elif "status" in body:
            cpu = body["cpu"] - self._used
            self.end = End(body["status"], cpu, body["memory"], zygote=body["zygote"])
        elif "kept" in body:
            assert self.process is not None
            cpu, held = self._cpu(), self.process.held(self._faults)
            self.end = End(0, cpu, body["memory"], kept=self.killed is None, held=held)
        elif "broken" in body:
            raise BrokenError(body["broken"])
        elif "gone" in body:
            raise GoneError("the state is gone")
        else:
            raise LostError(body.get("failed", "the zygote talks nonsense"))

    def _cpu(self) -> float:
        assert self.process is not None
        return max(0.0, self.process.cpu() - self._used)

    def _read(self, pipe: Pipe) -> None:
        if not pipe.read():
            self.selector.unregister(pipe.source)
        if self._flooded:
            self.kill(Ended.FLOOD)

    @property
    def _flooded(self) -> bool:
        return self.out.size + self.err.size + self.facts.size > self.limits.flood + _FACTS

    def _cancelled(self) -> None:
        self.selector.unregister(self.cancel)
        self.kill(Ended.CANCELLED)

    def _next_look(self) -> float:
        if self.process is None or self.killed is not None:
            return 0.5
        wall = self.limits.wall(self.timeout) - (time.monotonic() - self._began)
        return max(0.001, min(self.timeout - self._cpu(), wall))

    def _police(self) -> None:
        now = time.monotonic()
        if self.end is not None:
            return
        if self.process is None:
            if now - self._began > _STARTUP:
                error = LostError if self.ours else BrokenError
                raise error(f"no process was started within {_STARTUP:.0f} s")
        elif self.killed is not None:
            if now - self._killed_at > _STARTUP:
                raise LostError(f"a killed process was not reaped within {_STARTUP:.0f} s")
        elif self._cpu() >= self.timeout or now - self._began >= self.limits.wall(self.timeout):
            self.kill(Ended.TIMEOUT)

    # ---- judging ---------------------------------------------------------------------------------

    def result(self, tier: Tier, hide: Callable[[str], str]) -> RunResult:
        """`hide` takes the host's paths out of a text. Raises LostError: it never got ready."""
        assert self.end is not None
        outcome, error = self._judge(self.end)
        if error is not None:
            error = CodeError(error.type, hide(error.message), error.line, hide(error.traceback))
        return RunResult(
            outcome=outcome,
            stdout=self.out.text(),
            stderr=hide(self.err.text()),
            error=error,
            tier=tier,
            duration=time.monotonic() - self._began,
            cpu_time=self.end.cpu,
            peak_memory=self.end.memory,
            bytes_cut=self.out.cut + self.err.cut,
        )

    def _judge(self, end: End) -> tuple[Outcome, CodeError | None]:
        printed = Outcome.OK if self.out.kept.strip() else Outcome.NO_OUTPUT
        # Told by what was used, not by who noticed first: a busy host must not change an outcome.
        if self._flooded:
            text = f"wrote more than flood={self.limits.flood} bytes"
            return Outcome.MODEL_ERROR, CodeError("OutputLimit", text, None, "")
        if self.killed is Ended.TIMEOUT or end.cpu >= self.timeout:
            wall = self.limits.wall(self.timeout)
            text = (
                f"not done after timeout={self.timeout:g} s of CPU time ({wall:g} s of wall time)"
            )
            return Outcome.TIMEOUT, CodeError("TimeLimit", text, None, "")
        if end.kept:
            return printed, None
        signalled = -os.waitstatus_to_exitcode(end.status)
        if not self.facts.kept.startswith(b"R"):
            raise LostError(f"a run did not get ready: {self.facts.text()[1:] or 'killed'}")
        if signalled > 0:
            name = signal.Signals(signalled).name
            return Outcome.MODEL_ERROR, CodeError(name, f"killed by {name}", None, "")
        if signalled == 0:
            return printed, None
        return Outcome.MODEL_ERROR, self._claimed(-signalled)

    def _claimed(self, status: int) -> CodeError:
        """The exception as the run tells it; whatever it tells, the run has failed."""
        claim: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            claim = json.loads(self.facts.kept[1:])
        if not isinstance(claim, dict):
            return CodeError("SystemExit", f"ended with exit status {status}", None, "")
        kind, message, trace = (_text(claim.get(key)) for key in ("type", "message", "traceback"))
        line = claim.get("line")
        if kind == "MemoryError" and not message:
            message = f"out of memory={self.limits.memory} bytes"
        return CodeError(kind, message, line if type(line) is int else None, trace)


def _text(value: object) -> str:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
