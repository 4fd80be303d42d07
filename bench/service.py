"""What the service costs between the models: against a server that costs almost nothing.

    python bench/service.py                      every part but the peers
    python bench/service.py cost knee            some parts
    python bench/service.py peers --peers ENV/bin/python   (bench/peers/generation.py says how)

saturation     share of a server's capacity that 256 requests in flight get out of it
cost           CPU of this process per call at 256 in flight, beside the bare openai client
knee           a server that only gets slow: throughput and limit found, from the second minute on
trajectories   the whole service (graph, sandbox, grading, database) with models that take no time
memory         of a trajectory in flight
soak           what stays behind in a process of trajectories that are done: --trajectories of them
processes      the same as trajectories, by one and by two worker processes
peers          plain generation of the same calls by distilabel and DataDesigner

The model server (bench/fake_model.py) is a process of its own and takes a core while it works.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import json
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers.generation import SYSTEM, USER
from shared.endpoints import Endpoint, EndpointConfig, Sampling, UsageMeter
from shared.problems import load_problems
from shared.store import Database, migrate
from shared.store.embedded import EmbeddedPostgres
from shared.store.models import RunState
from shared.store.queries import find_run, funnel
from shared.work import slots
from shared.work.slices import SliceSettings, run_slice
from tirgen import runs
from tirgen.config import load
from tirgen.worker import generator

ROOT = Path(__file__).resolve().parent.parent
IN_FLIGHT = 256
SAMPLING = Sampling(max_tokens=256, stop=("```",))


def report(metric: str, value: float, unit: str, **more: Any) -> None:
    peer = {"peer": more.pop("peer", None), "ratio": more.pop("ratio", None)}
    line = {"bench": "service", "metric": metric, "value": round(value, 4), "unit": unit}
    print(json.dumps({**line, **peer, **more}), flush=True)


@contextmanager
def fake_model(slots: int = 4096, latency: float = 0.0, failures: float = 0.0) -> Iterator[str]:
    """The base URL of a server of its own."""
    program = [sys.executable, str(ROOT / "bench" / "fake_model.py")]
    given = ["--slots", slots, "--latency", latency, "--failures", failures]
    with subprocess.Popen(
        [*program, *map(str, given)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


def address(url: str, **more: Any) -> EndpointConfig:
    few: dict[str, Any] = {"concurrency": IN_FLIGHT, "start_concurrency": IN_FLIGHT}
    return EndpointConfig(base_url=url, model="fake", **few | more)


def messages(i: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{USER}{i}"}]


async def lanes(call: Callable[[int], Awaitable[object]], n: int, in_flight: int) -> None:
    """n calls, so many at a time."""
    left = iter(range(n))

    async def lane() -> None:
        for i in left:
            await call(i)

    await asyncio.gather(*(lane() for _ in range(in_flight)))


async def during(call: Callable[[int], Awaitable[object]], seconds: float, in_flight: int) -> None:
    """Calls for so many seconds."""
    ends = time.monotonic() + seconds

    async def lane(i: int) -> None:
        while time.monotonic() < ends:
            await call(i)

    await asyncio.gather(*(lane(i) for i in range(in_flight)))


CASES = ((4.0, 0.0), (1.0, 0.0), (1.0, 0.02), (0.5, 0.0), (0.25, 0.0))  # latency, failures


def saturation(cases: tuple[tuple[float, float], ...] = CASES) -> None:
    """Below the CPU's limit it is the capacity that counts; at no latency it is the CPU."""
    for latency, failures in cases:
        with fake_model(IN_FLIGHT, latency, failures) as url:
            n, used = asyncio.run(_replies(url, 16 * latency + 4))
        rate, capacity = n / (8 * latency + 2), IN_FLIGHT / latency
        report(
            f"calls at 256 in flight, capacity {capacity:.0f}/s, {failures:.0%} failures",
            rate, "1/s", share_of_capacity=round(rate / capacity, 4),
            cpu_share_of_a_core=round(used, 3),
        )  # fmt: skip


async def _replies(url: str, seconds: float) -> tuple[int, float]:
    """Good replies in the second half of so many seconds; the share of a core that they took."""
    n, began, spent = 0, time.monotonic(), [0.0]

    async with Endpoint(address(url)) as endpoint:

        async def one(i: int) -> None:
            nonlocal n
            await endpoint.chat(messages(i), SAMPLING, seed=i)
            if time.monotonic() >= began + seconds / 2:
                spent[0] = spent[0] or time.process_time()
                n += time.monotonic() < began + seconds

        await during(one, seconds, IN_FLIGHT)
    return n, (time.process_time() - spent[0]) / (seconds / 2)


def cost(rounds: int = 5, n: int = 1000) -> None:
    async def measure(url: str) -> tuple[list[float], list[float]]:
        meter, mine, theirs = UsageMeter(), [], []
        raw = openai.AsyncOpenAI(base_url=url, api_key="EMPTY")  # its pool has 1 000 connections
        async with Endpoint(address(url)) as endpoint, raw:

            async def ours(i: int) -> object:
                return await endpoint.chat(messages(i), SAMPLING, seed=i, meter=meter["reasoner"])

            async def peer(i: int) -> object:
                return await raw.chat.completions.create(
                    model="fake",
                    messages=messages(i),  # type: ignore[arg-type]
                    temperature=1.0,
                    top_p=1.0,
                    max_tokens=256,
                    stop=["```"],
                    seed=i,
                )

            for round_ in range(rounds + 1):
                for call, into in ((ours, mine), (peer, theirs)):
                    began = time.process_time()
                    await lanes(call, n, IN_FLIGHT)
                    if round_:  # the first one opens connections
                        into.append(1000 * (time.process_time() - began) / n)
        return mine, theirs

    with fake_model() as url:
        mine, theirs = asyncio.run(measure(url))
    ours, peer = statistics.median(mine), statistics.median(theirs)
    report(
        "cpu per call at 256 in flight", ours, "ms", peer=f"openai {openai.__version__}",
        peer_value=round(peer, 3), ratio=round(ours / peer, 3),
        spread=[round(min(mine), 3), round(max(mine), 3)],
        peer_spread=[round(min(theirs), 3), round(max(theirs), 3)],
    )  # fmt: skip


def profile(n: int = 3000) -> None:
    """Where the time of a call goes: the 25 functions that take most themselves; to stderr."""

    async def main(url: str) -> None:
        async with Endpoint(address(url)) as endpoint:
            await lanes(lambda i: endpoint.chat(messages(i), SAMPLING, seed=i), n, IN_FLIGHT)

    with fake_model() as url, cProfile.Profile() as measured:
        asyncio.run(main(url))
    text = io.StringIO()
    pstats.Stats(measured, stream=text).sort_stats("tottime").print_stats(25)
    print(text.getvalue(), file=sys.stderr)


def knee(seconds: float = 150.0, slots: int = 64, latency: float = 0.5) -> None:
    """64 at a time, half a second each, and no 429; 512 are allowed, and asked for."""

    async def main(url: str) -> tuple[list[float], list[int]]:
        settings = address(url, concurrency=512, start_concurrency=16)
        ended: list[float] = []
        limits: list[int] = []
        began = time.monotonic()
        async with Endpoint(settings) as endpoint:

            async def one(i: int) -> None:
                await endpoint.chat(messages(i), SAMPLING, seed=i)
                ended.append(time.monotonic() - began)
                limits.append(next(iter(endpoint.view().values())).limit)

            await during(one, seconds, 512)
        return ended, limits

    with fake_model(slots, latency) as url:
        ended, limits = asyncio.run(main(url))
    capacity = slots / latency
    last = [i for i, at in enumerate(ended) if 120 <= at < seconds]
    rate = len(last) / (seconds - 120)
    first = next(
        (t for t in range(int(seconds) - 10)
         if sum(t <= at < t + 10 for at in ended) >= 0.9 * 10 * capacity), -1,
    )  # fmt: skip
    report(
        "server of 64 that only gets slow: throughput after 2 minutes", rate, "1/s",
        share_of_capacity=round(rate / capacity, 4), seconds_to_90_percent=first,
        limit=round(statistics.mean(limits[i] for i in last), 1),
    )  # fmt: skip


# -- the whole service -----------------------------------------------------------------------------


@contextmanager
def database() -> Iterator[Database]:
    with tempfile.TemporaryDirectory() as home:
        server = EmbeddedPostgres(Path(home))
        db = Database(server.start())
        migrate.upgrade(db)
        try:
            yield db
        finally:
            db.close()
            server.stop()


def start(
    db: Database, name: str, url: str, n: int, in_flight: int, n_slots: int = 1, calls: int = 1
) -> int:
    """A run of n trajectories: a step with code, its execution, an answer, all verdicts; with no
    `calls`, the step alone."""
    settings = [
        f"in_flight={in_flight}",
        f"budgets.calls={calls}",
        "verifier.required=['executed']",
    ]
    settings += [f"{role}.endpoint.concurrency={max(in_flight, 16)}" for role in ROLES]
    settings += [f"{role}.endpoint.start_concurrency={max(in_flight, 16)}" for role in ROLES]
    config = load("nano", None, settings, url, "fake")
    problems = list(load_problems("nano", min(n, 500)))
    return runs.start(db, name, config, problems, -(-n // len(problems)), n_slots)


ROLES = ("reasoner", "extractor")


def work(db: Database, run_id: int, slot: int, in_flight: int) -> int:
    """Slices in this process, until nothing is left; this process's memory at its highest."""
    found = [bell for bell in slots.ring(db) if bell.slot == slot]
    following = found[0] if found else slots.claim(db, run_id, 30.0)
    settings = SliceSettings(in_flight=in_flight, slice_seconds=3600.0)
    asyncio.run(run_slice(db, following, generator(db), lambda _: settings, lambda: False))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def trajectories(n: int = 1500, in_flight: int = 64) -> None:
    with database() as db, fake_model() as url:
        for name, count in (("warm", 100), ("measured", n)):
            run_id = start(db, name, url, count, in_flight)
            began, spent, own = time.monotonic(), cpu(), time.process_time()
            work(db, run_id, 0, in_flight)
            seconds, used = time.monotonic() - began, cpu() - spent
            own = time.process_time() - own
        with db.session() as session:
            done = funnel(session, find_run(session, "measured").id)
        assert done.state is RunState.DONE, done
        assert done.items["vetted"] == done.n_items, done
    more = {"in_flight": in_flight, "n": done.n_items}
    report("trajectories at zero latency, one process", done.n_items / seconds, "1/s", **more)
    report("cpu per trajectory: graph, client, database writes", 1000 * own / done.n_items, "ms")
    report("cpu per trajectory: with sandbox and grading", 1000 * used / done.n_items, "ms")


def memory(few: int = 50, many: int = 850) -> None:
    """Each measurement in a process of its own, which is at its highest with all in flight."""
    with database() as db, fake_model(latency=3.0) as url:
        highest = [_spawned(db, start(db, f"m{n}", url, n, n), n)[0] for n in (few, many)]
    share = (highest[1] - highest[0]) / (many - few)
    report("memory per trajectory in flight", share / 1024, "KiB", few=few, many=many)


def soak(n: int = 3000, calls: int = 1, rounds: int = 10) -> None:
    """One process; its memory after each tenth. The first two warm it."""
    with database() as db, fake_model() as url:
        held = []
        for i in range(rounds):
            work(db, start(db, f"soak{i}", url, n // rounds, 64, calls=calls), 0, 64)
            held.append(rss())
    per = (held[-1] - held[1]) / (rounds - 2) / (n // rounds)
    report(
        "memory that a finished trajectory leaves behind", per / 1024, "KiB",
        after=[round(h / 2**20, 1) for h in held], trajectories_each=n // rounds,
        tool_calls_each=calls,
    )  # fmt: skip


def _spawned(db: Database, run_id: int, in_flight: int, n: int = 1) -> list[int]:
    """`work` in n fresh processes at once."""
    with get_context("spawn").Pool(n) as pool:
        asked = [(db.engine.url.render_as_string(False), run_id, i, in_flight) for i in range(n)]
        return pool.starmap(_worker, asked)


def _worker(url: str, run_id: int, slot: int, in_flight: int) -> int:
    db = Database(url)
    try:
        return work(db, run_id, slot, in_flight)
    finally:
        db.close()


def processes(n: int = 1000, in_flight: int = 64) -> None:
    """At models of one second, where a process is bound by its CPU or by `in_flight`."""
    rates = []
    for count in (1, 2):
        with database() as db, fake_model(latency=0.5) as url:
            run_id = start(db, "run", url, n, in_flight, count)
            began = time.monotonic()
            _spawned(db, run_id, in_flight, count)
            rates.append(n / (time.monotonic() - began))
    report(
        "trajectories at 0.5 s a call, two processes", rates[1], "1/s", ratio=None,
        one_process=round(rates[0], 2), scaling=round(rates[1] / rates[0], 3), in_flight=in_flight,
    )  # fmt: skip


def peers(python: str, n: int = 2000, in_flight: int = 64) -> None:
    """Ours: the calls of an Endpoint, as the peers'. All alternate, three rounds."""

    async def ours(url: str) -> tuple[float, float]:
        async with Endpoint(address(url, concurrency=in_flight)) as endpoint:
            await lanes(lambda i: endpoint.chat(messages(i), SAMPLING, seed=i), 64, in_flight)
            began, spent = time.monotonic(), time.process_time()
            await lanes(lambda i: endpoint.chat(messages(i), SAMPLING, seed=i), n, in_flight)
            return time.monotonic() - began, time.process_time() - spent

    program = [python, str(ROOT / "bench" / "peers" / "generation.py")]
    found: dict[str, list[tuple[float, float]]] = {}
    with fake_model() as url:
        for _ in range(3):
            found.setdefault("ours", []).append(asyncio.run(ours(url)))
            for name in ("distilabel", "data-designer"):
                asked = [*program, name, url, str(n // 2), str(in_flight)]
                said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
                told = json.loads(said.strip().splitlines()[-1])
                found.setdefault(told["peer"], []).append((2 * told["seconds"], 2 * told["cpu"]))

    def best(name: str, which: int) -> float:
        return statistics.median(pair[which] for pair in found[name]) / n

    for name in [one for one in found if one != "ours"]:
        for which, metric in enumerate(("calls at zero latency", "calls by CPU")):
            mine, theirs = 1 / best("ours", which), 1 / best(name, which)
            unit = "1/s" if which == 0 else "1/CPU s"
            report(
                metric, mine, unit, peer=name, peer_value=round(theirs, 1),
                ratio=round(mine / theirs, 2), in_flight=in_flight,
            )  # fmt: skip


PARTS = {f.__name__: f for f in (saturation, cost, knee, trajectories, memory, soak, processes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "peers", "profile", []])
    parser.add_argument("--peers", help="python of the environment that has the peers")
    parser.add_argument("--trajectories", type=int, default=3000, help="of soak")
    parser.add_argument("--calls", type=int, default=1, help="of the tool, in each of soak's")
    args = parser.parse_args()
    for part in args.parts or PARTS:
        if part == "peers":
            peers(args.peers or sys.executable)
        elif part == "soak":
            soak(args.trajectories, args.calls)
        else:
            (PARTS | {"profile": profile})[part]()


if __name__ == "__main__":
    main()
