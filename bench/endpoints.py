"""What an Endpoint costs per request, beside the bare openai client in the same run.

    python bench/endpoints.py

Both speak to the same scripted server in a process of its own, with the same number of requests in
flight; rounds alternate. The figure is CPU time of the client's process (the other core may be
busy), the median over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import openai

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.endpoints import Endpoint, EndpointConfig, Sampling, UsageMeter
from tests.fake_endpoint import FakeEndpoint, chat, sequence

MESSAGES = [
    {"role": "system", "content": "You solve problems step by step." * 20},
    {"role": "user", "content": "Natalia sold clips to 48 of her friends. " * 40},
]
REPLY = "First add the two numbers, then multiply by three. " * 20


def serve(pipe: Connection) -> None:
    with FakeEndpoint(sequence(chat(REPLY, prompt_tokens=500, completion_tokens=250))) as server:
        pipe.send(server.base_url)
        pipe.recv()


async def cpu_per_request(call: Callable[[], Awaitable[object]], n: int, in_flight: int) -> float:
    """Milliseconds of this process per request."""
    left = iter(range(n))

    async def lane() -> None:
        for _ in left:
            await call()

    began = time.process_time()
    await asyncio.gather(*(lane() for _ in range(in_flight)))
    return 1000 * (time.process_time() - began) / n


async def measure(
    base_url: str, rounds: int, n: int, in_flight: int
) -> tuple[list[float], list[float]]:
    config = EndpointConfig(base_url=base_url, model="fake", concurrency=in_flight)
    sampling = Sampling(max_tokens=256, stop=("```",))
    meter = UsageMeter()
    raw = openai.AsyncOpenAI(base_url=base_url, api_key="EMPTY")

    async with Endpoint(config) as endpoint, raw:

        async def ours() -> object:
            return await endpoint.chat(MESSAGES, sampling, seed=1, meter=meter["reasoner"])

        async def peer() -> object:
            return await raw.chat.completions.create(
                model="fake",
                messages=MESSAGES,  # type: ignore[arg-type]
                temperature=1.0,
                top_p=1.0,
                max_tokens=256,
                stop=["```"],
                seed=1,
            )

        mine: list[float] = []
        theirs: list[float] = []
        for call in (ours, peer):
            await cpu_per_request(call, n, in_flight)  # warm connections
        for _ in range(rounds):
            mine.append(await cpu_per_request(ours, n, in_flight))
            theirs.append(await cpu_per_request(peer, n, in_flight))
    return mine, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=400, help="per round and client")
    args = parser.parse_args()
    here, there = mp.Pipe()
    server = mp.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    base_url = here.recv()
    for in_flight in (1, 32):
        mine, theirs = asyncio.run(measure(base_url, args.rounds, args.requests, in_flight))
        ours, peer = statistics.median(mine), statistics.median(theirs)
        row = {
            "bench": "endpoints",
            "metric": f"cpu_per_request_at_{in_flight}_in_flight",
            "value": round(ours, 3),
            "unit": "ms",
            "peer": f"openai {openai.__version__}",
            "peer_value": round(peer, 3),
            "ratio": round(ours / peer, 3),
            "spread": [round(min(mine), 3), round(max(mine), 3)],
            "peer_spread": [round(min(theirs), 3), round(max(theirs), 3)],
        }
        print(json.dumps(row), flush=True)
    here.send(None)
    server.join()


if __name__ == "__main__":
    main()
