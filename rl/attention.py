"""Causal attention within each packed row: what `model.attention = "rows"`, the default, names.

The rows of a packed micro-batch keep apart by a mask (`rl.packing.MicroBatch`). In transformers'
sdpa that is a dense one: every pair of the micro-batch is computed, and all but those of one row
thrown away; with thirty rows, thirty times the work, on a CPU more than all the rest of a small
model (docs/training.md). Here the rows' boundaries, found once per micro-batch, cut the sequence:
into calls of torch's own kernel, or, for half precision on a GPU, into one call of its
variable-length kernel for the short rows and one of cuDNN's for each long one, which on Hopper is
twice as fast (tests/gpu, docs/training.md).

A model that is run on anything else (padded rows, a mask, a cache) is attended to by sdpa.
Axis suffixes: `_B` rows of a tensor, `h`/`g` heads of queries and of keys, `T` positions, `d`.
"""

from __future__ import annotations

from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shared.errors import ConfigError

ROWS = "rows"
# Tokens of a row that is worth a call of its own, on Hopper: with rows of 4,096 a step is slower by
# a sixth, with rows of 16,384 it is faster by as much (docs/decisions/0022).
LONG, GRAIN = 8192, 256
_UNKNOWN = ("softcap", "position_bias", "s_aux")  # what other kernels can do, and these cannot
# torch 2.11 groups heads without being asked; later ones want to be.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)


def boundaries(positions_BT: Tensor) -> dict[str, Any]:
    """Where packed rows begin and end, in the words in which transformers tells its kernels.

    Positions begin at 0 with each row. Empty for a tensor of several rows: those are padded.
    """
    if len(positions_BT) > 1:
        return {}
    starts = (positions_BT[0] == 0).nonzero()[:, 0].tolist()
    return bounded([*starts, positions_BT.shape[1]], positions_BT.device)


def bounded(ends: list[int], device: torch.device) -> dict[str, Any]:
    """The same of rows that begin and end at `ends` (the first is 0)."""
    on_cpu = torch.tensor(ends, dtype=torch.int32)
    bounds, longest = on_cpu.to(device), max(end - start for start, end in pairwise(ends))
    return {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": longest, "max_length_k": longest,
        "row_ends": on_cpu,  # read without waiting for a GPU
        "long_rows": longest >= LONG and _has_fast_cudnn(device),
    }  # fmt: skip


def _has_fast_cudnn(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def attend(
    module: nn.Module,
    query_BhTd: Tensor,
    key_BgTd: Tensor,
    value_BgTd: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention (B, T, h, d), within the rows that `cu_seq_lens_q` bounds (see `boundaries`).

    Raises ConfigError for a model whose attention is of a kind that only other kernels know.
    """
    if any(more.get(name) is not None for name in _UNKNOWN):
        raise ConfigError(
            f"{type(module).__name__} needs an attention that '{ROWS}' does not have.",
            where="model.attention",
            remedy="set it to eager, or to a kernel that transformers lists for this model",
        )
    if attention_mask is None and len(query_BhTd) == 1 and "cu_seq_lens_q" not in more:
        positions_BT = more.get("position_ids")  # the model was not called by `rl.model.Policy`
        if positions_BT is not None and query_BhTd.shape[2] == key_BgTd.shape[2]:
            more |= boundaries(positions_BT)
    bounds = more.get("cu_seq_lens_q")
    if bounds is None or attention_mask is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BhTd, key_BgTd, value_BgTd, attention_mask, scaling=scaling, **more
        )
        return found
    ends = more.get("row_ends", bounds)
    half = query_BhTd.dtype is not torch.float32
    if half and more.get("long_rows") and sliding_window is None:
        return _by_length(query_BhTd, key_BgTd, value_BgTd, scaling, ends), None
    if half and query_BhTd.is_cuda:
        longest = more["max_length_q"]
        attended = _varlen(
            query_BhTd, key_BgTd, value_BgTd, scaling, sliding_window, bounds, longest
        )
        return attended, None
    parts = _split(query_BhTd, key_BgTd, value_BgTd, ends.diff().tolist())
    rows = [_row(q, k, v, scaling, sliding_window) for q, k, v in parts]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def _split(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    parts = [torch.split(tensor, lengths, 2) for tensor in (query, key, value)]
    return list(zip(*parts, strict=True))


def _row(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """One row; each position looks at itself and at the `window - 1` before it."""
    n = query.shape[2]
    band = None
    if window is not None and n > window:
        band = torch.ones(n, n, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=True
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
    bounds: Tensor, longest: int,
) -> Tensor:  # fmt: skip
    """(1, T, h, d) of rows in half precision on a GPU, by one call."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    looks_back = -1 if window is None else window - 1
    attended = varlen_attn(
        q, k, v, bounds, bounds, longest, longest,
        scale=scaling, window_size=(looks_back, 0), **_GROUPED,
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_length(query: Tensor, key: Tensor, value: Tensor, scaling: float, ends: Tensor) -> Tensor:
    """(1, T, h, d): long rows each by itself, the others together."""
    lengths = ends.diff().tolist()
    rows = _split(query, key, value, lengths)
    out = [_long_row(*row, scaling) if row[0].shape[2] >= LONG else None for row in rows]
    short = [n for n, done in enumerate(out) if done is None]
    if short:
        q, k, v = (torch.cat([rows[n][i] for n in short], 2) for i in range(3))
        sizes = [lengths[n] for n in short]
        bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(query.device)
        joined = _varlen(q, k, v, scaling, None, bounds, max(sizes))
        for n, part in zip(short, torch.split(joined, sizes, 1), strict=True):
            out[n] = part
    return torch.cat([part for part in out if part is not None], 1)


def _long_row(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(1, t, h, d). cuDNN plans anew, a tenth of a second, for each length that it has not seen;
    filled up to a multiple of GRAIN there are few. What is behind its end no position sees."""
    t = query.shape[2]
    q, k, v = (functional.pad(x, (0, 0, 0, -t % GRAIN)) for x in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        attended = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
    return attended[:, :, :t].transpose(1, 2)


def _mask(**asked: Any) -> Tensor | None:
    """None where the boundaries say it all; otherwise what sdpa needs."""
    one_row = asked["batch_size"] == 1 and asked["q_length"] == asked["kv_length"]
    if one_row and asked["attention_mask"] is None:
        return None
    made: Tensor | None = sdpa_mask(**asked)
    return made


AttentionInterface.register(ROWS, attend)
AttentionMaskInterface.register(ROWS, _mask)
