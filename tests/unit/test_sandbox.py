"""What the sandbox promises: outcomes, limits, seeds, concurrency, tiers, what the model sees."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from shared.errors import SandboxError
from shared.sandbox import Limits, Outcome, Sandbox, Tier, pool
from shared.sandbox.observation import NO_OUTPUT, observe
from shared.sandbox.watch import Cancel
from tests.sandboxes import bare, eventually, processes


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(zygotes=2) as opened:
        yield opened


# ---- outcomes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print(6 * 7)", Outcome.OK),
        ("print(1); exit(0)", Outcome.OK),
        ("x = 1", Outcome.NO_OUTPUT),
        ("print('  ')", Outcome.NO_OUTPUT),
        ("import sys; print('x', file=sys.stderr)", Outcome.NO_OUTPUT),
        ("print(1); 1 / 0", Outcome.MODEL_ERROR),
        ("print(1); exit(3)", Outcome.MODEL_ERROR),
        ("print(1); exit('no')", Outcome.MODEL_ERROR),
        ("print(1); import os; os._exit(1)", Outcome.MODEL_ERROR),
        ("def f(:", Outcome.MODEL_ERROR),
        ("import no_such_module", Outcome.MODEL_ERROR),
        ("input()", Outcome.MODEL_ERROR),
        ("print(1); import ctypes; ctypes.string_at(0)", Outcome.MODEL_ERROR),
        ("print(1); import os; os.abort()", Outcome.MODEL_ERROR),
        ("def f(): f()\nf()", Outcome.MODEL_ERROR),
        ("a\0b", Outcome.MODEL_ERROR),
        ("x = '\ud800", Outcome.MODEL_ERROR),
        ("print(1)\nwhile True: pass", Outcome.TIMEOUT),
    ],
)
def test_every_end_has_its_outcome(sandbox: Sandbox, code: str, outcome: Outcome) -> None:
    result = sandbox.run(code, timeout=1)
    assert result.outcome is outcome, result
    assert (result.error is None) == (outcome in (Outcome.OK, Outcome.NO_OUTPUT))
    assert result.tier is sandbox.tier


def test_an_error_says_type_message_and_line_and_shows_only_the_models_code(
    sandbox: Sandbox,
) -> None:
    result = sandbox.run("import sympy\ndef f(x):\n    return sympy.Matrix([[1, 0]]).inv()\nf(0)")
    assert result.error is not None
    assert result.error.type == "NonSquareMatrixError"
    assert result.error.line == 3
    assert "return sympy.Matrix" in result.error.traceback
    assert result.error.traceback in result.stderr
    for path in (sys.prefix, sys.base_prefix, "site-packages", "shared/sandbox"):
        assert path not in result.stderr


def test_the_libraries_compute(sandbox: Sandbox) -> None:
    code = (
        "import sympy, numpy, scipy.optimize\nx = sympy.Symbol('x')\n"
        "print(sympy.solve(x**2 - 2, x), numpy.linalg.det(numpy.eye(3)),"
        " round(scipy.optimize.brentq(lambda t: t - 1, 0, 3), 6))"
    )
    assert sandbox.run(code).stdout == "[-sqrt(2), sqrt(2)] 1.0 1.0\n"


def test_threads_finish_and_exit_handlers_run_as_in_an_interpreter(sandbox: Sandbox) -> None:
    code = (
        "import threading, atexit, time\natexit.register(lambda: print('bye'))\n"
        "threading.Thread(target=lambda: (time.sleep(.05), print('thread'))).start()"
    )
    assert sandbox.run(code).stdout == "thread\nbye\n"


@pytest.mark.parametrize(
    "code",
    [
        "import atexit; atexit.register(print, 'end')",
        "import weakref\nclass C: pass\nc = C(); weakref.finalize(c, print, 'end')",
        "import threading; threading.Timer(.01, print, ('end',)).start()",
        "import threading; threading._register_atexit(print, 'end')",
        "import logging, logging.handlers as h, sys\n"
        "m = h.MemoryHandler(9, target=logging.StreamHandler(sys.stdout))\n"
        "logging.getLogger().addHandler(m); logging.warning('end')",
        "import concurrent.futures as f; f.ThreadPoolExecutor(1).submit(print, 'end')",
    ],
)
def test_the_end_of_an_interpreter_is_left_out_only_where_it_would_do_nothing(code: str) -> None:
    """Going through it touches 150 pages; so a run looks first whether anything is registered."""
    with bare() as sandbox:
        assert sandbox.run(code).stdout == "end\n"


def test_a_run_gets_nothing_of_the_rehearsal_that_made_it_quick(sandbox: Sandbox) -> None:
    """Its process waited for it, and has printed and drawn before."""
    code = (
        "import gc, linecache, os, random, sys, __main__\n"
        "print(os.listdir('.') if os.getcwd().endswith('/run') else [])\n"
        "print([name for name in vars(__main__) if '__' not in name])\n"
        "print(len(linecache.cache['<code>'][2]), sys.stdout.seekable(), sys.stdin.read())\n"
        "print(random.random(), sys.modules['__main__'] is __main__)"
    )
    result = sandbox.run(code)
    assert result.stdout.splitlines() == [
        "[]",
        "['gc', 'linecache', 'os', 'random', 'sys']",
        "5 False ",
        "0.8444218515250481 True",
    ]
    assert result.stderr == ""


def test_output_of_a_killed_run_is_kept(sandbox: Sandbox) -> None:
    result = sandbox.run("print('before')\nwhile True: pass", timeout=0.3)
    assert (result.outcome, result.stdout) == (Outcome.TIMEOUT, "before\n")
    assert result.cpu_time >= 0.3


def test_a_run_that_sleeps_is_ended_by_the_wall() -> None:
    class Quick(Limits):
        def wall(self, timeout: float) -> float:
            return 1.0

    with bare(limits=Quick()) as sandbox:
        result = sandbox.run("import time; time.sleep(600)", timeout=300)
    assert result.outcome is Outcome.TIMEOUT
    assert result.cpu_time < 1


def test_the_clock_of_a_run_starts_when_it_starts_and_not_while_it_waits_its_turn() -> None:
    results = []
    with bare() as sandbox, Cancel() as cancel:
        with sandbox.admitted(cancel):  # the only place
            began = time.monotonic()
            thread = threading.Thread(target=lambda: results.append(sandbox.run("print(1)")))
            thread.start()
            thread.join(0.5)
            held = time.monotonic() - began
            assert results == []
        thread.join()
        elapsed = time.monotonic() - began
    assert results[0].outcome is Outcome.OK
    assert results[0].duration <= elapsed - held


@pytest.mark.parametrize(
    "text", ["é∑😀", "a\0b", "tab\tnew\r\n", "\x1b[31mred\x1b[0m"], ids=["utf8", "nul", "cr", "esc"]
)
def test_text_arrives_as_it_was_printed(sandbox: Sandbox, text: str) -> None:
    assert sandbox.run(f"print({text!r}, end='')").stdout == text


def test_what_is_no_text_is_replaced_never_an_error(sandbox: Sandbox) -> None:
    assert sandbox.run("print('\\ud800')").stdout == "\\ud800\n"
    raw = sandbox.run("import sys; sys.stdout.buffer.write(b'\\xff\\xfe1')")
    assert (raw.outcome, raw.stdout) == (Outcome.OK, "��1")


def test_output_is_cut_while_it_is_read_and_the_cut_is_counted() -> None:
    with bare(limits=Limits(output=1000)) as sandbox:
        result = sandbox.run("print('x' * 50_000)")
    assert result.stdout == "x" * 1000
    assert result.bytes_cut == 50_001 - 1000


def test_limits_are_named_in_the_errors_they_cause() -> None:
    limits = Limits(memory=256 << 20, flood=1 << 20)
    with bare(limits=limits) as sandbox:
        memory = sandbox.run("x = bytearray(1 << 30)")
        flood = sandbox.run("while True: print('x' * 1000)")
    assert memory.error is not None
    assert memory.error.message == f"out of memory={256 << 20} bytes"
    assert flood.outcome is Outcome.MODEL_ERROR
    assert flood.error is not None
    assert f"flood={1 << 20}" in flood.error.message


# ---- seeds ---------------------------------------------------------------------------------------

DRAW = "import random, numpy\nprint(random.random(), numpy.random.rand(), {'a', 'b', 'c', 'd'})"


def test_a_seed_decides_every_draw_and_set_order_in_any_zygote(sandbox: Sandbox) -> None:
    first = sandbox.run(DRAW, seed=1)
    assert sandbox.run(DRAW, seed=1).stdout == first.stdout
    assert sandbox.run(DRAW, seed=2).stdout != first.stdout
    with Sandbox(zygotes=1, preload=("numpy",), warmup="") as other:
        assert other.run(DRAW, seed=1).stdout == first.stdout
    assert sandbox.run(DRAW, seed=2**40).outcome is Outcome.OK


# ---- many callers --------------------------------------------------------------------------------


def test_hundreds_of_coroutines_share_one_sandbox_and_each_gets_its_own_answer() -> None:
    async def main() -> list[str]:
        async with Sandbox(zygotes=2, preload=(), warmup="") as s:
            runs = [s.arun(f"print({i})", timeout=10) for i in range(300)]
            return [result.stdout for result in await asyncio.gather(*runs)]

    assert asyncio.run(main()) == [f"{i}\n" for i in range(300)]


def test_cancelling_kills_the_run() -> None:
    async def main() -> None:
        async with Sandbox(zygotes=1, preload=(), warmup="") as s:
            task = asyncio.create_task(s.arun("while True: pass", timeout=500))
            await asyncio.to_thread(eventually, lambda: len(processes(s)) >= 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # The only zygote is free again, long before the run's own timeout.
            assert (await s.arun("print(1)")).stdout == "1\n"

    asyncio.run(main())


def test_a_sandbox_belongs_to_the_process_that_opened_it(sandbox: Sandbox) -> None:
    """A fork of the owner may neither use it nor, by closing its copy, break the owner's."""
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.run("print(1)")
        except SandboxError:
            sandbox.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert sandbox.run("print(1)").stdout == "1\n"


def test_it_opens_in_a_forked_child_and_works_under_asyncio_there() -> None:
    """The situation of a Celery prefork worker."""
    pid = os.fork()
    if pid == 0:

        async def main() -> str:
            async with Sandbox(zygotes=1, preload=(), warmup="") as s:
                return (await s.arun("print(5)")).stdout

        os._exit(0 if asyncio.run(main()) == "5\n" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# ---- tiers ---------------------------------------------------------------------------------------


def test_a_host_below_the_minimum_is_refused_with_reason_and_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Sandbox, tier: Tier) -> None:
        raise pool.LostError("no such thing here")

    monkeypatch.setattr(Sandbox, "_launch", refuse)
    with pytest.raises(SandboxError) as caught:
        Sandbox().open()
    assert caught.value.where == "tier A: no such thing here; tier B: no such thing here"
    assert "landlock" in (caught.value.remedy or "")


def test_a_tier_is_used_only_if_its_own_check_finds_that_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tier D confines nothing; under tier B's name it must not get past the self-check."""
    monkeypatch.setattr(pool, "TIERS", (Tier.D,))
    with pytest.raises(SandboxError), bare(minimum_tier=Tier.C):
        pass
    with bare(minimum_tier=Tier.D) as sandbox:
        assert sandbox.run("print(1)").tier is Tier.D


# ---- observations --------------------------------------------------------------------------------


def test_the_paper_style_shows_output_last_error_line_or_a_hint(sandbox: Sandbox) -> None:
    def shown(code: str) -> str:
        return observe(sandbox.run(code, timeout=0.5))

    assert shown("print(' 42 ')") == "42"
    assert shown("print('a')\nx = y") == "NameError: name 'y' is not defined"
    assert shown("x = 1") == NO_OUTPUT
    assert shown("while True: pass").startswith("TimeoutError")
    assert shown("print('The Error is', 3)\nprint('and', 4)") == "The Error is 3\nand 4"
    assert shown("print('a' * 200 + 'b' * 200)") == "a" * 128 + "..." + "b" * 128
    assert shown("print('a' * 255)") == "a" * 255
    assert shown("import ctypes; ctypes.string_at(0)") == "SIGSEGV: killed by SIGSEGV"


def test_the_plain_style_keeps_everything(sandbox: Sandbox) -> None:
    text = observe(sandbox.run("print('a' * 300)\n1 / 0"), "plain")
    assert text.startswith("a" * 300)
    assert "line 2" in text
    with pytest.raises(ValueError, match="infrastructure"):
        observe(sandbox.infrastructure_error("gone"))
