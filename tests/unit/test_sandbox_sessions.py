"""Sessions: success is the new state, failure leaves the old one, rollback is exact."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Iterator

import psutil
import pytest

from shared.errors import SandboxError
from shared.sandbox import Limits, Outcome, Sandbox, Session, Tier, pool, watch
from shared.sandbox import warden as wardens
from shared.sandbox.packets import Packet
from tests.sandboxes import eventually, lose_zygotes, processes


@pytest.fixture(scope="module", params=[Tier.A, Tier.B])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    patch = pytest.MonkeyPatch()
    patch.setattr(pool, "TIERS", (request.param,))
    with Sandbox(zygotes=1, preload=("numpy",), warmup="", limits=Limits(states=5)) as opened:
        yield opened
    patch.undo()


@pytest.fixture
def cells(sandbox: Sandbox) -> Iterator[Session]:
    with sandbox.session(seed=3) as opened:
        yield opened


def test_cells_share_one_state(cells: Session) -> None:
    assert cells.run("x = [1]\ndef f(): return len(x)").outcome is Outcome.NO_OUTPUT
    assert cells.run("x.append(2); print(f())").stdout == "2\n"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("x = 2; 1 / 0", Outcome.MODEL_ERROR),
        ("x = 2; exit(1)", Outcome.MODEL_ERROR),
        ("x = 2\nwhile True: pass", Outcome.TIMEOUT),
        ("x = 2; import ctypes; ctypes.string_at(0)", Outcome.MODEL_ERROR),
    ],
)
def test_a_failed_cell_changes_nothing(cells: Session, code: str, outcome: Outcome) -> None:
    cells.run("x = 1")
    assert cells.run(code, timeout=0.3).outcome is outcome
    assert cells.run("print(x)").stdout == "1\n"
    assert cells.depth == 2


def test_rollback_restores_memory_and_both_random_generators_exactly(cells: Session) -> None:
    cells.run("import random, numpy, sys\nx = {}")
    step = "x[len(x)] = (random.random(), float(numpy.random.rand()))\nprint(x)"
    first = [cells.run(step).stdout for _ in range(3)]
    cells.run("sys.modules.clear(); del x")
    cells.rollback(4)
    assert [cells.run(step).stdout for _ in range(3)] == first
    cells.rollback(0)
    assert cells.depth == 4
    with pytest.raises(ValueError, match="5 of 4"):
        cells.rollback(5)


def test_the_seed_of_a_session_decides_its_draws(sandbox: Sandbox) -> None:
    def draw(seed: int) -> str:
        with sandbox.session(seed=seed) as cells:
            return cells.run("import random; print(random.random())").stdout

    assert draw(1) == draw(1) != draw(2)


def test_only_the_session_itself_may_fork(cells: Session) -> None:
    """The one fork that a cell is granted is the one that made it."""
    bomb = cells.run("import os\nwhile True: os.fork()", timeout=2)
    assert bomb.error is not None
    assert bomb.error.type == "PermissionError"
    bomb = cells.run("import subprocess; subprocess.run(['/bin/true'])")
    assert bomb.outcome is Outcome.MODEL_ERROR


FORKS = """import ctypes, os, sys
cells = sys.modules["shared.sandbox.cells"]
leave = cells._leave_copy
def make(by):
    cells._leave_copy = lambda jail, fork, *rest: leave(jail, by(fork), *rest)
"""
BREAK = {
    "does not fork": "def broken(): raise OSError\nmake(lambda fork: broken)",
    "talks nonsense": "make(lambda fork: lambda: cells.send(cells._own_socket(), {'x': 1}))",
    "sends no JSON": "make(lambda fork: lambda: cells._own_socket().send(b'['))",
    "sends JSON without an end": "make(lambda fork:"
    " lambda: cells._own_socket().send(b'[' * 60000))",
    "talks nonsense instead of running its cell": "receive = cells.receive\ndef broken(s):\n"
    "  p = receive(s)\n  if len(p.fds) > 1: s.send(b'[' * 60000)\n  return p\n"
    "cells.receive = broken",
    "its copy talks nonsense": "me, send = os.getpid(), cells.send\n"
    "cells.send = lambda s, b: send(s, b) if os.getpid() == me else s.send(b'[' * 60000)",
    "ends itself": "make(lambda fork: lambda: os._exit(0))",
    "says hello for its child": "import socket\ndef forged(fork):\n"
    "  for n in range(5, 16):\n    try: os.fstat(n)\n    except OSError: continue\n"
    "    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=n)\n"
    "    try: cells.send(s, {'hello': True})\n    except OSError: pass\n    s.detach()\n"
    "  return fork()\nmake(lambda fork: lambda: forged(fork))",
    "ends itself when it is told the cell": "receive = cells.receive\ndef broken(s):\n"
    "  p = receive(s)\n  return os._exit(0) if len(p.fds) > 1 else p\ncells.receive = broken",
    "is killed when it is told the cell": "receive = cells.receive\ndef broken(s):\n"
    "  p = receive(s)\n  return ctypes.string_at(0) if len(p.fds) > 1 else p\n"
    "cells.receive = broken",
    "its copy ends before it is one": "me, send = os.getpid(), cells.send\n"
    "cells.send = lambda s, b: send(s, b) if os.getpid() == me else os._exit(0)",
    "its copy is killed before it is one": "me, send = os.getpid(), cells.send\n"
    "cells.send = lambda s, b: send(s, b) if os.getpid() == me else ctypes.string_at(0)",
    "never leaves a copy": "import time; make(lambda fork: lambda: time.sleep(99))",
    "its copy never says so": "import time; me, send = os.getpid(), cells.send\n"
    "cells.send = lambda s, b: send(s, b) if os.getpid() == me else time.sleep(99)",
}


@pytest.mark.parametrize("how", BREAK)
def test_a_session_that_breaks_its_own_machinery_hurts_only_itself(
    sandbox: Sandbox, cells: Session, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the model's fault, never an infrastructure error; and there is a way back."""
    zygotes = set(sandbox._all)
    cells.run("x = 1")
    cells.run(FORKS + BREAK[how])
    with monkeypatch.context() as impatient:
        if "never" in how:
            impatient.setattr(watch, "_STARTUP", 1.0)
        assert cells.run("print(1)", timeout=1).outcome is Outcome.MODEL_ERROR
    assert sandbox.run("print(1)").stdout == "1\n"
    if "never" not in how:
        assert cells.run("print(1)", timeout=1).outcome is Outcome.MODEL_ERROR
    cells.rollback(1)
    assert cells.run("print(x)").stdout == "1\n"
    assert set(sandbox._all) == zygotes


def test_what_a_cell_claims_of_its_memory_is_not_believed_beyond_reason(cells: Session) -> None:
    claim = "cells.send(cells._own_socket(), {'kept': True, 'memory': 10**4000})"
    result = cells.run(f"import sys; cells = sys.modules['shared.sandbox.cells']\n{claim}")
    assert result.peak_memory == 0


def test_a_state_that_waits_does_nothing_whatever_a_cell_left_running_in_it(
    sandbox: Sandbox, cells: Session
) -> None:
    """The cell claims to have succeeded and goes on; from outside its process must stand still."""
    before = set(processes(sandbox))
    forged = "cells.send(cells._own_socket(), {'kept': True, 'memory': 0})\nwhile True: pass"
    cells.run(f"import sys; cells = sys.modules['shared.sandbox.cells']\n{forged}")
    (state,) = set(processes(sandbox)) - before
    eventually(lambda: state.status() == psutil.STATUS_STOPPED)


def test_sessions_and_runs_share_a_zygote(sandbox: Sandbox) -> None:
    """An open session holds no place: with one zygote, runs and other sessions go on."""
    with sandbox.session() as one, sandbox.session() as two:
        one.run("x = 1")
        two.run("x = 2")
        assert sandbox.run("print('run')").stdout == "run\n"
        assert one.run("print(x)").stdout == "1\n"
        assert two.run("print(x)").stdout == "2\n"


STEP = "x.append(random.random() + float(numpy.random.rand()) + os.urandom(1)[0]); print(x[-1])"


def test_old_states_are_dropped_and_made_again_when_they_are_wanted(
    sandbox: Sandbox, cells: Session
) -> None:
    """Limits.states=5 processes hold a chain of 12 cells; going back 11 is still exact."""
    before = len(processes(sandbox))
    cells.run("import random, numpy, os; x = []")
    printed = [cells.run(STEP).stdout for _ in range(11)]
    assert len(set(printed)) == 11
    eventually(lambda: len(processes(sandbox)) == before + 5)
    cells.rollback(3)
    again = cells.run(STEP)
    assert (again.stdout, again.replayed) == (printed[8], False)
    cells.rollback(8)
    again = cells.run(STEP)
    assert (again.stdout, again.replayed) == (printed[1], True)
    assert (cells.run(STEP).stdout, cells.depth) == (printed[2], 4)


def test_states_that_hold_much_memory_are_dropped_sooner(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "limits", Limits(states=5, states_memory=100 << 20))
    before = len(processes(sandbox))
    with sandbox.session() as cells:
        for n in range(4):
            cells.run(f"x{n} = bytearray(b'x') * (40 << 20)")
        eventually(lambda: len(processes(sandbox)) <= before + 3)
        assert cells.run("print(len(x0) + len(x3))").stdout == f"{80 << 20}\n"


def test_a_deep_chain_is_no_chain_of_forks(cells: Session) -> None:
    """One process goes from state to state and leaves copies behind; after a failure or a rollback
    it is the copy that goes on. A fork of a fork of a fork would take longer at every cell."""
    whoami = "import os; print(os.getpid())"
    (first,) = {cells.run(whoami).stdout for _ in range(6)}
    cells.run("1 / 0")
    (second,) = {cells.run(whoami).stdout for _ in range(3)}
    cells.rollback(2)
    (third,) = {cells.run(whoami).stdout for _ in range(3)}
    assert len({first, second, third}) == 3


def test_each_cell_is_judged_by_its_own_time_and_memory(cells: Session) -> None:
    """Though its process has run the cells before."""
    spin = "import time\nt = time.monotonic()\nwhile time.monotonic() < t + .25: pass\nprint(1)"
    for _ in range(4):
        assert cells.run(spin, timeout=0.6).outcome is Outcome.OK
    assert cells.run("print(1)").cpu_time < 0.2
    assert cells.run("while True: pass", timeout=0.3).outcome is Outcome.TIMEOUT


def test_sessions_work_where_nothing_is_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TIERS", (Tier.D,))
    with (
        Sandbox(zygotes=1, preload=(), warmup="", minimum_tier=Tier.D) as open_field,
        open_field.session() as open_cells,
    ):
        open_cells.run("x = 1")
        open_cells.run("x = 2; 1 / 0")
        assert open_cells.run("print(x)").stdout == "1\n"


def test_a_lost_zygote_costs_a_replay_and_the_result_says_so(
    sandbox: Sandbox, cells: Session
) -> None:
    cells.run("import random, numpy, os; x = []")
    first = [cells.run(STEP).stdout for _ in range(3)]
    expected = cells.run("print(x)").stdout
    cells.rollback(1)
    lose_zygotes(sandbox)
    after = cells.run("print(x)")
    assert (after.stdout, after.replayed) == (expected, True)
    assert not cells.run("print(1)").replayed
    cells.rollback(4)
    assert cells.run(STEP).stdout == first[1]


def test_a_zygote_that_dies_under_a_cell_costs_a_replay(
    sandbox: Sandbox, cells: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed when the cell has just begun, and nothing of it is heard after that."""
    cells.run("x = 1")
    (victim,) = sandbox._all
    hear = watch.Watch._told

    def deaf(self: watch.Watch, packet: Packet) -> None:
        if victim.alive:
            victim.process.kill()
            victim.process.wait()
            hear(self, packet)
        elif self.process is not None and victim in sandbox._all:
            hear(self, Packet(b"", []))
        else:
            hear(self, packet)

    monkeypatch.setattr(watch.Watch, "_told", deaf)
    result = cells.run("x += 1; print(x)")
    assert (result.stdout, result.replayed) == ("2\n", True)


def test_a_replay_that_differs_is_an_infrastructure_error(sandbox: Sandbox, cells: Session) -> None:
    """The kernel's own clock is not fixed, so what it says cannot be made again."""
    cells.run("import time; x = time.monotonic(); print(x)")
    lose_zygotes(sandbox)
    result = cells.run("print(x)")
    assert result.outcome is Outcome.INFRASTRUCTURE_ERROR
    assert "cell 1 of 1" in result.stderr
    cells.rollback(1)
    assert cells.run("print(2)").stdout == "2\n"


def test_nothing_can_be_written_in_a_session(cells: Session) -> None:
    """So there are no files that a rollback would have to take back."""
    for path in ("f", "/tmp/f", "/tmp/sandbox/f", "/dev/shm/f", "/var/tmp/f"):
        result = cells.run(f"open({path!r}, 'w')")
        assert result.error is not None
        assert result.error.type in ("OSError", "PermissionError", "FileNotFoundError")


def test_threads_end_with_their_cell(cells: Session) -> None:
    """As at the end of a program, those that can end are waited for; the others fail the cell."""
    pools = "import concurrent.futures as f\np = f.ThreadPoolExecutor(2)\n"
    assert cells.run(f"{pools}print(list(p.map(str, range(3))))").stdout == "['0', '1', '2']\n"
    assert cells.run(f"{pools}print(p.submit(len, 'ab').result())").stdout == "2\n"
    late = "import threading as t, time\nw = lambda: (time.sleep(.1), print('late'))\n"
    assert cells.run(f"{late}t.Thread(target=w).start()").stdout == "late\n"
    left = cells.run(f"{late}t.Thread(target=time.sleep, args=(99,), daemon=True).start()")
    assert left.error is not None
    assert left.error.type == "ThreadsLeftError"
    assert cells.depth == 3


def test_a_cell_that_ends_its_own_process_leaves_no_state(cells: Session) -> None:
    cells.run("x = 1")
    ended = cells.run("import os; x = 2; print(1, flush=True); os._exit(0)")
    assert (ended.outcome, ended.stdout) == (Outcome.MODEL_ERROR, "1\n")
    assert cells.run("x = 3; print(x); exit(0)").outcome is Outcome.OK
    assert cells.run("print(x)").stdout == "3\n"


def test_async_cells_and_a_cancelled_cell_keeps_the_state(sandbox: Sandbox) -> None:
    async def main() -> None:
        async with sandbox.session() as cells:
            await cells.arun("x = 1")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await cells.arun("x = 2\nwhile True: pass", timeout=500)
            assert (await cells.arun("print(x)")).stdout == "1\n"

    asyncio.run(main())


def test_a_cancelled_cell_is_over_before_the_next_one_begins_or_the_session_closes() -> None:
    """With places to spare, so that nothing but the session itself makes them wait."""

    async def main() -> None:
        async with Sandbox(zygotes=4, preload=(), warmup="") as spacious:
            async with spacious.session() as cells:
                await cells.arun("x = 1")
                for _ in range(5):
                    loop = asyncio.create_task(cells.arun("x = 2\nwhile True: pass", timeout=500))
                    await asyncio.sleep(0)
                    loop.cancel()
                    assert (await cells.arun("print(x)")).stdout == "1\n"
                last = asyncio.create_task(cells.arun("while True: pass", timeout=500))
                await asyncio.sleep(0)
                last.cancel()
            with pytest.raises(SandboxError, match="not open"):
                await cells.arun("print(1)")
            (zygote,) = spacious._all
            assert zygote.sessions == 0

    asyncio.run(main())


def test_a_closed_session_refuses(sandbox: Sandbox) -> None:
    with sandbox.session() as cells:
        pass
    with pytest.raises(SandboxError, match="not open"):
        cells.run("print(1)")


def test_a_process_is_followed_even_if_it_is_dead_by_then_and_a_stranger_never_is() -> None:
    """The interleaving that lost sessions once: a cell ends before anyone has looked at its pid.
    The warden is its parent, so until the warden reaps it the pid can be nobody else's."""
    warden = object.__new__(wardens.Warden)
    warden._poll, warden._handlers, warden.children = select.epoll(), {}, {}
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is dead now, and not reaped
    ends = []
    child = warden.adopt(pid, lambda status, usage: ends.append(os.waitstatus_to_exitcode(status)))
    with pytest.raises(ChildProcessError, match="known"):
        warden.adopt(pid, lambda status, usage: None)
    warden._handlers[child.pidfd]()
    assert ends == [7]
    for stranger in (os.getppid(), pid):
        with pytest.raises((ChildProcessError, ProcessLookupError)):
            warden.adopt(stranger, lambda status, usage: None)


@pytest.mark.parametrize("ending", ["1 / 0", "import os; os._exit(3)"])
def test_cells_that_end_at_once_leave_the_state_every_time(cells: Session, ending: str) -> None:
    cells.run("x = 1")
    for _ in range(30):
        assert cells.run(ending).outcome is Outcome.MODEL_ERROR
    assert cells.run("print(x)").stdout == "1\n"
    assert cells.depth == 2
