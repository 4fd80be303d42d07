"""Log-probabilities and entropies of the loss tokens, a chunk of logits at a time.

Logits are what fills the memory: N tokens times the vocabulary, again for the gradient. Here they
exist only for tokens that carry loss (`MicroBatch.at_N` picks their hidden states; with a tool most
tokens carry none), for `chunk` tokens at a time, and are computed again in the backward pass.

Axis suffixes: `_N` loss tokens, `_H` hidden size, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """logp_N (float32, with gradient) and entropy_N in nats (float32, for the metrics, without)."""

    logp_N: Tensor
    entropy_N: Tensor


def token_logprobs(
    hidden_NH: Tensor,
    head: Callable[[Tensor], Tensor],
    labels_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> TokenLogprobs:
    """log softmax(head(h) / temperature)[label] of each token.

    `temperature`: the one that was sampled at, so that the ratio to the sampler's probabilities is
    of the same distribution. `head`: the model's own, (n, H) -> (n, V).
    """

    def part(hidden_nH: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        logits_nV = head(hidden_nH).float() / temperature  # half precision would lose the tail
        total_n = logits_nV.logsumexp(-1)
        logp_n = logits_nV.gather(-1, labels_n[:, None])[:, 0] - total_n
        with torch.no_grad():
            chances_nV = (logits_nV - total_n[:, None]).exp()
            entropy_n = total_n - (chances_nV * logits_nV).sum(-1)
        return logp_n, entropy_n

    # Without loss tokens there is one empty chunk, so that the backward pass reaches the model.
    starts = range(0, max(1, len(labels_N)), chunk)
    parts = [
        checkpoint(part, hidden_NH[i : i + chunk], labels_N[i : i + chunk], use_reentrant=False)
        for i in starts
    ]
    logps, entropies = zip(*parts, strict=True)
    return TokenLogprobs(torch.cat(logps), torch.cat(entropies))
