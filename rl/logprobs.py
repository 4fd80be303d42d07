"""Log-probabilities and entropies of the loss tokens, a chunk of logits at a time.

Logits are what fills the memory: N tokens times the vocabulary, again for the gradient. Here they
exist only for tokens that carry loss (`MicroBatch.at_N` picks their hidden states; with a tool most
tokens carry none), and for no more than `chunk` tokens at a time: where there are more, those of
each chunk are computed again in the backward pass.

Axis suffixes: `_N` loss tokens, `_n` those of a chunk, `_H` hidden size, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

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
    fused: bool = False,
) -> TokenLogprobs:
    """log softmax(head(h) / temperature)[label] of each token.

    `temperature`: the one that was sampled at, so that the ratio to the sampler's probabilities is
    of the same distribution. `head`: the model's own, (n, H) -> (n, V). `fused`: what follows it is
    compiled, so that the logits are read as few times as possible.
    """

    def part(hidden_nH: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _LogSoftmaxAt.apply(  # type: ignore[no-untyped-call]
            head(hidden_nH), labels_n, temperature, fused
        )
        return found

    if len(labels_N) <= chunk:
        # One chunk is there at the end of the forward pass or at the beginning of the backward one,
        # which is the same time. Without loss tokens it is empty, and still reaches the model.
        return TokenLogprobs(*part(hidden_NH, labels_N))
    parts = [
        checkpoint(part, hidden_NH[i : i + chunk], labels_N[i : i + chunk], use_reentrant=False)
        for i in range(0, len(labels_N), chunk)
    ]
    logps, entropies = zip(*parts, strict=True)
    return TokenLogprobs(torch.cat(logps), torch.cat(entropies))


class _LogSoftmaxAt(torch.autograd.Function):
    """(n, V) logits, (n,) labels -> log softmax(logits / temperature) at the labels, and the
    entropy (no gradient). Keeps the probabilities and nothing else of that size."""

    @staticmethod
    def forward(
        ctx: Any, logits_nV: Tensor, labels_n: Tensor, temperature: float, fused: bool
    ) -> tuple[Tensor, Tensor]:
        look = _compiled(_look) if fused else _look
        logp_n, entropy_n, chances_nV = look(logits_nV, labels_n, temperature)
        ctx.save_for_backward(chances_nV, labels_n)
        ctx.temperature, ctx.fused, ctx.dtype = temperature, fused, logits_nV.dtype
        ctx.mark_non_differentiable(entropy_n)
        return logp_n, entropy_n

    @staticmethod
    def backward(ctx: Any, slope_n: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        chances_nV, labels_n = ctx.saved_tensors
        slope = _compiled(_slope) if ctx.fused else _slope
        found = slope(chances_nV, labels_n, slope_n, ctx.temperature, ctx.dtype)
        return found, None, None, None


def _look(logits_nV: Tensor, labels_n: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_n, entropy_n, chances_nV)."""
    logits_nV = logits_nV.float()  # half precision would lose the tail
    if temperature != 1.0:
        logits_nV = logits_nV / temperature
    total_n = logits_nV.logsumexp(-1)
    chances_nV = (logits_nV - total_n[:, None]).exp_()
    logp_n = logits_nV.gather(-1, labels_n[:, None])[:, 0] - total_n
    return logp_n, total_n - torch.linalg.vecdot(chances_nV, logits_nV), chances_nV


def _slope(
    chances_nV: Tensor, labels_n: Tensor, slope_n: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """d logp / d logits = (1[label] - p) / temperature."""
    slope_nV = chances_nV * -slope_n[:, None]
    slope_nV = slope_nV.scatter_add_(-1, labels_n[:, None], slope_n[:, None])
    return (slope_nV / temperature if temperature != 1.0 else slope_nV).to(dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For any number of tokens at once: it differs with every micro-batch."""
    made: Callable[..., Any] = torch.compile(function, dynamic=True)
    return made
