"""Are two answers equal? In stages, cheapest first; three values, because "I cannot tell" is one.

A model's text is only ever data here: what evaluates it (math-verify) runs in a sandbox, under a
preload of its own, and dies there when it takes too long. Undecided is not correct.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

from shared.errors import SandboxError
from shared.grading import exact
from shared.sandbox import Outcome, RunResult, Sandbox, Tier

VERSION = f"1+math-verify-{version('math-verify')}"
TIMEOUT = 5.0  # CPU seconds in the jail
_INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
_WARM_PAIRS = (
    (r"\frac{1}{2}", "0.5"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"(1,2]", r"(1,2]"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"x=3", "3"),
)


class Value(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"


class Stage(StrEnum):
    """Which stage decided, or where it was left undecided."""

    STRING = "string"
    RATIONAL = "rational"
    CAPS = "caps"
    MATH_VERIFY = "math_verify"


@dataclass(frozen=True, slots=True)
class Grade:
    """One comparison. `version` changes whenever a stage could decide otherwise; seconds."""

    value: Value
    stage: Stage
    reason: str
    version: str
    duration: float


_Decision = tuple[Value, Stage, str]


class Grader:
    """Compares answers; holds the sandbox in which math-verify runs, opened when first needed.

    Use in a `with` or `async with` block. Any thread and any number of concurrent calls.
    """

    def __init__(self, *, zygotes: int | None = None, minimum_tier: Tier = Tier.B) -> None:
        self._zygotes, self._minimum_tier = zygotes, minimum_tier
        self._sandbox: Sandbox | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Grader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()
                self._sandbox = None

    def grade(self, answer: str, reference: str) -> Grade:
        """Compare. Raises SandboxError where the sandbox cannot be made or fails twice."""
        started = time.monotonic()
        steps = _steps(answer, reference)
        code, decided = next(steps)
        if decided is None:
            decided = steps.send(self._open().run(code, timeout=TIMEOUT))[1]
        return _grade(decided, started)

    async def agrade(self, answer: str, reference: str) -> Grade:
        """`grade` for an event loop; cancelling it kills what runs."""
        started = time.monotonic()
        steps = _steps(answer, reference)
        code, decided = next(steps)
        if decided is None:
            sandbox = await asyncio.to_thread(self._open)
            decided = steps.send(await sandbox.arun(code, timeout=TIMEOUT))[1]
        return _grade(decided, started)

    def _open(self) -> Sandbox:
        with self._lock:
            if self._sandbox is None:
                sandbox = Sandbox(
                    zygotes=self._zygotes,
                    minimum_tier=self._minimum_tier,
                    preload=("sympy", "math_verify"),
                    warmup=_warmup(),
                )
                sandbox.open()
                self._sandbox = sandbox
            return self._sandbox


def _steps(
    answer: str, reference: str
) -> Generator[tuple[str, _Decision | None], RunResult | None, None]:
    """The stages, apart from how a run is awaited: yields code to run or a decision."""
    first, second = exact.normalise(answer), exact.normalise(reference)
    mine, gold = exact.unassigned(first, second), exact.unassigned(second, first)
    decided = _without_library(mine, gold)
    if decided is not None:
        yield "", decided
        return
    result = yield f"{_INSIDE}\nmain({mine!r}, {gold!r})\n", None
    assert result is not None
    decided = _judge(result)
    if decided[0] is Value.EQUAL and exact.same_but_for_case(mine, gold):
        decided = Value.UNDECIDED, Stage.MATH_VERIFY, "equal only up to upper and lower case"
    yield "", decided


def _without_library(mine: str, gold: str) -> _Decision | None:
    for name, text in (("answer", mine), ("reference", gold)):
        if not text:
            return Value.UNDECIDED, Stage.CAPS, f"the {name} is empty"
        if len(text) > exact.MAX_LENGTH:  # nothing below is asked to look at it
            return Value.UNDECIDED, Stage.CAPS, f"the {name}: {exact.too_much(text)}"
    if exact.canonical(mine) == exact.canonical(gold):
        return Value.EQUAL, Stage.STRING, ""
    left, right = exact.rational(mine), exact.rational(gold)
    if left is not None and right is not None:
        value = Value.EQUAL if left == right else Value.DIFFERENT
        return value, Stage.RATIONAL, "" if left == right else "unequal numbers"
    for name, text in (("answer", mine), ("reference", gold)):
        if (reason := exact.too_much(text)) is not None:
            return Value.UNDECIDED, Stage.CAPS, f"the {name}: {reason}"
    return None


def _judge(result: RunResult) -> _Decision:
    stage = Stage.MATH_VERIFY
    match result.outcome:
        case Outcome.INFRASTRUCTURE_ERROR:
            raise SandboxError(f"The sandbox failed while grading: {result.stderr}")
        case Outcome.TIMEOUT:
            return Value.UNDECIDED, stage, f"not decided within {TIMEOUT:g} s"
        case Outcome.OK:
            try:
                said = json.loads(result.stdout.splitlines()[-1])
                return Value(said["value"]), stage, str(said["reason"])
            except (ValueError, KeyError, TypeError):
                return Value.UNDECIDED, stage, "math-verify gave no answer"
    kind = result.error.type if result.error else result.outcome.value
    return Value.UNDECIDED, stage, f"math-verify failed: {kind}"


def _grade(decided: _Decision | None, started: float) -> Grade:
    assert decided is not None
    return Grade(*decided, version=VERSION, duration=time.monotonic() - started)


def _warmup() -> str:
    calls = "\n".join(f"compare({a!r}, {b!r})" for a, b in _WARM_PAIRS)
    return f"{_INSIDE}\n{calls}\n"


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
