"""Weights that are spread over the ranks go into an engine on rank 0; a program for each rank.

Rank 0 writes to its first argument what arrived, and how much was whole at any moment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from rl.weight_sync import Target, checksum, sync, weights
from rl.world import join
from tests.rl_programs.partition import model

BUCKET = 20_000  # bytes; the largest tensor has 12 288


class Memory:
    """A receiver that is nothing but a copy of the model."""

    dtype = None

    def __init__(self) -> None:
        self.lm, self.version = model(), 0
        with torch.no_grad():
            for parameter in self.lm.parameters():
                parameter.zero_()
        self.target = Target(self.lm)
        self.checks = 0

    def begin_update(self) -> None: ...

    def update(self, name: str, tensor: Tensor) -> None:
        self.target.take(name, tensor)

    def end_update(self, version: int) -> None:
        self.target.complete()
        self.version = version

    def abandon_update(self, why: str) -> None:
        raise AssertionError(why)

    def checksums(self) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in self.target.tensors.items()}


def main(out: Path) -> None:
    world = join(timedelta(minutes=1))
    lm = model()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    engine, *_ = deepspeed.initialize(
        model=lm,
        optimizer=torch.optim.SGD(lm.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
        dist_init_required=False,
    )
    whole: list[int] = []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(engine.module, BUCKET):
            whole.append(sum(p.numel() * 4 for p in engine.module.parameters() if p.numel()))
            yield name, tensor

    receiver = Memory() if world.is_first else None
    report = sync(watched(), receiver, 3)
    left = sum(p.numel() for p in engine.module.parameters())
    if receiver is not None:
        torch.save(
            {
                "before": before, "after": receiver.lm.state_dict(), "report": report,
                "version": receiver.version, "whole": max(whole), "left": left,
                "all": sum(tensor.nbytes for tensor in before.values()),
            },
            out,
        )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
