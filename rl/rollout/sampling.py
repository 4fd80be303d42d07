"""One token for every row of a decode step, each with its own random number.

All rows are computed at once, but no row's result depends on another's: every operation works
along the vocabulary of one row. Axis suffixes: `_S` slots, `_V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(
    logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, uniform_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids (S,) and their log-probabilities (S,), float64.

    The probabilities are those of the distribution that was drawn from: softmax(logits / T) over
    the tokens that top-k (0: all) and top-p (1: all) leave. At temperature 0 the likeliest token
    is taken, and told with its probability at temperature 1. `uniform_S` is in [0, 1).
    """
    greedy_S = temperature_S == 0
    z_SV = logits_SV.double() / torch.where(greedy_S, 1.0, temperature_S)[:, None]
    cut = (~greedy_S & ((top_k_S > 0) | (top_p_S < 1))).nonzero()[:, 0]
    if len(cut):
        z_SV[cut] = _truncated(z_SV[cut], top_k_S[cut], top_p_S[cut])
    logp_SV = z_SV.log_softmax(-1)
    mass_SV = logp_SV.exp().cumsum(-1)
    total_S = mass_SV[:, -1].contiguous()
    token_S = torch.searchsorted(mass_SV, (uniform_S * total_S)[:, None], right=True)[:, 0]
    # The product may round up to the total: then the last token with any mass is meant.
    last_S = torch.searchsorted(mass_SV, total_S[:, None])[:, 0]
    token_S = torch.minimum(token_S, last_S).clamp(max=z_SV.shape[-1] - 1)  # also without numbers
    token_S = torch.where(greedy_S, z_SV.argmax(-1), token_S)
    return token_S, logp_SV.gather(-1, token_S[:, None])[:, 0]


def _truncated(z_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """Everything below the k best, then beyond the mass p of what is left, becomes -inf.

    Ties with the k-th best stay, as in vLLM; so does the token that reaches the mass p.
    """
    sorted_NV, order_NV = z_NV.sort(stable=True, dim=-1, descending=True)
    k_N = torch.where(top_k_N > 0, top_k_N, z_NV.shape[-1]).clamp(max=z_NV.shape[-1])
    least_N1 = sorted_NV.gather(-1, k_N[:, None] - 1)
    sorted_NV = sorted_NV.masked_fill(sorted_NV < least_N1, -torch.inf)
    chance_NV = sorted_NV.softmax(-1)
    before_NV = chance_NV.cumsum(-1) - chance_NV
    beyond_NV = (before_NV >= top_p_N[:, None]) & (top_p_N[:, None] < 1)
    beyond_NV[:, 0] = False
    sorted_NV = sorted_NV.masked_fill(beyond_NV, -torch.inf)
    return torch.empty_like(z_NV).scatter_(-1, order_NV, sorted_NV)
