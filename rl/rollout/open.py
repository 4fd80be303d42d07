"""The engine that a job samples with, as its configuration names it, and the way of weights to it.

local: each rank samples with an engine of its own. http: all ranks ask one server, which the first
rank keeps supplied with weights.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rl.config import TrainConfig
from rl.model import load_model
from rl.render import Renderer
from rl.rollout.http import HttpEngine
from rl.rollout.local import LocalEngine
from rl.rollout.transfer import BroadcastReceiver, Control, FolderReceiver, NcclGroup
from rl.weight_sync import Receiver, sync
from rl.world import World
from shared.endpoints import Endpoint, EndpointConfig
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rollouts:
    """`receiver`: None on a rank whose engine another rank supplies with weights."""

    engine: LocalEngine | HttpEngine
    receiver: Receiver | None
    control: Control | None = None  # of the server, on the rank that has a receiver

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int, world: World) -> None:
        """Go on sampling with these weights. Every rank calls it; returns when all have them."""
        sync(weights, self.receiver, version)
        world.barrier()
        if self.receiver is None and isinstance(self.engine, HttpEngine):
            self.engine.version = version

    def sleep(self, world: World) -> None:
        """Have the server give up its memory until the next update. Every rank calls it, once it
        samples no more; returns when the memory is free."""
        if self.control is not None:
            self.control.sleep()
        world.barrier()


@asynccontextmanager
async def open_engine(
    config: TrainConfig, renderer: Renderer, world: World
) -> AsyncIterator[Rollouts]:
    """Opened in the event loop that rollouts run in; its weights are still to be sent.

    Raises EndpointError for a server that does not answer, ConfigError for a model that is not a
    folder where the server needs one.
    """
    chosen = config.rollout
    if chosen.engine == "local":
        plain = config.model.model_copy(update={"lora": None, "recompute": 0})
        dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
        local = LocalEngine(
            load_model(plain, config.seed).to(world.device, dtype),
            renderer.tokenizer,
            eos={renderer.eos},
            slots=chosen.slots,
            max_len=chosen.context,
            version=-1,
        )
        try:
            yield Rollouts(local, local)
        finally:
            local.close()
        return
    assert chosen.base_url is not None
    model = Path(config.model.path)
    if not (model / "config.json").exists():
        raise ConfigError(
            "With engine = 'http' the model has to be a folder that the server can read.",
            where=f"model.path = {config.model.path}",
            remedy="download it first: hf download NAME --local-dir FOLDER",
        )
    address = EndpointConfig(
        base_url=chosen.base_url, model=chosen.served_model, concurrency=chosen.in_flight
    )
    async with Endpoint(address) as endpoint:
        await endpoint.check()
        engine = HttpEngine(endpoint, eos={renderer.eos}, version=-1)
        if not world.is_first:
            yield Rollouts(engine, None)
            return
        control = Control(engine, sleeps=chosen.sleep)
        receiver: Receiver
        if chosen.transfer == "nccl":
            receiver = BroadcastReceiver(control, NcclGroup())
        else:
            assert chosen.save_to is not None
            receiver = FolderReceiver(control, model, Path(chosen.save_to))
        try:
            yield Rollouts(engine, receiver, control)
        finally:
            control.close()
