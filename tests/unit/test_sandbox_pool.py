"""Zygotes: chosen, started, lost, worn out, and gone without a trace at the end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from shared.sandbox import Outcome, Sandbox, Tier, launcher, pool
from tests.processes import kill
from tests.sandboxes import bare, eventually, processes


def test_a_killed_zygote_is_replaced_and_its_run_tried_again() -> None:
    with bare() as sandbox:
        before = {p.pid for p in processes(sandbox)}
        kill(*processes(sandbox))
        assert sandbox.run("print(1)").stdout == "1\n"
        assert before.isdisjoint(p.pid for p in processes(sandbox))


def test_a_zygote_killed_under_a_run_costs_one_silent_retry_and_then_is_an_infrastructure_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bare() as sandbox:
        stop = threading.Event()

        def killer() -> None:
            while not stop.is_set():
                for process in processes(sandbox):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if len(process.children()) == 0 and len(processes(sandbox)) >= 5:
                            process.parent().kill()
                stop.wait(0.05)

        thread = threading.Thread(target=killer)
        thread.start()
        result = sandbox.run("import time; time.sleep(30)", timeout=20)
        stop.set()
        thread.join()
        assert result.outcome is Outcome.INFRASTRUCTURE_ERROR
        assert sandbox.run("print(1)").stdout == "1\n"


def test_a_child_that_dies_while_it_waits_costs_nothing() -> None:
    """Somebody needed the memory: the next run makes its process itself."""
    with bare() as sandbox:
        for _ in range(3):
            eventually(lambda: len(leaves(sandbox)) == 2)
            _, waiting = leaves(sandbox)
            waiting.kill()
            psutil.wait_procs([waiting], timeout=60)
            assert sandbox.run("print(1)").stdout == "1\n"
        (only,) = sandbox._all
        assert only.runs == 3


def leaves(sandbox: Sandbox) -> list[psutil.Process]:
    """Who has no children, oldest first."""
    return sorted((p for p in processes(sandbox) if not p.children()), key=lambda p: p.pid)


def test_a_zygote_that_dies_is_missed_at_once_and_replaced() -> None:
    """The warden alone can make no process: it ends, and the run gets another jail."""
    with bare() as sandbox:
        (first,) = sandbox._all
        zygote, _ = leaves(sandbox)
        zygote.kill()
        eventually(lambda: not first.alive)
        assert sandbox.run("print(1)").stdout == "1\n"
        assert first not in sandbox._all


def test_two_runs_at_once_are_never_on_one_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has the jail's one directory to itself. Both have chosen before either begins."""
    together = threading.Barrier(2)
    chosen: list[object] = []
    choose = Sandbox._choose

    def noted(self: Sandbox) -> object:
        zygote = choose(self)
        chosen.append(zygote)
        together.wait(60)
        return zygote

    with bare(zygotes=2) as sandbox, ThreadPoolExecutor(2) as pool:
        assert all(pool.map(sandbox.run, ["import time; time.sleep(0.5)"] * 2))
        assert len(sandbox._all) == 2
        monkeypatch.setattr(Sandbox, "_choose", noted)
        results = pool.map(sandbox.run, ["open('mine', 'x').close(); print(1)"] * 2)
        assert [result.stdout for result in results] == ["1\n", "1\n"]
    assert len(set(chosen)) == 2


def test_who_waits_for_a_zygote_takes_what_is_free_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new zygote takes seconds, and only one call asks for it; then another one may be free."""
    launch, asked, may_start = Sandbox._launch, threading.Event(), threading.Event()

    def held(self: Sandbox, tier: Tier) -> object:
        asked.set()
        assert may_start.wait(60)
        return launch(self, tier)

    with bare(zygotes=2) as sandbox, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(Sandbox, "_launch", held)
        with sandbox.a_zygote() as first:
            run = pool.submit(sandbox.run, "print(1)")
            assert asked.wait(60)
            assert not run.done(), "control: the one zygote there is has something to do"
        assert run.result(60).stdout == "1\n"
        assert sandbox._all == {first}
        may_start.set()
        eventually(lambda: len(sandbox._all) == 2)


def test_a_zygote_that_cannot_be_started_costs_nobody_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Sandbox, tier: Tier) -> None:
        raise OSError("no memory for it")

    with bare(zygotes=2) as sandbox, ThreadPoolExecutor(2) as callers:
        monkeypatch.setattr(Sandbox, "_launch", refuse)
        results = list(callers.map(sandbox.run, ["import time; time.sleep(0.1)\nprint(1)"] * 4))
        assert [result.stdout for result in results] == ["1\n"] * 4
        next(iter(sandbox._all)).kill()
        result = sandbox.run("print(1)")
        assert result.outcome is Outcome.INFRASTRUCTURE_ERROR
        assert "no memory for it" in result.stderr


def test_who_loses_the_zygote_that_was_started_for_it_asks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another caller takes it, and both zygotes are lost: nobody else will start one."""
    launch, taken = Sandbox._launch, []

    def first_for_another(self: Sandbox, tier: Tier) -> object:
        zygote = launch(self, tier)
        if not taken:
            taken.append(zygote.taken())
        return zygote

    with bare(zygotes=2) as sandbox, ThreadPoolExecutor(1) as callers:
        monkeypatch.setattr(Sandbox, "_launch", first_for_another)
        with contextlib.suppress(pool.LostError), sandbox.a_zygote():
            run = callers.submit(sandbox.run, "print(1)")
            eventually(lambda: len(sandbox._all) == 2)
            taken[0].kill()
            raise pool.LostError("gone")
        assert run.result(60).stdout == "1\n"


def test_closing_waits_for_a_zygote_that_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, started, closing = Sandbox._launch, [], threading.Event()

    def late(self: Sandbox, tier: Tier) -> object:
        assert closing.wait(60)
        started.append(launch(self, tier))
        return started[0]

    with bare(zygotes=2) as sandbox, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(Sandbox, "_launch", late)
        with sandbox.a_zygote():
            run = pool.submit(sandbox.run, "print(1)")
            eventually(lambda: sandbox._starting == 1)
        run.result(60)
        closer = threading.Thread(target=sandbox.close)
        closer.start()
        eventually(lambda: sandbox._owner == -1)
        closing.set()
        closer.join(60)
        assert [zygote.alive for zygote in started] == [False]


def test_worn_zygotes_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "RUNS_PER_ZYGOTE", 2)
    with bare() as sandbox:
        first = next(iter(sandbox._all))
        for _ in range(3):
            assert sandbox.run("print(1)").stdout == "1\n"
        assert not first.alive
        assert first not in sandbox._all


@pytest.mark.parametrize("tier", [Tier.A, Tier.B])
def test_closing_leaves_no_process_and_no_directory(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pool, "TIERS", (tier,))
    monkeypatch.setitem(launcher.ENVIRONMENT, "TMPDIR", str(tmp_path))
    with bare(minimum_tier=tier) as sandbox:
        sandbox.run("open('file', 'w').write('x')\nimport os\nos.mkdir('d', 0)")
        cells = sandbox.session()
        cells.open()
        cells.run("x = 1")
        found = processes(sandbox)
        assert len(found) >= 5
    assert not psutil.wait_procs(found, timeout=60)[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tier", [Tier.A, Tier.B])
def test_when_the_owner_is_killed_everything_dies(tier: Tier, tmp_path: Path) -> None:
    program = (
        "import sys, time, threading\nfrom shared.sandbox import Sandbox, Tier, launcher, pool\n"
        f"pool.TIERS = (Tier.{tier.name},)\n"
        f"launcher.ENVIRONMENT['TMPDIR'] = {str(tmp_path)!r}\n"
        "s = Sandbox(zygotes=2, preload=(), warmup=''); s.open()\n"
        "c = s.session(); c.open(); c.run('x = 1'); c.run('x = 2')\n"
        "threading.Thread(target=s.run, args=('import time; time.sleep(1000)',),"
        " kwargs={'timeout': 900}).start()\n"
        "print('ready', flush=True)\ntime.sleep(1000)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    # (launcher,) warden, zygote, the next run, three states, run
    wanted = 8 if tier is Tier.A else 7
    root = psutil.Process(owner.pid)
    eventually(lambda: len(root.children(recursive=True)) >= wanted)
    processes = root.children(recursive=True)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert not psutil.wait_procs(processes, timeout=60)[1]
    assert list(tmp_path.iterdir()) == []
