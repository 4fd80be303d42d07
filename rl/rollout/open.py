"""The engine that a job samples with, as its configuration names it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import torch

from rl.config import TrainConfig
from rl.model import load_model
from rl.render import Renderer
from rl.rollout.local import LocalEngine
from rl.weight_sync import Receiver
from rl.world import World
from shared import policy


class Rollouts(policy.Engine, Receiver, Protocol):
    """An engine that samples and that takes new weights."""


@asynccontextmanager
async def open_engine(
    config: TrainConfig, renderer: Renderer, world: World
) -> AsyncIterator[Rollouts]:
    """Opened in the event loop that rollouts run in; its weights are still to be sent."""
    plain = config.model.model_copy(update={"lora": None, "recompute": 0})
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    engine = LocalEngine(
        load_model(plain, config.seed).to(world.device, dtype),
        renderer.tokenizer,
        eos={renderer.eos},
        slots=config.rollout.slots,
        max_len=config.rollout.context,
        version=-1,
    )
    try:
        yield engine
    finally:
        engine.close()
