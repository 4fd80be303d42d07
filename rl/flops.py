"""What a decoder's training costs in floating-point operations, and the share of the peak that is.

A matrix of n weights costs 2n operations per token forward, and twice that backward (the gradients
of its input and of itself). Attention costs 4 h d per layer and key looked at (scores, then values;
h query heads of d dimensions). Two conventions: causal counts the keys that a token may look at,
t + 1 at position t; full counts the whole row for every token, which is what most published figures
do and about twice as much for long rows. Activations computed a second time count for nothing
(MFU, not HFU); embeddings are looked up, not multiplied; norms and the like are left out.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shared.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Dense bf16 operations per second by the vendors' data sheets, without sparsity; the first match of
# the name that torch.cuda.get_device_name tells.
PEAKS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12),
    ("GH200", 989e12), ("H20", 148e12), ("B200", 2250e12), ("A100", 312e12), ("A800", 312e12),
    ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("RTX A6000", 154.8e12),
    ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """`weights`: those a token is multiplied with, all layers and the head. `width`: h d."""

    weights: int
    layers: int
    width: int


def shape(config: PretrainedConfig) -> Shape:
    """Of a dense decoder of the Llama, Qwen2 or Qwen3 kind. Raises ConfigError for experts."""
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise ConfigError("The cost of models with experts is not known here.", where="model.path")
    hidden, heads = config.hidden_size, config.num_attention_heads
    d = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    attention = hidden * d * (2 * heads + 2 * groups)  # q and o, k and v
    mlp = 3 * hidden * config.intermediate_size  # gate, up, down
    layers = config.num_hidden_layers
    return Shape(layers * (attention + mlp) + hidden * config.vocab_size, layers, heads * d)


def training_flops(
    shape: Shape, lengths: Iterable[int], *, causal: bool, frozen: bool = False
) -> float:
    """Forward and backward over rows of these lengths. `frozen`: LoRA, whose base weights get no
    gradient of their own (the adapters' cost is left out)."""
    linear = (4 if frozen else 6) * shape.weights
    attention = 12 * shape.layers * shape.width
    return float(
        sum(n * linear + attention * (n * (n + 1) / 2 if causal else n * n) for n in lengths)
    )


def peak(device_name: str) -> float | None:
    """Operations per second of a known GPU; None for others, which then have no MFU."""
    return next((flops for name, flops in PEAKS if name in device_name), None)


def mfu(flops: float, seconds: float, peak: float, devices: int = 1) -> float:
    """The share of what `devices` could have computed at their peak in this time."""
    return flops / (seconds * peak * devices)


def costs(
    config: PretrainedConfig, lengths: Sequence[int], seconds: float, devices: int, *, frozen: bool
) -> dict[str, float]:
    """Metrics of a step over rows of these lengths: this process's peak memory, and its MFU.

    MFU is of training steps alone, and only told for a GPU whose peak is known.
    """
    if not torch.cuda.is_available():
        return {"memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    values = {"memory/peak_bytes": float(torch.cuda.max_memory_allocated())}
    top = peak(torch.cuda.get_device_name())
    if top is not None and seconds > 0:
        for name, causal in (("mfu", True), ("mfu_full", False)):
            flops = training_flops(shape(config), lengths, causal=causal, frozen=frozen)
            values[f"speed/{name}"] = mfu(flops, seconds, top, devices)
    return values
