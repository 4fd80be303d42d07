"""Latency and throughput of the sandbox beside a cold interpreter: `python bench/sandbox.py`.

The peer is what most sandboxes do: start `python -c` with the same imports for every run. Both are
measured in the same run, on the same machine, alternately; medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from shared.grading import Grader
from shared.sandbox import Outcome, Sandbox

IMPORTS = "import sympy, numpy, scipy.optimize\n"
PROGRAMS = {
    "print": "print(1)",
    "numpy_eigenvalues": "import numpy\nprint(numpy.linalg.eigvals(numpy.eye(5) * 2))",
    "sympy_solve": "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**3 - 7*x + 6))",
}
WARM, COLD, AT_ONCE = 100, 5, 400


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def emit(metric: str, value: float, unit: str, peer: float | None = None) -> None:
    better = None if peer is None else round(peer / value, 1)
    line = {"bench": "sandbox", "metric": metric, "value": round(value, 2), "unit": unit,
            "peer": None if peer is None else round(peer, 2), "ratio": better}  # fmt: skip
    print(json.dumps(line), flush=True)


def one_by_one(sandbox: Sandbox) -> None:
    for name, program in PROGRAMS.items():

        def warm(program: str = program) -> None:
            assert sandbox.run(program).outcome is Outcome.OK

        def cold(program: str = program) -> None:
            command = [sys.executable, "-c", IMPORTS + program]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        warm()
        cold()
        cold_times, warm_times = [], []
        for _ in range(COLD):
            cold_times.append(seconds(cold))
            warm_times += [seconds(warm) for _ in range(WARM // COLD)]
        warm_times.sort()
        peer = statistics.median(cold_times) * 1e3
        emit(f"{name}_p50", statistics.median(warm_times) * 1e3, "ms", peer)
        emit(f"{name}_p95", warm_times[int(len(warm_times) * 0.95)] * 1e3, "ms")


def session_cells(sandbox: Sandbox) -> None:
    with sandbox.session() as cells:
        times = [seconds(lambda: cells.run("print(1)")) for _ in range(50)]
    emit("session_cell_p50", statistics.median(times) * 1e3, "ms")


async def many(sandbox: Sandbox) -> None:
    started = time.perf_counter()
    await asyncio.gather(*(sandbox.arun("print(1)") for _ in range(AT_ONCE)))
    emit(f"print_throughput_{AT_ONCE}_at_once", AT_ONCE / (time.perf_counter() - started), "runs/s")


def grading() -> None:
    with Grader(zygotes=1) as grader:
        grader.grade(r"\sqrt{8}", r"2\sqrt{2}")
        times = [seconds(lambda: grader.grade(r"\sqrt{18}", r"3\sqrt{2}")) for _ in range(50)]
        emit("grade_math_verify_p50", statistics.median(times) * 1e3, "ms")
        times = [seconds(lambda: grader.grade(r"\frac{1}{2}", "0.5")) for _ in range(1000)]
        emit("grade_rational_p50", statistics.median(times) * 1e6, "us")


def main() -> None:
    sandbox = Sandbox()
    emit("open", seconds(sandbox.open) * 1e3, "ms")
    try:
        one_by_one(sandbox)
        session_cells(sandbox)
        asyncio.run(many(sandbox))
    finally:
        sandbox.close()
    grading()


if __name__ == "__main__":
    main()
