"""Latency, throughput and idle cost of the sandbox beside its peers: `python bench/sandbox.py`.

Ours and the peers run in turns in one process on one machine, so that a busy moment hits all; a
ratio is of two figures of the same run. `--quick` does a tenth of it, to try the command.
Callers are coroutines that each wait for their result before they ask again; a latency is from the
call to its result, waiting for a place included. Peers: bench/peers/sandbox.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
from peers.sandbox import BareFork, Peer, label, peers

from shared.grading import Grader
from shared.sandbox import Outcome, Sandbox
from shared.sandbox.diagnose import diagnose

PROGRAMS = {
    "print": "print(1)",
    "numpy_eigenvalues": "import numpy\nprint(numpy.linalg.eigvals(numpy.eye(5) * 2).real)",
    "sympy_solve": "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**3 - 7*x + 6))",
}
OUTPUTS = {"print": "1\n", "numpy_eigenvalues": "[2. 2. 2. 2. 2.]\n", "sympy_solve": "[-3, 1, 2]\n"}
CALLERS = (1, 8, 64, 256)
RUNS = {"print": 1024, "numpy_eigenvalues": 512, "sympy_solve": 512}  # at each number of callers
SESSIONS, CELLS, DEEP = 64, 10, 30
ROUNDS, OURS_A_ROUND = 10, 20  # one by one: peers once a round, we more often


def quantile(times: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def emit(
    metric: str,
    value: float | None,
    unit: str,
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
    **more: object,
) -> None:
    """`ratio` says how many times better we are."""
    shown = None if value is None else round(value, 3)
    line: dict[str, object] = {
        "bench": "sandbox", "metric": metric, "value": shown, "unit": unit, "peer": peer,
    }  # fmt: skip
    if peer_value is not None:
        line["peer_value"] = round(peer_value, 3)
    line["ratio"] = None if ratio is None else float(f"{ratio:.3g}")
    print(json.dumps(line | more), flush=True)


def one_by_one(sandbox: Sandbox, rounds: int) -> None:
    """One caller; medians. Peers, the bare fork and we take turns."""
    assert sandbox.tier is not None
    here: list[tuple[type[Peer], Peer]] = []
    for kind, make in peers(sandbox.tier):
        if (missing := kind.missing()) is not None:
            emit(f"peer left out: {missing}", None, "", kind.name)
            continue
        here.append((kind, make().__enter__()))
    fork = BareFork(sandbox.tier)
    try:
        for name, program in PROGRAMS.items():
            able = [(kind, peer) for kind, peer in here if kind.has_sympy or name == "print"]
            for kind, peer in able:  # once before it counts
                assert peer.run(program) == OUTPUTS[name], kind.name
            ours: list[float] = []
            forks: list[float] = []
            same: list[float] = []  # forks that run the program
            theirs: dict[type[Peer], list[float]] = {kind: [] for kind, _ in able}
            for _ in range(rounds):
                ours += [timed(partial(must, sandbox, name)) for _ in range(OURS_A_ROUND)]
                forks += fork.times(OURS_A_ROUND)
                same += fork.times(OURS_A_ROUND, program)
                for kind, peer in able:
                    theirs[kind].append(timed(partial(peer.run, program)))
            value = statistics.median(ours) * 1e3
            for share in (0.5, 0.95, 0.99):
                emit(f"{name}, p{share * 100:.0f}", quantile(ours, share) * 1e3, "ms", n=len(ours))
            if name == "print":
                bare = statistics.median(forks) * 1e3
                emit("print over a bare fork of the same zygote, p50", value - bare, "ms",
                     "bare fork and wait", bare)  # fmt: skip
            bare = statistics.median(same) * 1e3
            emit(f"{name}, p50", value, "ms", "bare fork that runs it (does not isolate)", bare,
                 bare / value, isolates=False)  # fmt: skip
            for kind, times in theirs.items():
                peer_value = statistics.median(times) * 1e3
                emit(f"{name}, p50", value, "ms", label(kind), peer_value, peer_value / value,
                     isolates=kind.isolates)  # fmt: skip
    finally:
        fork.close()
        for _, peer in here:
            peer.__exit__(None, None, None)


def must(sandbox: Sandbox, name: str) -> None:
    assert sandbox.run(PROGRAMS[name]).stdout == OUTPUTS[name]


async def closed_loop(
    callers: int, total: int, work: Callable[[], Awaitable[None]]
) -> tuple[list[float], float]:
    """Latencies of `total` calls by that many callers, and calls per second."""
    left, times = iter(range(total)), []

    async def caller() -> None:
        for _ in left:
            began = time.perf_counter()
            await work()
            times.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return times, total / (time.perf_counter() - began)


async def at_once(sandbox: Sandbox, scale: float) -> None:
    """Every workload at every number of callers. CPU is of all processes together, runs that have
    ended included; `kdamond` is the share of a core that the kernel's access monitor takes."""

    async def session() -> None:
        async with sandbox.session(seed=0) as cells:
            for i in range(CELLS):
                result = await cells.arun(f"x{i} = {i}\nprint(x{i})")
                assert result.stdout == f"{i}\n", result

    def runner(name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            result = await sandbox.arun(PROGRAMS[name])
            assert result.stdout == OUTPUTS[name], result

        return run

    while len(sandbox._all) < sandbox.zygotes:  # each is started when there is work for it
        await closed_loop(8, 64, runner("print"))
    ours = [one for zygote in sandbox._all for one in lasting(psutil.Process(zygote.process.pid))]
    kernels = [one for one in psutil.process_iter() if one.name().startswith("kdamond")]
    workloads = {name: (runner(name), RUNS[name]) for name in PROGRAMS}
    workloads[f"session of {CELLS} cells"] = session, SESSIONS
    for name, (work, runs) in workloads.items():
        for callers in CALLERS:
            if scale < 1 and callers > runs:
                continue
            total = max(callers, int(runs * scale))
            own, theirs = time.process_time() + spent(ours), spent(kernels)
            times, rate = await closed_loop(callers, total, work)
            own, theirs = time.process_time() + spent(ours) - own, spent(kernels) - theirs
            middle = quantile(times, 0.5)
            for share in (0.5, 0.95, 0.99):
                value = quantile(times, share)
                emit(f"{name}, {callers} callers, p{share * 100:.0f}", value * 1e3, "ms",
                     n=total, over_p50=round(value / middle, 2))  # fmt: skip
            emit(f"{name}, {callers} callers", rate, "1/s", n=total,
                 cpu_ms=round(own / total * 1e3, 2),
                 kdamond=round(theirs * rate / total, 3))  # fmt: skip


def beside_the_best_that_isolates(sandbox: Sandbox, rounds: int) -> None:
    """sympy throughput with every core busy, in turns. Peers that isolate and can import sympy
    start cold."""
    assert sandbox.tier is not None
    cores = len(os.sched_getaffinity(0))
    for kind, make in peers(sandbox.tier):
        if not kind.isolates or not kind.has_sympy or kind.missing():
            continue
        spent, ran = [0.0, 0.0], [0, 0]
        with make() as peer, ThreadPoolExecutor(cores) as pool:
            for _ in range(rounds):
                for i, (run, n) in enumerate(((sandbox.run, 20 * cores), (peer.run, cores))):
                    work = partial(pool.map, run, [PROGRAMS["sympy_solve"]] * n)
                    spent[i] += timed(lambda work=work: list(work()))
                    ran[i] += n
        ours, theirs = (n / seconds for n, seconds in zip(ran, spent, strict=True))
        emit("sympy_solve, all cores busy", ours, "1/s", label(kind), theirs, ours / theirs)


def deep_session(sandbox: Sandbox, n: int) -> None:
    """One cell on a chain of 30: the next of the chain, and one that is then taken back, again and
    again from the same state."""
    onwards, again = [], []
    with sandbox.session() as cells:
        for i in range(DEEP):
            assert cells.run(f"x{i} = {i}").outcome is Outcome.NO_OUTPUT
        for _ in range(n):
            again.append(timed(lambda: cells.run("print(x29)")))
            cells.rollback(1)
        for _ in range(n):
            onwards.append(timed(lambda: cells.run("print(x29)")))
            if cells.depth == 2 * DEEP:
                cells.rollback(DEEP)
                cells.run("print(x29)")  # the first after a rollback is of the other kind
    for what, times in (("", onwards), (", taken back each time", again)):
        for share in (0.5, 0.95, 0.99):
            value = quantile(times, share) * 1e3
            emit(f"cell on a chain of {DEEP}{what}, p{share * 100:.0f}", value, "ms", n=n)


def lasting(process: psutil.Process) -> list[psutil.Process]:
    """Launcher, warden and zygote: each the oldest child of the one before. Runs, when they have
    ended, are counted by the warden."""
    children = process.children()
    below = lasting(min(children, key=psutil.Process.create_time)) if children else []
    return [process, *below]


def spent(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds until now, those of children that they have reaped included."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def idle(sandbox: Sandbox, seconds: float = 5.0) -> None:
    """What an open sandbox costs that nobody uses."""
    roots = [psutil.Process(zygote.process.pid) for zygote in sandbox._all]
    family = [one for root in roots for one in (root, *root.children(recursive=True))]
    try:
        memory = sum(one.memory_full_info().pss for one in family) / 2**20
    except psutil.AccessDenied:
        memory = None
    emit(f"idle memory (PSS) of {len(roots)} zygotes", memory, "MiB", processes=len(family))
    before = spent(family)
    time.sleep(seconds)
    emit("idle CPU", (spent(family) - before) / seconds * 100, "% of a core")


def grading() -> None:
    with Grader(zygotes=1) as grader:
        grader.grade(r"\sqrt{8}", r"2\sqrt{2}")
        times = [timed(lambda: grader.grade(r"\sqrt{18}", r"3\sqrt{2}")) for _ in range(50)]
        emit("grade_math_verify_p50", statistics.median(times) * 1e3, "ms")
        times = [timed(lambda: grader.grade(r"\frac{1}{2}", "0.5")) for _ in range(1000)]
        emit("grade_rational_p50", statistics.median(times) * 1e6, "us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    quick = parser.parse_args().quick
    scale, rounds = (0.1, 2) if quick else (1.0, ROUNDS)
    for finding in diagnose():
        if finding.holds:
            break
        print(f"tier {finding.tier} does not hold here: {finding.reason}", file=sys.stderr)
    sandbox = Sandbox()
    emit("open", timed(sandbox.open) * 1e3, "ms", tier=sandbox.tier)
    try:
        asyncio.run(at_once(sandbox, scale))
        one_by_one(sandbox, rounds)
        beside_the_best_that_isolates(sandbox, rounds)
        deep_session(sandbox, 20 if quick else 200)
        idle(sandbox)
    finally:
        sandbox.close()
    grading()


if __name__ == "__main__":
    main()
