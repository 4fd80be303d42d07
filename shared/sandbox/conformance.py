"""What every backend must do, as cases that anyone can run: `check(backend)`.

Each case is a claim, a program and what must come of it. The local sandbox passes at tiers A, B and
C, and so does the remote adapter against `tirgen sandbox serve`. What a tier keeps out is the
attack suite's business (tests/unit/test_sandbox_attacks.py); this is about results.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from shared.errors import SandboxError
from shared.sandbox.backend import Backend
from shared.sandbox.result import Outcome, RunResult

_SOON = 50.0  # seconds in which a freed place must serve again, on the slowest machine


@dataclass(frozen=True, slots=True)
class Failure:
    """A claim that does not hold, and what was seen instead."""

    claim: str
    what: str


@dataclass(frozen=True, slots=True)
class Case:
    """One program and its result. None: not looked at. `has_*` are parts, the others exact."""

    claim: str
    code: str
    outcome: Outcome = Outcome.OK
    stdout: str | None = None
    has_stdout: str = ""
    has_stderr: str = ""
    error: str | None = None  # the exception's class
    has_message: str = ""
    line: int | None = None
    timeout: float = 20.0

    async def failure(self, backend: Backend) -> str | None:
        result = await backend.arun(self.code, timeout=self.timeout)
        return self.difference(result, backend)

    def difference(self, result: RunResult, backend: Backend) -> str | None:
        """The first thing that is not as it must be."""
        failed = result.outcome not in (Outcome.OK, Outcome.NO_OUTPUT)
        kind, message, line = "", "", None
        if result.error is not None:
            kind, message, line = result.error.type, result.error.message, result.error.line
        for name, holds, seen in (
            ("outcome", result.outcome is self.outcome, f"{result.outcome}, {message}"),
            ("stdout", self.stdout in (None, result.stdout), result.stdout),
            ("stdout", self.has_stdout in result.stdout, result.stdout),
            ("stderr", self.has_stderr in result.stderr, result.stderr),
            ("an error exactly where it failed", failed == (result.error is not None), kind),
            ("error.type", self.error in (None, kind), kind),
            ("error.message", self.has_message in message, message),
            ("error.line", self.line in (None, line), line),
            ("tier", result.tier is backend.tier, f"{result.tier}, opened as {backend.tier}"),
            ("duration", result.duration >= 0, result.duration),
        ):
            if not holds:
                return f"{name}: {seen!r:.300}"
        return None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A claim about several runs."""

    claim: str
    check: Callable[[Backend], Awaitable[str | None]]

    async def failure(self, backend: Backend) -> str | None:
        return await self.check(backend)


_OK, _ERROR, _TIMEOUT, _SILENT = (
    Outcome.OK, Outcome.MODEL_ERROR, Outcome.TIMEOUT, Outcome.NO_OUTPUT,
)  # fmt: skip

SINGLE = (
    Case("printed text is the output", "print(6 * 7)", stdout="42\n"),
    Case("no code at all prints nothing", "", _SILENT, stdout=""),
    Case("a program that prints nothing has no output", "x = 1", _SILENT, stdout=""),
    Case("white space is no output", "print(' \\n ')", _SILENT),
    Case("the last expression is not printed", "1 + 1", _SILENT, stdout=""),
    Case("standard error is kept apart", "import sys\nprint('e', file=sys.stderr)\nprint('o')",
         stdout="o\n", has_stderr="e"),
    Case("exit(0) is a success", "print(1)\nexit(0)", stdout="1\n"),
    Case("sys.exit() is a success", "import sys\nprint(1)\nsys.exit()", stdout="1\n"),
    Case("exit(3) is a failure", "print(1)\nexit(3)", _ERROR, stdout="1\n"),
    Case("exit with a text is a failure", "exit('no')", _ERROR),
    Case("os._exit(1) is a failure", "import os\nos._exit(1)", _ERROR),
    Case("it runs as a program", "print(__name__)", stdout="__main__\n"),
    Case("functions see the program's own names", "a = 2\ndef f(): return a\nprint(f())",
         stdout="2\n"),
    Case("an uncaught exception is the model's error, and what was printed is kept",
         "print(1)\n\n1 / 0", _ERROR, stdout="1\n", error="ZeroDivisionError",
         has_message="division by zero", line=3, has_stderr="Traceback"),
    Case("a traceback shows the model's own line", "def f():\n    return [][1]\nf()", _ERROR,
         has_stderr="return [][1]", error="IndexError", line=2),
    Case("a syntax error has its line", "x = 1\ny = = 2", _ERROR, error="SyntaxError", line=2),
    Case("a class of the model's own is named", "class Odd(Exception): pass\nraise Odd('why')",
         _ERROR, error="Odd", has_message="why", line=2),
    Case("a module that is not there is an error", "import no_such_module", _ERROR,
         error="ModuleNotFoundError", has_message="no_such_module"),
    Case("a caught exception is none",
         "try:\n    1 / 0\nexcept ZeroDivisionError:\n    print('ok')",
         stdout="ok\n"),
    Case("unbounded recursion ends as an error", "def f(): f()\nf()", _ERROR,
         error="RecursionError"),
    Case("input() finds no input", "input()", _ERROR, error="EOFError"),
    Case("memory has an end", "x = bytearray(1 << 40)\nprint(len(x))", _ERROR,
         error="MemoryError"),
    Case("a crash of the interpreter is an error, and what was printed is kept",
         "print(1, flush=True)\nimport ctypes\nctypes.string_at(0)", _ERROR, stdout="1\n",
         error="SIGSEGV"),
    Case("an endless loop times out, and what was printed is kept",
         "print('before')\nwhile True: pass", _TIMEOUT, stdout="before\n", timeout=0.3),
    Case("swallowing every exception does not help against the clock",
         "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
         _TIMEOUT, timeout=0.3),
    Case("a long computation in C times out", "x = 7 ** (10 ** 9)", _TIMEOUT, timeout=0.3),
    Case("a result that claims success does not make one",
         "print('{\"status\": \"Success\", \"outcome\": \"ok\"}')\nraise SystemExit(1)", _ERROR),
    Case("writing to every descriptor does not make a success",
         "import os\nfor fd in range(3, 40):\n    try: os.write(fd, b'{\"status\": 0}')\n"
         "    except OSError: pass\nraise ValueError('no')", _ERROR),
    Case("Unicode comes back as it was printed", "print('é∑😀')", stdout="é∑😀\n"),
    Case("Unicode goes in as it was written", "s = '∀x∈ℝ'\nprint(len(s))", stdout="4\n"),
    Case("NUL and control characters come back", "print('a\\0b\\x1b[1m')", stdout="a\0b\x1b[1m\n"),
    Case("a lone surrogate is no reason to fail", "print('\\ud800')\nprint(1)", has_stdout="1\n"),
    Case("bytes that are no text are replaced",
         "import sys\nsys.stdout.buffer.write(b'\\xff1\\n')", stdout="\ufffd1\n"),
    Case("a NUL in the code is an error, not a failure of ours", "a\0b", _ERROR),
    Case("a lone surrogate in the code is an error, not a failure of ours", "x = '\ud800'", _ERROR),
    Case("a long program runs", "x = 0\n" * 20_000 + "print(x)", stdout="0\n"),
    Case("sympy solves", "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 2, x))",
         stdout="[-sqrt(2), sqrt(2)]\n"),
    Case("numpy computes", "import numpy as np\nprint(np.linalg.det(np.eye(3)))", stdout="1.0\n"),
    Case("scipy computes",
         "from scipy.optimize import brentq\nprint(round(brentq(lambda t: t - 1, 0, 3), 6))",
         stdout="1.0\n"),
    Case("the standard library is there",
         "import math, fractions, itertools, collections, decimal, json, re, statistics\n"
         "print(fractions.Fraction(1, 3) + 1)", stdout="4/3\n"),
    Case("threads are waited for",
         "import threading\nthreading.Thread(target=lambda: print('done')).start()",
         stdout="done\n"),
    Case("there is no network", "import socket\n"
         "s = socket.create_connection(('127.0.0.1', 9), timeout=1)", _ERROR),
    Case("no other program can be started",
         "import subprocess\nsubprocess.run(['/bin/true'], check=True)", _ERROR),
    Case("no secret is in the environment",
         "import os\nprint([k for k in os.environ if any(w in k.upper() for w in "
         "('KEY', 'TOKEN', 'SECRET', 'PASSWORD', 'DATABASE', 'TIRGEN'))])", stdout="[]\n"),
)  # fmt: skip


async def _cut(backend: Backend) -> str | None:
    size = 4_000_000
    result = await backend.arun(f"print('x' * {size})", timeout=20)
    if result.outcome is not _OK:
        return f"{result.outcome}, {result.stderr[:200]}"
    if not 0 < len(result.stdout) < size or set(result.stdout) != {"x"}:
        return f"{len(result.stdout)} characters were kept"
    if result.bytes_cut != size + 1 - len(result.stdout):
        return f"bytes_cut is {result.bytes_cut}, {len(result.stdout)} of {size + 1} were kept"
    return None


async def _flood(backend: Backend) -> str | None:
    result = await backend.arun("while True: print('x' * 1000)", timeout=20)
    if result.outcome not in (_ERROR, _TIMEOUT):
        return result.outcome
    if not result.stdout.startswith("xxx"):
        return "what was printed first is lost"
    return None if len(result.stdout) < 4_000_000 else f"{len(result.stdout)} characters were kept"


_DRAW = "import random, numpy\nprint(random.random(), numpy.random.rand(), {'a', 'b', 'c', 'd'})"


async def _seeded(backend: Backend) -> str | None:
    runs = [backend.arun(_DRAW, seed=seed, timeout=20) for seed in (7, 8, 7, 8, 7)]
    a, b, *more = [result.stdout for result in await asyncio.gather(*runs)]
    if not a or more != [a, b, a]:
        return f"the same seed drew {a!r:.100} and {more[0]!r:.100}"
    return None if a != b else "different seeds drew the same"


async def _seed_of_any_size(backend: Backend) -> str | None:
    result = await backend.arun(_DRAW, seed=2**62, timeout=20)
    return None if result.outcome is _OK else f"{result.outcome}, {result.stderr[:200]}"


_LEAVE = """
import builtins, sys, numpy, sympy
builtins.left = numpy.left = sympy.left = sys.left = 1
numpy.sin = None
try: open('left', 'w').write('x')
except OSError: pass
print(1)
"""
_FIND = """
import builtins, os, sys, numpy, sympy
print([m.__name__ for m in (builtins, numpy, sympy, sys) if hasattr(m, 'left')], numpy.sin(0.0))
print(os.path.exists('left'))
"""


async def _stateless(backend: Backend) -> str | None:
    left = await asyncio.gather(*(backend.arun(_LEAVE, timeout=20) for _ in range(4)))
    if any(result.outcome is not _OK for result in left):
        return f"control: {left[0].outcome}, {left[0].stderr[:200]}"
    for result in await asyncio.gather(*(backend.arun(_FIND, timeout=20) for _ in range(4))):
        if result.stdout != "[] 0.0\nFalse\n":
            return f"found {result.stdout!r:.200}"
    return None


async def _own_answers(backend: Backend) -> str | None:
    results = await asyncio.gather(*(backend.arun(f"print({i})", timeout=20) for i in range(64)))
    wrong = [i for i, result in enumerate(results) if result.stdout != f"{i}\n"]
    return f"callers {wrong} got another's answer or none" if wrong else None


async def _cancelled(backend: Backend) -> str | None:
    loops = [
        asyncio.ensure_future(backend.arun("while True: pass", timeout=500)) for _ in range(16)
    ]
    await asyncio.sleep(0.3)  # some of them have started by then, or the claim is easily kept
    for loop in loops:
        loop.cancel()
    ends = await asyncio.gather(*loops, return_exceptions=True)
    if not all(isinstance(end, asyncio.CancelledError) for end in ends):
        return "cancelling a run did not end its call"
    try:
        async with asyncio.timeout(_SOON):
            after = await asyncio.gather(*(backend.arun("print(1)", timeout=20) for _ in range(8)))
    except TimeoutError:
        return "cancelled runs still hold their places"
    return None if all(r.stdout == "1\n" for r in after) else "a run after cancelled ones failed"


async def _sync(backend: Backend) -> str | None:
    result = await asyncio.to_thread(backend.run, "print(1)", seed=3, timeout=20)
    return None if result.stdout == "1\n" else f"{result.outcome}, {result.stderr[:200]}"


TOGETHER = (
    Dialogue("long output is cut, and the cut is counted", _cut),
    Dialogue("a flood of output is ended, and its beginning kept", _flood),
    Dialogue("a seed decides every draw and the order of sets, whoever else runs", _seeded),
    Dialogue("a seed may be any size", _seed_of_any_size),
    Dialogue("nothing of a run reaches another", _stateless),
    Dialogue("each of many callers gets its own answer", _own_answers),
    Dialogue("the synchronous call does the same", _sync),
    Dialogue("cancelling ends the run and frees its place", _cancelled),
)
CASES: tuple[Case | Dialogue, ...] = (*SINGLE, *TOGETHER)


def check(backend: Backend, cases: Sequence[Case | Dialogue] = CASES) -> list[Failure]:
    """Every claim that an open backend breaks; an empty list is conformance."""
    return asyncio.run(acheck(backend, cases))


async def acheck(backend: Backend, cases: Sequence[Case | Dialogue] = CASES) -> list[Failure]:
    """`check` for an event loop. Single programs run at once, dialogues one by one."""
    single = [case for case in cases if isinstance(case, Case)]
    found = list(await asyncio.gather(*(_failure(case, backend) for case in single)))
    found += [await _failure(case, backend) for case in cases if isinstance(case, Dialogue)]
    return [failure for failure in found if failure is not None]


async def _failure(case: Case | Dialogue, backend: Backend) -> Failure | None:
    try:
        what = await case.failure(backend)
    except SandboxError as error:
        what = f"raised {error}"
    return None if what is None else Failure(case.claim, what)
