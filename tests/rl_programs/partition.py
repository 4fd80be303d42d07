"""One optimizer step of the same rows, cut in every way; a program for each rank.

Rank 0 writes to its first argument: by case, what each parameter changed by and what was reported.
The second names the ZeRO stages to go through: many cases in one process per rank, because starting
DeepSpeed costs more than they do.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl.attention import ROWS
from rl.config import EngineConfig, OptimizerConfig, SftConfig, TrainConfig
from rl.data import Position, Window
from rl.engine import Engine
from rl.loss import Level, LossSettings
from rl.model import Policy
from rl.packing import TrainRow
from rl.rollout.sampler import RlRow
from rl.sft import train_window
from rl.update import update
from rl.world import World, join

LR = 0.5
NLL = 0.05
SIZES = (3, 17, 5, 9, 26, 4, 12, 8, 31, 6, 15, 10)  # tokens of twelve ragged rows


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train()


def rows() -> tuple[TrainRow, ...]:
    random = Random(5)
    made = []
    for n in SIZES:
        ids = tuple(random.randrange(61) for _ in range(n))
        learn = (False, *(random.random() < 0.6 for _ in range(n - 1)))
        made.append(TrainRow(ids, learn, (0.0,) * n))
    made[5] = TrainRow(made[5].ids, (False,) * SIZES[5], made[5].sampler)  # a row without loss
    return tuple(made)


@dataclass(frozen=True)
class Case:
    zero: int = 0
    budget: int = 160  # 160: one micro-batch in a world of one
    layout: str = "packed"
    aggregation: str = "token-mean"
    clip: float | None = None
    offload: bool = False
    managed: bool = False  # control: DeepSpeed believes to own the boundary
    few: bool = False  # two rows only: some rank has a micro-batch without rows
    rl: bool = False  # the update of both levels, instead of SFT
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return repr(self)


CASES = [
    *(
        Case(zero=zero, budget=budget, layout=layout)
        for zero in range(4)
        for budget in (160, 31)
        for layout in ("packed", "padded")
    ),
    *(Case(zero=zero, budget=31, aggregation="seq-mean-token-mean") for zero in range(4)),
    *(Case(zero=zero, budget=31, clip=0.01) for zero in range(4)),
    *(Case(zero=zero, budget=31, few=True) for zero in range(4)),
    *(Case(zero=zero, budget=31, offload=True) for zero in (1, 2, 3)),
    *(Case(zero=zero, budget=31, managed=True) for zero in range(4)),
    *(Case(zero=zero, budget=budget, rl=True) for zero in range(4) for budget in (160, 31)),
    *(Case(zero=zero, budget=31, dtype="bf16") for zero in range(4)),
]


def rl_rows() -> list[RlRow]:
    """Of both levels, with the advantages of groups of three."""
    advantages = (1.2, -0.4, -0.8, 0.7, 0.5, -1.2, 0.3, -1.0, 0.7, 0.9, -0.9, 0.0)
    return [
        RlRow(Level.STEP if i >= 6 else Level.EPISODE, str(i // 3), advantage, row)
        for i, (advantage, row) in enumerate(zip(advantages, rows(), strict=True))
    ]


def config(case: Case) -> SftConfig | TrainConfig:
    engine = EngineConfig(
        zero=case.zero,
        dtype=case.dtype,
        token_budget=case.budget,
        layout=case.layout,
        max_grad_norm=case.clip,
        offload_optimizer=case.offload,
        deepspeed={"managed_gradient_accumulation": True} if case.managed else {},
    )
    common: dict[str, Any] = {
        "model": {"path": "-"},
        "data": {"snapshot": "-"},
        "engine": engine,
        "optimizer": OptimizerConfig(kind="sgd", lr=LR, weight_decay=0.0),
    }
    if case.rl:
        return TrainConfig(**common, loss=LossSettings(importance="off", nll_weight=NLL))
    return SftConfig(**common, aggregation=case.aggregation)


def run(case: Case, world: World) -> dict[str, Any]:
    lm = model()
    lm.set_attn_implementation(ROWS)  # the default of jobs; the reference is by transformers' own
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    chosen = config(case)
    engine = Engine(Policy(lm), chosen.engine, chosen.optimizer, world, 1)
    some = rows()[8:10] if case.few else rows()
    if isinstance(chosen, TrainConfig):
        (values,) = update(chosen, engine, rl_rows(), seed=0)
    else:
        values = train_window(chosen, engine, Window(some, Counter(), Position(1, 0)))
    change = {name: now.cpu() - before[name] for name, now in engine.weights()}
    reported = world.gather({key: values[key] for key in ("loss", "grad_norm")})
    return {"change": change, "reported": reported}


def main(out: Path, stages: str) -> None:
    world = join(timedelta(minutes=2))
    chosen = [case for case in CASES if str(case.zero) in stages]
    results = {}
    for case in chosen:
        results[case.name] = run(case, world)
        if torch.cuda.is_available():
            gc.collect()  # an engine's buckets are gigabytes there, and it refers to itself
            torch.cuda.empty_cache()
    if world.is_first:
        torch.save(results, out)
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
