"""Tokens per second of the local engine beside transformers' own: `python bench/rollouts.py`.

The same requests for all: nano's weights in float32, one thread, 120 prompt tokens, 60 sampled ones
at temperature 1 (nothing ends early, so that every run does the same work). The peer is `generate`
on batches of 32 that begin and end together, which no rollout with a tool does. Wall time and CPU
time of the process; on a shared machine only the second says much.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rl.rollout import LocalEngine
from shared.endpoints import Sampling

WEIGHTS = Path(__file__).parent.parent / "shared/nano/weights"
PROMPT, NEW, REQUESTS, BATCH = 120, 60, 128, 32


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


def prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 1000) for _ in range(PROMPT)] for _ in range(REQUESTS)]


def local(slots: int) -> tuple[float, float]:
    engine = LocalEngine(
        model(), AutoTokenizer.from_pretrained(WEIGHTS), eos=(), slots=slots, max_len=256
    )
    sampling = Sampling(max_tokens=NEW, stop=("\n\n```output",))

    async def one(key: str, ids: list[int]) -> None:
        await engine.generate(ids, sampling, seed=1, key=key)
        await engine.release(key)

    async def run(seed: int) -> None:
        await asyncio.gather(*(one(str(i), ids) for i, ids in enumerate(prompts(seed))))

    asyncio.run(run(0))
    found = timed(lambda: asyncio.run(run(1)))
    engine.close()
    return found


def batches() -> tuple[float, float]:
    lm = model()
    config = GenerationConfig(
        do_sample=True, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, eos_token_id=2
    )

    def run(seed: int) -> None:
        rows = torch.tensor(prompts(seed))
        for at in range(0, REQUESTS, BATCH):
            part = rows[at : at + BATCH]
            lm.generate(part, attention_mask=torch.ones_like(part), generation_config=config)

    run(0)
    return timed(lambda: run(1))


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Tokens per second of wall time and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        run()
    tokens = REQUESTS * NEW
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def report(metric: str, value: float, peer: str | None = None, ratio: float | None = None) -> None:
    line = {
        "bench": "rollouts", "metric": metric, "value": round(value, 1), "unit": "1/s",
        "peer": peer, "ratio": None if ratio is None else round(ratio, 2),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wall, cpu = batches()
    peer = f"transformers generate, batch {BATCH}"
    report("sampled tokens", wall, peer)
    report("sampled tokens per CPU second", cpu, peer)
    for slots in (8, 32, 64):
        own_wall, own_cpu = local(slots)
        report(f"sampled tokens, {slots} slots", own_wall, peer, own_wall / wall)
        report(f"sampled tokens per CPU second, {slots} slots", own_cpu, peer, own_cpu / cpu)


if __name__ == "__main__":
    main()
