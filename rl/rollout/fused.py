"""The Llama family (llama, qwen2, qwen3) over slots: its own forward, on the model's own weights.

Projections that read the same input are one product, masks and rotations are made once for all
layers, and nothing runs in Python that a step does not need: on a small model most of the time of
transformers' own forward is spent there (bench/rollouts.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rl.rollout.memory import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAMILY = frozenset({"llama", "qwen2", "qwen3"})
_STEADY = frozenset({"default", "linear", "llama3", "yarn"})  # angles depend on positions alone


class _Layer(NamedTuple):
    """A layer's weights as `Fused` multiplies them; all are views of what the model holds."""

    norm: Tensor  # (H,)
    qkv: Tensor  # (H, (heads + 2 * kv heads) * d)
    qkv_bias: Tensor | None
    qk_norm: tuple[Tensor, Tensor] | None  # (d,) each
    out: Tensor  # (heads * d, H)
    out_bias: Tensor | None
    mlp_norm: Tensor  # (H,)
    gate_up: Tensor  # (H, 2 * I)
    gate_up_bias: Tensor | None
    down: Tensor  # (I, H)
    down_bias: Tensor | None
    scale: float


class Fused(Memory):
    """The Llama family. The model's own weights become parts of the fused ones, so that whoever
    loads new ones into the model loads them here."""

    def __init__(self, model: PreTrainedModel, *, slots: int, max_len: int) -> None:
        super().__init__(model, slots=slots, max_len=max_len)
        inner: Any = model.model
        self._blocks = [_fuse(block) for block in inner.layers]
        self._embed, self._norm, self._head = inner.embed_tokens, inner.norm, model.lm_head
        self._eps: float = inner.norm.variance_epsilon
        with torch.inference_mode():
            cos, sin = inner.rotary_emb(self._zeros((1,)), self._places_L[None])
        self._cos_L1D, self._sin_L1D = cos[0, :, None], sin[0, :, None].clone()
        # rotate_half(x) * sin == roll(x, half) * this
        self._sin_L1D[..., : self.head_dim // 2].neg_()
        self._check()

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            config.model_type in _FAMILY
            and rope.get("rope_type", "default") in _STEADY
            and config.hidden_act == "silu"
        )

    def _read(self, slot: int, ids_T: Tensor, start: int) -> Tensor:
        end = start + len(ids_T)
        x = self._embed(ids_T)
        cos, sin = self._cos_L1D[start:end], self._sin_L1D[start:end]
        mask = self._causal(len(ids_T), end)
        for i, layer in enumerate(self._blocks):
            q, k, v = self._qkv(layer, x, cos, sin)
            self.keys[i][slot, :, start:end] = k.transpose(0, 1)
            self.values[i][slot, :, start:end] = v.transpose(0, 1)
            x = self._rest(layer, x, self._attend_read(i, slot, q, mask, layer.scale))
        logits: Tensor = self._head(self._rms(x[-1:], self._norm.weight))
        return logits[0]

    def _step(self, ids_S: Tensor, places_S: Tensor, mask_N1L: Tensor) -> Tensor:
        x = self._embed(ids_S)
        cos, sin = self._cos_L1D[places_S], self._sin_L1D[places_S]
        at = self._at(places_S)
        for i, layer in enumerate(self._blocks):
            q, k, v = self._qkv(layer, x, cos, sin)
            self._write(i, at, k, v)
            x = self._rest(layer, x, self._attend_step(i, q, mask_N1L, layer.scale))
        logits: Tensor = self._head(self._rms(x, self._norm.weight))
        return logits

    def _qkv(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Queries (N, heads, d), keys and values (N, kv heads, d) of the rows x (N, H)."""
        joined = _mm(self._rms(x, layer.norm), layer.qkv, layer.qkv_bias)
        parts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = torch.split(joined.view(len(x), -1, self.head_dim), parts, dim=1)
        if layer.qk_norm is not None:
            q, k = self._rms(q, layer.qk_norm[0]), self._rms(k, layer.qk_norm[1])
        half = self.head_dim // 2
        q, k = (torch.addcmul(z * cos, z.roll(half, -1), sin) for z in (q, k))
        return q, k, v

    def _rest(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + _mm(attended, layer.out, layer.out_bias)
        wide = _mm(self._rms(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
        gate, up = wide.chunk(2, dim=-1)
        return x + _mm(functional.silu(gate).mul_(up), layer.down, layer.down_bias)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in float32 as the models do it."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        size = wide.shape[-1]
        inverse = length.square_().mul_(1 / size).add_(self._eps).rsqrt_()
        normed: Tensor = (wide * inverse).to(x.dtype) * weight
        return normed


def _mm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _fuse(block: Any) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    qkv, qkv_bias = _join(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _join(mlp.gate_proj, mlp.up_proj)
    normed = hasattr(attention, "q_norm")
    return _Layer(
        norm=block.input_layernorm.weight,
        qkv=qkv.t(),
        qkv_bias=qkv_bias,
        qk_norm=(attention.q_norm.weight, attention.k_norm.weight) if normed else None,
        out=attention.o_proj.weight.t(),
        out_bias=attention.o_proj.bias,
        mlp_norm=block.post_attention_layernorm.weight,
        gate_up=gate_up.t(),
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight.t(),
        down_bias=mlp.down_proj.bias,
        scale=attention.scaling,
    )


def _join(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases stacked; the layers' own become views of them."""
    weight = torch.cat([layer.weight.data for layer in layers])
    biased = layers[0].bias is not None
    bias = torch.cat([layer.bias.data for layer in layers]) if biased else None
    at = 0
    for layer in layers:
        end = at + layer.out_features
        layer.weight.data = weight[at:end]
        if bias is not None:
            layer.bias.data = bias[at:end]
        at = end
    return weight, bias
