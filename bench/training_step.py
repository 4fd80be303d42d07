"""What the kernels of a training step give: forward and backward, plain and fused; attention alone.

    python bench/training_step.py [--size 0.6b|50m|nano] [--length 4096] [--budget 16384]

One micro-batch of `budget` tokens in rows of `length`, without DeepSpeed or optimizer: by
transformers' sdpa with its dense mask, by `rows`, and by `rows` with fused kernels (`Policy.fuse`).
Then causal attention by itself on the same tokens: by the variable-length kernel and by one call of
cuDNN's per row (rl/attention.py). Times are means of `repeat` after three that do not count. What
it is for is a GPU; on a CPU it says nothing of one, and attention alone is left out. One JSON
object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from peers.models import SIZES, make, rows
from torch import Tensor

from rl.attention import ROWS, _long_row, _varlen, bounded
from rl.model import Policy, arguments
from rl.packing import collate

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HEADS, GROUPS, WIDTH = 16, 8, 128  # of Qwen3-0.6B


def seconds(work: Callable[[], None], repeat: int) -> float:
    for _ in range(3):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(repeat):
        work()
    wait()
    return (time.perf_counter() - began) / repeat


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def emit(metric: str, value: float, unit: str, **more: object) -> None:
    line = {"bench": "training_step", "metric": metric, "value": float(f"{value:.5g}")}
    print(json.dumps(line | {"unit": unit, "peer": None, "ratio": None} | more), flush=True)


def step(size: str, attention: str, length: int, budget: int, repeat: int, *, fuse: bool) -> None:
    policy = Policy(make(size, attention).to(DEVICE, torch.bfloat16))
    if fuse:
        policy.fuse()
    batch = arguments(collate(rows(budget // length, length), 0), DEVICE)

    def once() -> None:
        logp_N, _ = policy(*batch)
        (-logp_N.mean()).backward()

    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    took = seconds(once, repeat)
    more = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)} if ON_GPU else {}
    name = f"{attention}{', fused' if fuse else ''}"
    tokens = budget // length * length
    emit(
        f"forward and backward, {size}, rows of {length}: {name}", tokens / took, "tokens/s", **more
    )


def attention(length: int, n: int, repeat: int) -> None:
    scale = WIDTH**-0.5
    told = bounded([length * i for i in range(n + 1)], DEVICE)

    def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _varlen(q, k, v, scale, None, told["cu_seq_lens_q"], length)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(length, 2) for x in (q, k, v)), strict=True)
        return torch.cat([_long_row(*part, scale) for part in parts], 1)

    inputs = [
        torch.randn(
            1, heads, length * n, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
        )
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    for name, attend in (("variable length", together), ("a call of cuDNN's a row", apart)):
        slope = torch.randn_like(attend(*inputs))
        took = seconds(lambda f=attend, g=slope: f(*inputs).backward(g), repeat)  # type: ignore[misc]
        emit(f"attention, {n} rows of {length}: {name}", 1e3 * took, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.6b" if ON_GPU else "nano")
    parser.add_argument("--length", type=int, default=4096 if ON_GPU else 128)
    parser.add_argument("--budget", type=int, default=16_384 if ON_GPU else 512)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    for name, fuse in (("sdpa", False), (ROWS, False), *([(ROWS, True)] if ON_GPU else [])):
        step(args.size, name, args.length, args.budget, args.repeat, fuse=fuse)
    if ON_GPU:
        attention(args.length, args.budget // args.length, args.repeat)


if __name__ == "__main__":
    main()
