"""A causal LM over a fixed number of slots: keys and values of one sequence each, kept in place.

What a sequence computes does not depend on the other slots. A step computes the first rows of
memory up to the last one that is needed, and attention looks at as many positions as the longest
sequence has, both rounded up; whether more rows or more (masked) positions change any bit with the
libraries at hand is found out at the start, and if they do, a step always has all of them.

How the model itself is run is the subclasses': `fused.py` for the Llama family, `plain.py` for any
model of transformers. Both must agree with transformers' own forward: it is checked at the start.

Axis suffixes: `_S` slots, `_T` new tokens, `_L` positions, `_H` hidden size, `_V` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRAIN = 32  # attention is padded to a multiple of this many positions
ROWS = 8  # a step to a multiple of this many slots
PROBE = 12  # tokens of the check at the start
CHUNK = 512  # new tokens that are read at once: bounds the memory of a long prompt


class Memory(ABC):
    """Keys and values of `slots` sequences of at most `max_len` tokens.

    Not thread-safe. Raises ConfigError for a model whose attention it cannot keep this way.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int, max_len: int) -> None:
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window is not None and window < max_len and getattr(config, "use_sliding_window", True):
            raise ConfigError(
                f"The local engine keeps whole contexts, and the model looks back {window} tokens.",
                where=f"{config.model_type}, context {max_len}",
                remedy=f"set the context to at most {window}, or use vLLM",
            )
        self.model, self.slots, self.max_len = model, slots, max_len
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        # One position more than the longest sequence: idle slots write there, and nobody reads it.
        shape = (slots, self.kv_heads, max_len + 1, self.head_dim)
        self.keys = [self._zeros(shape) for _ in range(self.layers)]
        self.values = [self._zeros(shape) for _ in range(self.layers)]
        self._places_L = torch.arange(max_len + 1, device=self.device)
        self._grain = GRAIN if self._padding_is_free() else max_len
        self._rows = slots  # until `_check` knows better

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    # ---- the two calls -------------------------------------------------------------------------

    @torch.inference_mode()
    def read(self, slot: int, ids: Sequence[int], start: int) -> Tensor:
        """Take in `ids` at positions start, start + 1, …: the logits (V,) after the last one.

        One sequence at a time, so that the shape depends on nothing but itself.
        """
        for at in range(0, len(ids), CHUNK):
            part = torch.tensor(ids[at : at + CHUNK], device=self.device)
            logits_V = self._read(slot, part, start + at)
        return logits_V

    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, int, int]]) -> Tensor:
        """One new token for some slots, (slot, token, position) each: logits (S, V).

        S is at least the last of these slots plus one. Other rows hold nothing of use.
        """
        n = min(_up(max(slot for slot, _, _ in rows) + 1, self._rows), self.slots)
        ids, places, ends = [0] * n, [self.max_len] * n, [1] * n
        for slot, token, position in rows:
            ids[slot], places[slot], ends[slot] = token, position, position + 1
        length = min(_up(max(ends), self._grain), self.max_len)
        ids_S, places_S, ends_S = torch.tensor([ids, places, ends], device=self.device)
        return self._step(ids_S, places_S, self._ending(ends_S, length))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give `target` the first `tokens` keys and values of `source`."""
        for memory in (*self.keys, *self.values):
            memory[target, :, :tokens] = memory[source, :, :tokens]

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first `tokens` keys and values of two slots."""
        for memory in (*self.keys, *self.values):
            kept = memory[a, :, :tokens].clone()
            memory[a, :, :tokens] = memory[b, :, :tokens]
            memory[b, :, :tokens] = kept

    def rows(self, active: int) -> int:
        """How many rows a step has for so many sequences, if they are in the first slots."""
        return min(_up(active, self._rows), self.slots)

    # ---- what a way of running the model brings ------------------------------------------------

    @abstractmethod
    def _read(self, slot: int, ids_T: Tensor, start: int) -> Tensor:
        """The logits (V,) after the last of a slot's new tokens."""

    @abstractmethod
    def _step(self, ids_S: Tensor, places_S: Tensor, mask_N1L: Tensor) -> Tensor:
        """The logits (S, V) after one new token in each slot."""

    def _check(self) -> None:
        """The model's own forward must give the same logits. A subclass calls it when it is ready.

        So a model with an attention of its own kind is refused, not run wrongly.
        """
        vocabulary = self.model.get_input_embeddings().num_embeddings
        draw = torch.Generator().manual_seed(0)
        size = min(PROBE, self.max_len - 1)
        ids = torch.randint(vocabulary, (size + 1,), generator=draw)
        with torch.inference_mode():
            wanted = self._reference(ids[None].to(self.device))[0, -1].float()
        self.read(0, ids[:-1].tolist(), 0)
        found = self.step([(0, int(ids[-1]), size)])[0].float()
        if not torch.allclose(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
            raise ConfigError(
                "The local engine computes other logits than the model itself.",
                where=f"model type {self.model.config.model_type}",
                remedy="its attention is of a kind that the engine does not know: use vLLM",
            )
        if self._fewer_rows_are_free(ids):
            self._rows = ROWS

    def _fewer_rows_are_free(self, ids: Tensor) -> bool:
        """Whether the first rows come out the same bits however many follow them."""
        everyone = [(slot, int(ids[slot % len(ids)]), 1) for slot in range(self.slots)]
        whole, self._rows = self.step(everyone), 1
        sizes = range(ROWS, self.slots, ROWS)
        same = all(torch.equal(self.step(everyone[:n]), whole[:n]) for n in sizes)
        self._rows = self.slots
        return same

    def _reference(self, ids_1T: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids_1T, use_cache=False).logits
        return logits

    # ---- keys, values and attention ------------------------------------------------------------
    # N = S * kv heads: the query heads that share keys are the rows of one product, so that
    # nothing is repeated.

    def _at(self, places_S: Tensor) -> Tensor:
        """Where a step writes, as indices (S, kv heads, d) into a slot's flat memory."""
        offsets = torch.arange(self.head_dim, device=self.device)
        flat = places_S[:, None, None] * self.head_dim + offsets
        return flat.expand(-1, self.kv_heads, -1)

    def _write(self, layer: int, at: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v (S, kv heads, d) of one token per slot."""
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            memory[: len(new)].view(len(new), self.kv_heads, -1).scatter_(2, at, new)

    def _ending(self, ends_S: Tensor, length: int) -> Tensor:
        """The mask (N, 1, length) of sequences that end before `ends_S`."""
        mask = torch.zeros((len(ends_S), length), dtype=self.dtype, device=self.device)
        mask.masked_fill_(self._places_L[:length] >= ends_S[:, None], -torch.inf)
        return mask.repeat_interleave(self.kv_heads, 0)[:, None]

    def _causal(self, new: int, end: int) -> Tensor:
        """The mask (group * new, end) of the last `new` of `end` tokens."""
        mask = torch.full((new, end), -torch.inf, dtype=self.dtype, device=self.device)
        return mask.triu(end - new + 1).repeat(self.heads // self.kv_heads, 1)

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """q (N, M, d), keys and values (N, L, d), mask broadcastable to (N, M, L) -> (N, M, d)."""
        scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, values)

    def _attend_step(self, layer: int, q_ShD: Tensor, mask_N1L: Tensor, scale: float) -> Tensor:
        """One token per slot: q (S, heads, d) -> (S, heads * d)."""
        rows, length = len(q_ShD), mask_N1L.shape[-1]
        n, group = rows * self.kv_heads, self.heads // self.kv_heads
        keys, values = (
            memory[layer][:rows].view(n, self.max_len + 1, self.head_dim)[:, :length]
            for memory in (self.keys, self.values)
        )
        q = q_ShD.reshape(n, group, self.head_dim)
        return self._attend(q, keys, values, mask_N1L, scale).view(rows, -1)

    def _attend_read(
        self, layer: int, slot: int, q_ThD: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """The last tokens of one slot: q (T, heads, d), mask of `_causal` -> (T, heads * d)."""
        new, group, end = len(q_ThD), self.heads // self.kv_heads, mask.shape[-1]
        keys, values = self.keys[layer][slot, :, :end], self.values[layer][slot, :, :end]
        q = q_ThD.view(new, self.kv_heads, group, self.head_dim).permute(1, 2, 0, 3)
        q = q.reshape(self.kv_heads, group * new, self.head_dim)
        out = self._attend(q, keys, values, mask, scale)
        out = out.view(self.kv_heads, group, new, self.head_dim).permute(2, 0, 1, 3)
        return out.reshape(new, -1)

    @torch.inference_mode()
    def _padding_is_free(self) -> bool:
        """Whether attention over a longer, masked stretch gives the same bits."""
        draw = torch.Generator().manual_seed(0)
        keys, values = self.keys[0], self.values[0]
        for memory in (keys, values):
            memory.copy_(torch.randn(memory.shape, generator=draw))
        q = torch.randn(self.slots, self.heads, self.head_dim, generator=draw).to(keys)
        ends_S = torch.randint(1, self.max_len + 1, (self.slots,), generator=draw).to(self.device)
        found = {}
        for length in (*range(GRAIN, self.max_len, GRAIN), self.max_len):
            mask = self._ending(ends_S, length)
            found[length] = self._attend_step(0, q, mask, self.head_dim**-0.5)
        whole = found[self.max_len]
        same = all(
            torch.equal(part[ends_S <= length], whole[ends_S <= length])
            for length, part in found.items()
        )
        keys.zero_()
        values.zero_()
        return same


def _up(n: int, grain: int) -> int:
    return -(-n // grain) * grain
