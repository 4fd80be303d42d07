"""A thousand hostile runs against one zygote of each tier: `python bench/sandbox_attacks.py`.

Counts outcomes other than the expected one, zygotes lost, processes left, and what a thousand and
first, honest run then prints. The programs are those of shared/sandbox/attacks.py, in turn, from
eight callers at once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time

import psutil

from shared.errors import SandboxError
from shared.sandbox import Sandbox, Tier, pool
from shared.sandbox.attacks import ATTACKS, LIMITS, unexpected

CALLERS = 8


def emit(tier: Tier, metric: str, value: float | str, unit: str) -> None:
    line = {"bench": "sandbox_attacks", "metric": f"tier_{tier}_{metric}", "value": value,
            "unit": unit, "peer": None, "ratio": None}  # fmt: skip
    print(json.dumps(line), flush=True)


def family(sandbox: Sandbox) -> set[psutil.Process]:
    roots = [psutil.Process(zygote.process.pid) for zygote in sandbox._all]
    return {process for root in roots for process in (root, *root.children(recursive=True))}


async def besiege(sandbox: Sandbox, runs: int) -> list[str]:
    """One program after the other in each caller's thread, so that "before" and after stay in
    order; where several share a zygote they also share its neighbourhood."""
    queue = itertools.islice(itertools.cycle(ATTACKS), runs)
    wrong: list[str] = []

    def caller() -> None:
        for attack in queue:
            found = unexpected(sandbox, attack)
            if found is not None:
                wrong.append(f"{attack.name}: {found}")

    await asyncio.gather(*(asyncio.to_thread(caller) for _ in range(CALLERS)))
    return wrong


def siege(tier: Tier, runs: int) -> None:
    pool.TIERS = (tier,)
    try:
        sandbox = Sandbox(
            zygotes=1, preload=("numpy",), warmup="", limits=LIMITS, minimum_tier=tier
        )
        sandbox.open()
    except SandboxError as error:
        emit(tier, "refused", str(error), "")
        return
    try:
        before = family(sandbox)
        zygotes = set(sandbox._all)
        started = time.perf_counter()
        wrong = asyncio.run(besiege(sandbox, runs))
        took = time.perf_counter() - started
        for line in wrong:
            print(line)
        emit(tier, "runs", runs, "runs")
        emit(tier, "unexpected", len(wrong), "runs")
        emit(tier, "zygotes_lost", len(zygotes - {z for z in sandbox._all if z.alive}), "zygotes")
        left = len(family(sandbox)) - len(before)  # the child that waits is always another
        emit(tier, "processes_left", left, "processes")
        emit(tier, "then_prints", sandbox.run("print(6 * 7)").stdout.strip(), "")
        emit(tier, "time", round(took, 1), "s")
    finally:
        sandbox.close()
    running = [process for process in before if process.is_running()]
    emit(tier, "processes_after_close", len(running), "processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--tiers", default="ABC")
    options = parser.parse_args()
    os.environ["PLANTED_SECRET"] = "gold answer"
    for tier in options.tiers:
        siege(Tier(tier), options.runs)


if __name__ == "__main__":
    main()
