"""Throughput of the nano server over HTTP: `python bench/nano_server.py [MODEL_DIR]`.

Requests are the size of one reasoning step (about 120 prompt tokens, 60 generated) and end by
length, so that every run does the same work. The default is the packaged model.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx

from shared.nano.launch import start_server, stop_server
from tirgen.stack import WEIGHTS

PROMPT_TOKENS, OUTPUT_TOKENS = 120, 60
REQUESTS = {1: 24, 8: 128, 32: 512}


async def measure(url: str, concurrency: int) -> dict[str, float]:
    rng = random.Random(concurrency)
    count = REQUESTS[concurrency]
    prompts = [[rng.randrange(5, 300) for _ in range(PROMPT_TOKENS)] for _ in range(count)]
    gate, latencies = asyncio.Semaphore(concurrency), []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(seed: int, prompt: list[int]) -> int:
            body = {
                "model": "nano",
                "prompt": prompt,
                "max_tokens": OUTPUT_TOKENS,
                "ignore_eos": True,
                "temperature": 1.0,
                "seed": seed,
                "stop": ["\n\n```output"],
            }
            async with gate:
                began = time.perf_counter()
                reply = await client.post("/completions", json=body)
                latencies.append(time.perf_counter() - began)
            reply.raise_for_status()
            return int(reply.json()["usage"]["completion_tokens"])

        await one(0, prompts[0])
        latencies.clear()
        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))
        wall = time.perf_counter() - began
    latencies.sort()
    return {
        "requests": count,
        "tokens_per_s": round(tokens / wall, 1),
        "requests_per_s": round(count / wall, 2),
        "latency_p50_ms": round(latencies[len(latencies) // 2] * 1e3, 1),
        "latency_p95_ms": round(latencies[int(len(latencies) * 0.95)] * 1e3, 1),
    }


def server_cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(metric: str, concurrency: int, value: float, unit: str) -> None:
    name = f"{metric}, {concurrency} at once"
    line = {"bench": "nano_server", "metric": name, "value": round(value, 1), "unit": unit}
    print(json.dumps({**line, "peer": None, "ratio": None}))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS
    with tempfile.TemporaryDirectory() as scratch:
        server = start_server(folder, log=Path(scratch) / "server.log")
        try:
            for concurrency in REQUESTS:
                before = server_cpu_seconds(server.pid)
                result = asyncio.run(measure(server.url, concurrency))
                spent = server_cpu_seconds(server.pid) - before
                tokens = result["tokens_per_s"]
                report("generated tokens", concurrency, tokens, "1/s")
                made = tokens * result["requests"] / result["requests_per_s"]
                report("generated tokens per CPU second", concurrency, made / spent, "1/s")
                report("latency p50", concurrency, result["latency_p50_ms"], "ms")
        finally:
            stop_server(server.pid)


if __name__ == "__main__":
    main()
