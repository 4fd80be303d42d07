"""The outside of the jail: zygotes, admission, and one object for sync and async callers.

Contract: a run holds one zygote while it lasts, so at most `zygotes` runs at once, and others wait
without their clock running. A zygote that is lost is replaced and its run tried once more on a new
one; a second loss is an infrastructure error. Closing leaves no process and no directory behind; so
does the death of the owning process, which zygotes watch through a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from shared.errors import SandboxError
from shared.sandbox.limits import Limits
from shared.sandbox.packets import Packet, as_memfd, receive, send
from shared.sandbox.result import CodeError, Outcome, RunResult, Tier
from shared.sandbox.session import Session
from shared.sandbox.watch import Cancel, End, LostError, Process, Watch

T = TypeVar("T")

PRELOAD = ("sympy", "numpy", "scipy.optimize", "scipy.integrate", "scipy.special", "scipy.linalg")
WARMUP = """
import numpy, scipy.optimize, sympy
from sympy import *
x, y = symbols("x y")
solve(x**2 - 3 * x + 2, x), solve([x + y - 3, x - y - 1], [x, y]), Eq(x, y), latex(x**2 / 2)
simplify(sin(x) ** 2 + cos(x) ** 2), factor(x**3 - 1), expand((x + y) ** 3), nsimplify(0.25)
integrate(x * exp(x), x), diff(sin(x) / x, x), limit(sin(x) / x, x, 0), sqrt(8).evalf()
factorint(360), str(Rational(1, 3) + x), Matrix([[1, 2], [3, 4]]).det(), summation(x, (x, 1, 10))
numpy.linalg.eigvals(numpy.eye(2)), scipy.optimize.brentq(lambda t: t * t - 2, 0, 2)
"""
TIERS = tuple(Tier)  # strongest first; the first that holds is taken
RUNS_PER_ZYGOTE = 2000  # then it is replaced: whatever a kernel object leaks does not add up
_READY = 120.0  # seconds until a new zygote has imported and warmed everything
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # fork wants one thread
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp/sandbox",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    **dict.fromkeys(_THREADS, "1"),
}
_REMEDIES = {
    Tier.A: "allow user namespaces (user.max_user_namespaces > 0, on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0, in Docker a seccomp profile with unshare and "
    "mount), or accept minimum_tier=B",
    Tier.B: "use a kernel of 5.13 or later with landlock among its security modules (lsm=), on "
    "x86_64 or aarch64, or accept minimum_tier=C",
    Tier.C: "allow seccomp filters on x86_64 or aarch64, or run elsewhere; minimum_tier=D runs "
    "model code without any wall",
    Tier.D: "see the reason",
}


class Zygote:
    """One warm interpreter, seen from outside. Raises LostError from its constructor with the
    reason for which this tier does not hold."""

    def __init__(self, tier: Tier, search: Sequence[str], preload: Sequence[str], warmup: str,
                 limits: Limits) -> None:  # fmt: skip
        self.runs = 0
        self.sessions = 0
        self.scratch: str | None = None
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = here
        root = str(Path(__file__).resolve().parents[2])
        environment = _ENVIRONMENT | {"PYTHONPATH": root}
        if (libraries := os.environ.get("LD_LIBRARY_PATH")) is not None:
            environment["LD_LIBRARY_PATH"] = libraries  # some interpreters need it to start
        owner = os.pidfd_open(os.getpid())
        with tempfile.TemporaryFile() as log:
            command = [sys.executable, "-s", "-S", "-P", "-B", "-m", "shared.sandbox.zygote"]
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
            send(here, {"tier": tier, "search": search, "preload": preload, "warmup": warmup,
                        "limits": asdict(limits)})  # fmt: skip
            here.settimeout(_READY)
            try:
                body = receive(here).body
            except TimeoutError:
                body = b'{"failed": "not ready in time"}'
            here.settimeout(None)
            answer = json.loads(body or b"{}")
            if "ready" not in answer:
                self.kill()
                log.seek(0)
                said = log.read().decode("utf-8", "replace").strip()
                raise LostError(answer.get("failed") or said[-2000:] or "it ended without a word")
        if tier is not Tier.A:
            self.scratch = answer["scratch"]

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

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

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


class Sandbox:
    """Runs untrusted Python. Open it after a fork, never before; any thread and any event loop of
    the process may use it.

        with Sandbox() as s:        r = s.run(code, seed=0, timeout=10)
        async with Sandbox() as s:  r = await s.arun(code, seed=0, timeout=10)

    `preload` is imported and `warmup` (trusted source) executed once per zygote, before any fork.
    Opening raises SandboxError where no tier from `minimum_tier` upwards holds on this host.
    """

    def __init__(
        self,
        *,
        zygotes: int | None = None,
        minimum_tier: Tier = Tier.B,
        preload: Sequence[str] = PRELOAD,
        warmup: str = WARMUP,
        limits: Limits | None = None,
    ) -> None:
        self.zygotes = zygotes or len(os.sched_getaffinity(0))
        self.minimum_tier, self.limits = minimum_tier, limits or Limits()
        self.preload, self.warmup = tuple(preload), warmup
        self.tier: Tier | None = None
        self._search = _search_path()
        self._hidden = [(f"{path}/", "") for path in _host_paths(self._search)]
        self._idle: list[Zygote] = []
        self._all: set[Zygote] = set()
        self._places = self.zygotes
        self._changed = threading.Condition()
        self._owner: int | None = None
        self._executor: ThreadPoolExecutor | None = None

    # ---- life ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Find the strongest tier that holds, with the first zygote."""
        if self._owner is not None:
            raise SandboxError("This sandbox was opened before.", remedy="make another one")
        reasons = []
        for tier in TIERS:
            if tier > self.minimum_tier:
                break
            try:
                zygote = self._launch(tier)
            except LostError as error:
                reasons.append((tier, str(error)))
                continue
            self.tier, self._owner = tier, os.getpid()
            self._all.add(zygote)
            self._idle.append(zygote)
            self._places -= 1
            self._executor = ThreadPoolExecutor(self.zygotes, thread_name_prefix="sandbox")
            return
        raise SandboxError(
            f"No sandbox of tier {self.minimum_tier} or stronger can be made on this host.",
            where="; ".join(f"tier {tier}: {reason}" for tier, reason in reasons),
            remedy=_REMEDIES[self.minimum_tier],
        )

    def close(self) -> None:
        """End every run, session and zygote. In a forked copy of the owner: does nothing."""
        if self._owner != os.getpid():
            return
        with self._changed:
            self._owner, zygotes = -1, list(self._all)
            self._changed.notify_all()
        for zygote in zygotes:
            zygote.close()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Sandbox:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Sandbox:
        await asyncio.to_thread(self.open)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # ---- runs ------------------------------------------------------------------------------------

    def run(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult:
        """Run a whole program. `timeout` is CPU seconds (wall: `Limits.wall`). Blocks; model faults
        and lost zygotes are outcomes. Raises SandboxError only if the sandbox is not open."""
        with Cancel() as cancel:
            return self._run(code, seed, timeout, cancel)

    async def arun(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult:
        """`run` for an event loop; any number at once, and cancelling one kills its run."""
        return await self.in_thread(lambda cancel: self._run(code, seed, timeout, cancel))

    def session(self, *, seed: int = 0) -> Session:
        """A state that cells change, with exact rollback (see `Session`)."""
        return Session(self, seed)

    async def in_thread(self, work: Callable[[Cancel], T]) -> T:
        """Do blocking work of this sandbox in its own threads; cancelling sets the `Cancel`."""
        self._check_open()
        assert self._executor is not None
        cancel = Cancel()
        try:
            future = self._executor.submit(work, cancel)
        except RuntimeError as error:  # closed in between
            cancel.close()
            raise SandboxError("The sandbox is closed.") from error
        future.add_done_callback(lambda _: cancel.close())
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            cancel.set()
            raise

    def _run(self, code: str, seed: int, timeout: float, cancel: Cancel) -> RunResult:
        source = as_memfd(code)
        try:
            for _ in range(2):
                try:
                    return self._attempt(source, seed, timeout, cancel)
                except LostError as error:
                    reason = str(error)
        finally:
            os.close(source)
        return self.infrastructure_error(reason)

    def _attempt(self, source: int, seed: int, timeout: float, cancel: Cancel) -> RunResult:
        zygote = self.acquire(cancel)
        try:
            with Watch(self.limits, timeout, cancel.fd) as watch:
                body: dict[str, object] = {"seed": seed, "cpu": int(timeout) + 2}
                with zygote.request(body, [source, *watch.descriptors]) as status:
                    watch.give_away()
                    watch.on_packet(status, lambda packet: _follow(watch, packet))
                    try:
                        watch.until_end()
                    finally:
                        if watch.process is not None:
                            if watch.end is None:
                                watch.process.kill()
                            watch.process.close()
                assert self.tier is not None
                return watch.result(self.tier, self.hide)
        except LostError:
            zygote.kill()
            raise
        finally:
            self.release(zygote)

    # ---- zygotes ---------------------------------------------------------------------------------

    def acquire(self, cancel: Cancel) -> Zygote:
        """An idle zygote, or a new one while there are places; waits otherwise."""
        with self._changed:
            while True:
                self._check_open()
                if cancel.is_set:
                    raise SandboxError("The run was cancelled before it started.")
                if self._idle:
                    return self._idle.pop()
                if self._places:
                    self._places -= 1
                    break
                self._changed.wait(1.0)
        assert self.tier is not None
        try:
            zygote = self._launch(self.tier)
        except LostError:
            with self._changed:
                self._places += 1
                self._changed.notify()
            raise
        with self._changed:
            self._all.add(zygote)
            closed = self._owner != os.getpid()
        if closed:
            zygote.close()
        return zygote

    def release(self, zygote: Zygote) -> None:
        """Give a zygote back; a dead or worn one makes place for a new one."""
        zygote.runs += 1
        worn = zygote.runs >= RUNS_PER_ZYGOTE and not zygote.sessions
        if worn:
            zygote.close()
        with self._changed:
            if worn or not zygote.alive:
                self._all.discard(zygote)
                self._places += 1
            else:
                self._idle.append(zygote)
            self._changed.notify()

    def hide(self, text: str) -> str:
        """`text` without the host's own paths."""
        for path, shown in self._hidden:
            text = text.replace(path, shown)
        return text

    def infrastructure_error(self, reason: str) -> RunResult:
        assert self.tier is not None
        error = CodeError("Infrastructure", reason, None, "")
        return RunResult(Outcome.INFRASTRUCTURE_ERROR, "", reason, error, self.tier, 0.0, 0.0, 0, 0)

    def _launch(self, tier: Tier) -> Zygote:
        return Zygote(tier, self._search, self.preload, self.warmup, self.limits)

    def _check_open(self) -> None:
        if self._owner is None:
            raise SandboxError("The sandbox is not open.", remedy="use it in a `with` block")
        if self._owner == -1:
            raise SandboxError("The sandbox is closed.")
        if self._owner != os.getpid():
            raise SandboxError(
                "The sandbox was opened in another process.", remedy="open one after the fork"
            )


def _follow(watch: Watch, packet: Packet) -> None:
    """Answers of the zygote about one run."""
    if not packet.body:
        raise LostError("the zygote died")
    body = packet.json()
    if "started" in body:
        watch.started(Process.from_pidfd(packet.fds[0]))
    elif "status" in body:
        watch.end = End(body["status"], body["cpu"], body["memory"])
    else:
        raise LostError(body.get("failed", "the zygote talks nonsense"))


def _search_path() -> list[str]:
    """Where this interpreter finds installed packages, without links. The checkout is not one."""
    own = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    seen = [p for p in sys.path if p in own or p.endswith(("site-packages", "dist-packages"))]
    return list(dict.fromkeys(os.path.realpath(p) for p in seen))


def _host_paths(search: Sequence[str]) -> list[str]:
    library = os.path.realpath(sysconfig.get_paths()["stdlib"])
    return sorted({*search, library, sysconfig.get_paths()["stdlib"]}, key=len, reverse=True)
