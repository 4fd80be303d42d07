"""The outside of the jail: zygotes, admission, and one object for sync and async callers.

Contract: at most `zygotes` runs and cells are under way at once, and others wait without their
clocks running. A zygote that is lost is replaced and its run tried once more on a new one; a second
loss is an infrastructure error. Closing leaves no process and no directory behind; so does the
death of the owning process, which zygotes watch through a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shared.errors import SandboxError
from shared.sandbox.launcher import Zygote, host_paths, search_path
from shared.sandbox.limits import Limits
from shared.sandbox.load import Load
from shared.sandbox.packets import as_memfd
from shared.sandbox.result import CodeError, Outcome, RunResult, Tier
from shared.sandbox.session import Session
from shared.sandbox.watch import Cancel, GoneError, LostError, Watch

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
solve(x**3 - 6 * x**2 + 11 * x - 6, x), solveset(x**2 - 4, x, S.Reals), str(solve(x**2 - 1 < 0, x))
integrate(x**2 * cos(x), (x, 0, pi)), limit((1 - cos(x)) / x, x, 0), series(exp(x), x, 0, 4)
radsimp(1 / (sqrt(3) - 1)), trigsimp(sin(x) * cos(x)), apart(1 / (x**2 - 4)), nsolve(cos(x) - x, 1)
Matrix([[2, 1], [1, 2]]).eigenvals(), N(pi, 20), divisors(12), binomial(6, 3)
numpy.linalg.eigvals(numpy.eye(2)), scipy.optimize.brentq(lambda t: t * t - 2, 0, 2)
"""
_REFUSED = 60.0  # seconds for which those that are there do, where another could not be started
TIERS = (Tier.A, Tier.B, Tier.C, Tier.D)  # strongest first; the first that holds is taken
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
        self.load = Load(self.zygotes)
        self._search = search_path()
        self._hidden = [(f"{path}/", "") for path in host_paths(self._search)]
        self._all: set[Zygote] = set()
        self._starting = 0  # zygotes that are not in `_all` yet
        self._refusal = (-math.inf, "")  # when a zygote could last not be started, and why
        self._places = self.zygotes  # runs and cells that may still begin
        lock = threading.RLock()
        self.changed = threading.Condition(lock)
        self._zygote_changed = threading.Condition(lock)
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
        with self.changed:
            self._owner = -1
            self.changed.notify_all()
            self._zygote_changed.notify_all()
            self._zygote_changed.wait_for(lambda: not self._starting)
            zygotes = list(self._all)
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
        with self.load.one(), Cancel() as cancel:
            return self._run(code, seed, timeout, cancel)

    async def arun(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult:
        """`run` for an event loop; any number at once, and cancelling one kills its run."""
        with self.load.one():
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
        assert self.tier is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.admitted(cancel))
            zygote = stack.enter_context(self.a_zygote())
            watch = stack.enter_context(Watch(self.limits, timeout, cancel.fd))
            body: dict[str, object] = {"seed": seed, "cpu": int(timeout) + 2}
            with zygote.request(body, [source, *watch.descriptors]) as status:
                zygote.note(watch.until_end(status))
            return watch.result(self.tier, self.hide)

    # ---- admission and zygotes -------------------------------------------------------------------

    @contextlib.contextmanager
    def admitted(self, cancel: Cancel) -> Iterator[None]:
        """One of the places, when there is one."""
        with self.changed:
            while True:
                self._check_open()
                if cancel.is_set:
                    raise SandboxError("The run was cancelled before it started.")
                if self._places:
                    break
                self.changed.wait(1.0)  # a cancellation does not notify
            self._places -= 1
        try:
            yield
        finally:
            with self.changed:
                self._places += 1
                self.changed.notify()

    @contextlib.contextmanager
    def a_zygote(self, session_on: Zygote | None = None) -> Iterator[Zygote]:
        """One on which nothing is under way, as soon as there is one; for a cell the session's own.
        One that raises LostError is killed. Raises LostError."""
        if session_on is None:
            zygote = self._choose()
        else:
            with self.changed:
                zygote = session_on.taken()
        try:
            yield zygote
        except GoneError:
            raise  # a state of one session, which is no fault of the zygote
        except LostError:
            zygote.kill()
            raise
        finally:
            with self.changed:
                zygote.active -= 1
                self._zygote_changed.notify()
            self.retire(zygote)

    def _choose(self) -> Zygote:
        """Taken in the moment in which it is chosen: a run has the jail's directory to itself."""
        with self.changed:
            before = self._refusal
            while True:
                self._check_open()
                for dead in [zygote for zygote in self._all if not zygote.alive]:
                    self._all.discard(dead)
                good = [zygote for zygote in self._all if not zygote.worn]
                idle = [zygote for zygote in good if not zygote.active]
                if idle:
                    return min(idle, key=lambda zygote: zygote.sessions).taken()
                if not good and not self._starting and self._refusal is not before:
                    raise LostError(self._refusal[1])
                if self._wants_more(len(good) + self._starting):
                    threading.Thread(target=self._start, name="zygote").start()
                    self._starting += 1
                self._zygote_changed.wait()  # for it, or for one that is free earlier

    def _wants_more(self, there: int) -> bool:
        refused_lately = time.monotonic() - self._refusal[0] < _REFUSED
        return there < self.zygotes and not (there and refused_lately)

    def _start(self) -> None:
        assert self.tier is not None
        zygote, reason = None, "a zygote could not be started"
        try:
            zygote = self._launch(self.tier)
        except (LostError, OSError) as error:
            reason = str(error)
        finally:
            with self.changed:
                self._starting -= 1
                if zygote is None:
                    self._refusal = time.monotonic(), reason
                else:
                    self._all.add(zygote)
                self._zygote_changed.notify_all()

    def retire(self, zygote: Zygote) -> None:
        """End a worn zygote once nothing is left on it."""
        with self.changed:
            if not zygote.worn or zygote.active or zygote.sessions or zygote not in self._all:
                return
            self._all.discard(zygote)
        zygote.close()

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
