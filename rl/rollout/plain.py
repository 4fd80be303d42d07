"""Any causal LM of transformers over slots, through its own forward.

Two doors of transformers lead here: the cache object that a model hands its new keys and values
to, and the attention function that a model is set to by name.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from rl.rollout.memory import Memory
from shared.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tirgen_slots"
_running = threading.local()  # .call: what the forward of this thread works for


class Plain(Memory):
    """The engine's own copy of a model: its attention is set to `NAME` for good."""

    def __init__(self, model: PreTrainedModel, *, slots: int, max_len: int) -> None:
        super().__init__(model, slots=slots, max_len=max_len)
        self._wanted: Tensor | None = None
        self._check()

    def _reference(self, ids_1T: Tensor) -> Tensor:
        logits = super()._reference(ids_1T)
        self.model.set_attn_implementation(NAME)
        return logits

    def _read(self, slot: int, ids_T: Tensor, start: int) -> Tensor:
        call = _Read(self, slot, start, start + len(ids_T))
        places = torch.arange(start, call.end, device=self.device)
        return self._run(call, ids_T[None], places[None])[0]

    def _step(self, ids_S: Tensor, places_S: Tensor, mask_N1L: Tensor) -> Tensor:
        return self._run(_Step(self, places_S, mask_N1L), ids_S[:, None], places_S[:, None])

    def _run(self, call: _Read | _Step, ids_BT: Tensor, places_BT: Tensor) -> Tensor:
        _running.call = call
        try:
            out = self.model(
                input_ids=ids_BT,
                position_ids=places_BT,
                past_key_values=call,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            del _running.call
        logits: Tensor = out.logits[:, -1]
        return logits


class _Call:
    """What a model takes for its cache."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given


class _Read(_Call):
    def __init__(self, memory: Memory, slot: int, start: int, end: int) -> None:
        self.memory, self.slot, self.start, self.end = memory, slot, start, end
        self.mask = memory._causal(end - start, end)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        self.memory.keys[layer_idx][self.slot, :, self.start : self.end] = k[0]
        self.memory.values[layer_idx][self.slot, :, self.start : self.end] = v[0]
        return k, v

    def attend(self, layer: int, q_BhTD: Tensor, scale: float) -> Tensor:
        q = q_BhTD[0].transpose(0, 1)
        return self.memory._attend_read(layer, self.slot, q, self.mask, scale)[None]


class _Step(_Call):
    def __init__(self, memory: Memory, places_S: Tensor, mask_N1L: Tensor) -> None:
        self.memory, self.mask = memory, mask_N1L
        self.at = memory._at(places_S)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        self.memory._write(layer_idx, self.at, k[:, :, 0], v[:, :, 0])
        return k, v

    def attend(self, layer: int, q_BhTD: Tensor, scale: float) -> Tensor:
        return self.memory._attend_step(layer, q_BhTD[:, :, 0], self.mask, scale)[:, None]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of a model that is set to `NAME`: (B, heads, T, d) -> (B, T, heads * d)."""
    if softcap is not None or s_aux is not None:
        raise ConfigError(
            "The model caps its attention scores or has attention sinks.",
            where=type(module).__name__,
            remedy="the local engine does not compute these: use vLLM",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call: _Read | _Step = _running.call
    return call.attend(module.layer_idx, query, scale), None


AttentionInterface.register(NAME, _attention)
