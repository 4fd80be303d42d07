"""Sessions: success is the new state, failure leaves the old one, rollback is exact."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Iterator

import pytest

from shared.errors import SandboxError
from shared.sandbox import Limits, Outcome, Sandbox, Session, Tier, pool


@pytest.fixture(scope="module", params=[Tier.A, Tier.B])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    patch = pytest.MonkeyPatch()
    patch.setattr(pool, "TIERS", (request.param,))
    with Sandbox(zygotes=1, preload=("numpy",), warmup="", limits=Limits(cells=20)) as opened:
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


def test_a_session_that_breaks_its_own_machinery_hurts_only_itself(
    sandbox: Sandbox, cells: Session
) -> None:
    assert cells.run("import os\ndef broken(): raise OSError\nos.fork = broken").outcome
    result = cells.run("print(1)", timeout=1)
    assert result.outcome is Outcome.MODEL_ERROR
    assert sandbox.run("print(1)").stdout == "1\n"


def test_sessions_and_runs_share_a_zygote(sandbox: Sandbox) -> None:
    """An open session holds no place: with one zygote, runs and other sessions go on."""
    with sandbox.session() as one, sandbox.session() as two:
        one.run("x = 1")
        two.run("x = 2")
        assert sandbox.run("print('run')").stdout == "run\n"
        assert one.run("print(x)").stdout == "1\n"
        assert two.run("print(x)").stdout == "2\n"


def test_the_number_of_states_is_limited_by_name(sandbox: Sandbox) -> None:
    with sandbox.session() as cells:
        for _ in range(20):
            cells.run("x = 1")
        with pytest.raises(SandboxError, match=r"Limits\.cells=20"):
            cells.run("x = 1")
        cells.rollback(5)
        assert cells.run("print(x)").stdout == "1\n"


def test_async_cells_and_a_cancelled_cell_keeps_the_state(sandbox: Sandbox) -> None:
    async def main() -> None:
        async with sandbox.session() as cells:
            await cells.arun("x = 1")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await cells.arun("x = 2\nwhile True: pass", timeout=500)
            assert (await cells.arun("print(x)")).stdout == "1\n"

    asyncio.run(main())


def test_a_closed_session_refuses(sandbox: Sandbox) -> None:
    with sandbox.session() as cells:
        pass
    with pytest.raises(SandboxError, match="not open"):
        cells.run("print(1)")


def test_a_cell_that_ends_at_once_is_held_before_it_can_end(
    cells: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner is as slow as can be to look at the cell's process. Were the cell free to run, it
    would have failed and been reaped by then, and its pid gone or another's."""
    reaped = []
    take_hold = os.pidfd_open

    def late(pid: int) -> int:
        state = cells._states[-1].sock  # its parent tells here that it has reaped the cell
        reaped.extend(select.select([state], [], [], 0.5)[0])
        return take_hold(pid)

    cells.run("x = 1")
    monkeypatch.setattr("shared.sandbox.session.os.pidfd_open", late)
    assert cells.run("1 / 0").error is not None
    assert not reaped
    assert cells.run("print(x)").stdout == "1\n"
