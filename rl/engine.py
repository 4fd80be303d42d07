"""A policy under DeepSpeed: forward, backward, and one optimizer step per window of micro-batches.

What always holds:
- A window has any number of micro-batches, on each rank the same (`rl.packing.pack`). Gradients of
  all of them count: DeepSpeed is told that the caller owns the boundary (`step`). Its plainest use,
  several backward passes at one step with managed accumulation, silently trains on the last
  micro-batch only under ZeRO-1 and 2 (trainer.md 5.2; tests/integration/test_rl_partition.py).
- `backward` takes a micro-batch's share of the window's loss, a plain sum of weighted terms. It is
  multiplied by the number of ranks here, because DeepSpeed averages gradients over them; nothing
  else scales it.
- Clipping is explicit, by the norm over all ranks, and the norm before it is reported.
- The rate is a function of the number of optimizer steps taken, and nothing else.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl.config import EngineConfig, OptimizerConfig
from rl.model import Policy, arguments
from rl.packing import MicroBatch
from rl.weight_sync import weights
from rl.world import World


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: the gradient's norm before clipping, the rate, whether it was applied.

    `applied` is false where bf16 gradients overflowed and DeepSpeed skipped the update.
    """

    grad_norm: float
    lr: float
    applied: bool


class Engine:
    """`policy` partitioned as `config` says. `steps` counts the optimizer steps that were taken."""

    def __init__(
        self,
        policy: Policy,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        world: World,
        total_steps: int,
    ) -> None:
        import deepspeed

        self.config, self.world, self.optimizer_config = config, world, optimizer
        self.total_steps, self.steps = total_steps, 0
        self.policy = policy
        if compiles(config, world.device):
            policy.fuse()
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=make_optimizer(policy, optimizer),
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        self._norm: float | None = None
        if config.zero == 0 and config.dtype == "fp32":
            # DeepSpeed clips here without telling the norm.
            self.engine.clip_fp32_gradients = self._clip

    def logprobs(self, batch: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(logp_N with gradient, entropy_N) of a micro-batch's loss tokens."""
        found: tuple[Tensor, Tensor] = self.engine(
            *arguments(batch, self.world.device), temperature
        )
        return found

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Forward passes whose results are only looked at."""
        with torch.no_grad():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's share of the window's loss."""
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Update the weights by all gradients since the last step."""
        rate = learning_rate(self.steps, self.total_steps, self.optimizer_config)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        skipped = self.engine.skipped_steps
        self.engine.step()
        self.steps += 1
        norm = self._norm if self._norm is not None else self.engine.get_global_grad_norm()
        applied = self.engine.skipped_steps == skipped
        return StepResult(math.nan if norm is None else float(norm), rate, applied)

    def _clip(self) -> None:
        limit = self.config.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.engine.module.parameters(), limit)
        self._norm = norm.item()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `rl.weight_sync.weights`: every rank goes through all of them."""
        return weights(self.policy.lm)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights on the CPU, for saving; on the first rank only (elsewhere empty)."""
        state = {}
        for name, tensor in self.weights():
            if self.world.is_first:
                state[name] = tensor.to("cpu", copy=True)
        return state

    def adapters(self) -> dict[str, Tensor]:
        """LoRA's weights by peft's names, on the CPU; on the first rank only (elsewhere empty)."""
        named = [(n, p) for n, p in self.policy.lm.named_parameters() if p.requires_grad]
        whole: AbstractContextManager[Any] = nullcontext()
        if self.config.zero == 3:
            import deepspeed

            whole = deepspeed.zero.GatheredParameters([p for _, p in named])
        with whole:
            if self.world.is_first:
                return {name: p.detach().to("cpu", copy=True) for name, p in named}
            return {}


def compiles(config: EngineConfig, device: torch.device) -> bool:
    """Whether kernels are fused (`engine.compile`). Triton needs a C compiler for its launchers."""
    if config.compile is not None:
        return config.compile
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    sound = config.zero < 3 and config.dtype == "bf16"  # in fp32 `rows` would compile each length
    return device.type == "cuda" and sound and compiler is not None


def deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    """The whole of what DeepSpeed is told; `config.deepspeed` comes over it."""
    zero: dict[str, Any] = {"stage": config.zero}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # its own counting; ours is `rl.packing`
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm or math.inf,  # left out, it would clip at 1
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    } | config.deepspeed


def make_optimizer(policy: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Weight decay is of matrices; norms and biases have none. One group where nothing decays."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": 0.0}]
    if config.weight_decay:
        shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]  # ZeRO-3 has emptied them
        matrices = [p for p, s in zip(parameters, shapes, strict=True) if len(s) > 1]
        others = [p for p, s in zip(parameters, shapes, strict=True) if len(s) <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}]
        groups += [{"params": others, "weight_decay": 0.0}] if others else []
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step number `step` (from 0) of `total`: warm-up, then the schedule."""
    until = config.warmup * total if config.warmup < 1 else config.warmup
    warm = min(1.0, (step + 1) / until) if until else 1.0
    progress = min(1.0, step / max(1, total))
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = config.least + (1 - config.least) * (1 - progress)
        case "cosine":
            share = config.least + (1 - config.least) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * warm * share
