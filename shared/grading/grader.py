"""The outside: what callers use. Cheap stages here, all the rest in a jail of its own.

A model's text is only ever data. What is equal as a string, or two plain numbers, is decided here
by a few regular expressions; whatever has to be read further goes to a sandbox whose interpreters
have sympy, math-verify and the modules of `shared.grading` loaded. Pairs that wait go there
together, are decided one by one, and one that takes too long dies alone.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version

from shared.errors import SandboxError
from shared.grading import exact, jail
from shared.grading.verdict import Decision, Stage, Value, undecided
from shared.sandbox import Outcome, Sandbox, Tier

VERSION = f"2.{jail.fingerprint()}+math-verify-{version('math-verify')}"
BATCH = 16  # pairs that share one fork
_REMEMBERED = 4096

Judge = Callable[[str, str], Awaitable[bool | None]]
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Grade:
    """One comparison. `version` changes whenever a stage could decide otherwise; seconds.

    `opinion` is what a judge said of a pair that stays undecided: no reward rests on it alone.
    """

    value: Value
    stage: Stage
    reason: str
    version: str
    duration: float
    opinion: Value | None = None


class Grader:
    """Compares answers; holds the sandbox in which they are read, opened when first needed.

    Use in a `with` or `async with` block. Any thread, any event loop, any number of calls at once.
    `judge` (answer, reference -> equal or not, None: no opinion) is asked by `agrade` about what
    stays undecided. `budget`: seconds of wall time for one pair.
    """

    def __init__(
        self,
        *,
        zygotes: int | None = None,
        minimum_tier: Tier = Tier.B,
        judge: Judge | None = None,
        budget: float = jail.BUDGET,
    ) -> None:
        self._zygotes = zygotes or len(os.sched_getaffinity(0))
        self._minimum_tier, self._judge, self.budget = minimum_tier, judge, budget
        self._sandbox: Sandbox | None = None
        self._workers: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Pair, Future[Decision]]] = deque()
        self._known: OrderedDict[Pair, Decision] = OrderedDict()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Grader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends the sandbox. What still waits raises SandboxError."""
        with self._lock:
            sandbox, self._sandbox = self._sandbox, None
            workers, self._workers = self._workers, None
        if sandbox is not None:
            sandbox.close()
        if workers is not None:
            workers.shutdown(wait=True)

    def grade(self, answer: str, reference: str) -> Grade:
        """Compare. Raises SandboxError where the sandbox cannot be made or fails twice."""
        started = time.monotonic()
        found = self._start(answer, reference)
        decided = found if isinstance(found, Decision) else found.result()
        return _grade(decided, started)

    async def agrade(self, answer: str, reference: str) -> Grade:
        """`grade` for an event loop; a judge, if there is one, is asked what stays undecided."""
        started = time.monotonic()
        found = self._start(answer, reference)
        decided = found if isinstance(found, Decision) else await asyncio.wrap_future(found)
        grade = _grade(decided, started)
        if self._judge is None or grade.value is not Value.UNDECIDED:
            return grade
        said = await self._judge(answer, reference)
        opinion = None if said is None else Value.EQUAL if said else Value.DIFFERENT
        duration = time.monotonic() - started
        return replace(grade, stage=Stage.JUDGE, opinion=opinion, duration=duration)

    # ---- the queue of the jail -------------------------------------------------------------------

    def _start(self, answer: str, reference: str) -> Decision | Future[Decision]:
        """A decision, or one that is being made."""
        mine, gold = exact.normalise(answer), exact.normalise(reference)
        decided = exact.decide(mine, gold)
        if decided is not None:
            return decided
        pair = (mine, gold)
        future: Future[Decision] = Future()
        with self._lock:
            if (known := self._known.get(pair)) is not None:
                self._known.move_to_end(pair)
                return known
            if self._workers is None:
                self._workers = ThreadPoolExecutor(self._zygotes, "grading")
            self._waiting.append((pair, future))
            self._workers.submit(self._work)
        return future

    def _work(self) -> None:
        """Take a fair share of what waits, and decide it."""
        with self._lock:
            share = min(BATCH, -(-len(self._waiting) // self._zygotes))
            batch = [self._waiting.popleft() for _ in range(share)]
        batch = [(p, f) for p, f in batch if f.set_running_or_notify_cancel()]
        try:
            sandbox = self._open() if batch else None
            while batch:
                assert sandbox is not None
                decisions = self._run(sandbox, [pair for pair, _ in batch])
                for (pair, future), decision in zip(batch, decisions, strict=False):
                    with self._lock:
                        self._known[pair] = decision
                        if len(self._known) > _REMEMBERED:
                            self._known.popitem(last=False)
                    future.set_result(decision)
                batch = batch[len(decisions) :]
        except BaseException as error:  # noqa: BLE001  it belongs to those who wait
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)

    def _run(self, sandbox: Sandbox, pairs: list[Pair]) -> list[Decision]:
        """Decisions on the first pairs, at least one. The budget is for all: what one of them
        used up is given again to those behind it."""
        result = sandbox.run(jail.program(pairs), timeout=jail.cpu(self.budget))
        if result.outcome is Outcome.INFRASTRUCTURE_ERROR:
            raise SandboxError(f"The sandbox failed while grading: {result.stderr}")
        decisions = jail.decisions(result.stdout, len(pairs))
        if len(decisions) == len(pairs):
            return decisions
        if decisions and len(pairs) > 1:
            return decisions  # the next one begins the next run, with a budget of its own
        if result.outcome is Outcome.TIMEOUT:
            reason = f"not decided within {self.budget:g} s"
        else:
            reason = f"the jail ended: {result.error.type if result.error else result.outcome}"
        return [undecided(Stage.CAPS, reason)]

    def _open(self) -> Sandbox:
        with self._lock:
            if self._workers is None:
                raise SandboxError("The grader is closed.")
            if self._sandbox is None:
                sandbox = jail.sandbox(self._zygotes, self._minimum_tier, self.budget)
                sandbox.open()
                self._sandbox = sandbox
            return self._sandbox


def _grade(decided: Decision, started: float) -> Grade:
    return Grade(decided.value, decided.stage, decided.reason, VERSION, time.monotonic() - started)


# ---- one grader for a process -------------------------------------------------------------------

_shared: tuple[int, Grader] | None = None
_shared_lock = threading.Lock()


def grade(answer: str, reference: str) -> Grade:
    """Compare two answers with this process's own grader, which is made on first use.

    Safe after a fork (the child makes its own). Raises SandboxError as `Grader.grade`.
    """
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():
            grader = Grader(zygotes=1)
            atexit.register(grader.close)
            _shared = (os.getpid(), grader)
        mine = _shared[1]
    return mine.grade(answer, reference)
