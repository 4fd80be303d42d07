"""Losses as a weight per token: the policy loss of both levels, the NLL on positives, importance.

    minimise  L = L_epis + lambda L_step,  L_level = PG_level + alpha NLL_level     (method.md 4.1)

    PG  = sum_t w_t min-clipped(rho_t, A_t)        w_t from the aggregation
    NLL = sum_t v_t (-log pi_t)                    v_t = 1 / all tokens of rows with A > 0

Every choice of normalisation is a weight of the token, and nothing else: `row_weights` is the only
place that divides. Its denominators are counts of the whole optimizer window, over all its
micro-batches and all ranks, known before the first backward pass. So a micro-batch contributes a
plain sum, the sum over any split of the window is the whole, and a mean of means cannot creep in.
(An engine that averages gradients over ranks must be given world_size times this loss.)

The levels are normalised separately: in one token mean (the authors' code, `levels="mixed"`) the
step level counts by its share of the tokens. Axis suffix: `_N` the tokens of a micro-batch that
carry loss, rows one after another. Log-probabilities are of the policy at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal[
    "token-mean",  # 1 / tokens: every token alike (DAPO; the authors' code)
    "seq-mean-token-mean",  # 1 / (sequences * |s|): every sequence alike (GRPO; the paper)
    "seq-mean-token-sum",  # 1 / sequences: long sequences weigh more
    "seq-mean-token-sum-norm",  # 1 / (sequences * L), L constant (Dr. GRPO)
]

_LOG_RATIO_LIMIT = 20.0  # exp stays finite, so that a clipped token cannot bring in inf * 0 = NaN


class Level(StrEnum):
    EPISODE = "episode"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The choices of method.md 9.2 no. 1 to 3. Defaults: the paper's, with dual clip and TIS.

    ratio: "token" as in the code; "sequence": the geometric mean over the row's tokens (GSPO).
    eps_low, eps_high, dual_clip: clip range 1 - eps_low .. 1 + eps_high; for A < 0 the loss is at
        most dual_clip * |A| (None: off; the paper does not mention it, the authors use 3).
    aggregation, length: how tokens are weighed within a level; `length` is L of the last kind.
    levels: "separate" (the paper's sum of two losses) or "mixed" (the authors' code).
    step_weight: lambda. nll_weight: alpha.
    importance: correction for a sampler whose probabilities are not the trainer's (TIS), per
        "token", per "sequence" (product), or "geometric" (mean); "off" without.
    importance_cap, beyond: weights above the cap become the cap ("truncate") or zero ("mask").
    """

    ratio: Literal["token", "sequence"] = "token"
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = 3.0
    aggregation: Aggregation = "seq-mean-token-mean"
    length: int = 1
    levels: Literal["separate", "mixed"] = "separate"
    step_weight: float = 1.0
    nll_weight: float = 0.01
    importance: Literal["off", "token", "sequence", "geometric"] = "token"
    importance_cap: float = 2.0
    beyond: Literal["truncate", "mask"] = "truncate"


# ---- weights --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """What a window holds: loss tokens, rows that have any, loss tokens of rows with A > 0.

    Added over rows, and by one all-reduce over ranks.
    """

    tokens: int = 0
    sequences: int = 0
    positive: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.tokens + other.tokens,
            self.sequences + other.sequences,
            self.positive + other.positive,
        )


def count(rows: Iterable[tuple[Level, int, float]]) -> dict[Level, Counts]:
    """Counts of each level over (level, loss tokens, advantage) of rows."""
    counts = dict.fromkeys(Level, Counts())
    for level, tokens, advantage in rows:
        counts[level] += Counts(tokens, int(tokens > 0), tokens if advantage > 0 else 0)
    return counts


def token_weight(tokens: int, window: Counts, aggregation: Aggregation, length: int = 1) -> float:
    """w of each of a row's loss tokens (`tokens` of them), by the counts of the window."""
    if tokens == 0:
        return 0.0
    match aggregation:
        case "token-mean":
            return 1 / window.tokens
        case "seq-mean-token-mean":
            return 1 / (window.sequences * tokens)
        case "seq-mean-token-sum":
            return 1 / window.sequences
        case "seq-mean-token-sum-norm":
            return 1 / (window.sequences * length)


def row_weights(
    level: Level,
    tokens: int,
    advantage: float,
    window: Mapping[Level, Counts],
    settings: LossSettings,
) -> tuple[float, float]:
    """(w, v): what each loss token of a row weighs in the policy loss and in the NLL."""
    if tokens == 0:
        return 0.0, 0.0
    mixed = settings.levels == "mixed"
    counts = sum(window.values(), Counts()) if mixed else window[level]
    scale = settings.step_weight if level is Level.STEP else 1.0
    policy = token_weight(tokens, counts, settings.aggregation, settings.length)
    nll = settings.nll_weight / counts.positive if advantage > 0 else 0.0
    return scale * policy, scale * nll


# ---- per token ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """loss_N with gradient; ratio_N, clipped_N and dual_clipped_N (bool) for the metrics."""

    loss_N: Tensor
    ratio_N: Tensor
    clipped_N: Tensor
    dual_clipped_N: Tensor


def policy_loss(
    logp_N: Tensor, old_N: Tensor, advantage_N: Tensor, row_N: Tensor, settings: LossSettings
) -> TokenLoss:
    """-min(rho A, clip(rho) A), with the dual clip for A < 0; rho = pi / pi_old.

    `row_N`: the row (0, 1, ...) of each token; needed for the ratio of a sequence.
    """
    log_ratio_N = logp_N - old_N
    if settings.ratio == "sequence":
        log_ratio_N = _row_sum(log_ratio_N, row_N) / _row_sum(torch.ones_like(logp_N), row_N)
    ratio_N = log_ratio_N.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    plain_N = -advantage_N * ratio_N
    inside_N = -advantage_N * ratio_N.clamp(1 - settings.eps_low, 1 + settings.eps_high)
    loss_N = torch.maximum(plain_N, inside_N)
    dual_N = torch.zeros_like(loss_N, dtype=torch.bool)
    if settings.dual_clip is not None:
        bound_N = -advantage_N * settings.dual_clip
        dual_N = (advantage_N < 0) & (loss_N > bound_N)
        loss_N = torch.where(dual_N, bound_N, loss_N)
    return TokenLoss(loss_N, ratio_N.detach(), inside_N > plain_N, dual_N)


def importance(old_N: Tensor, sampler_N: Tensor, row_N: Tensor, settings: LossSettings) -> Tensor:
    """Weights pi_old / pi_sampler, cut at the cap; without gradient. Exactly 1 where they agree.

    The product over a sequence grows with its length (a mean of 0.012 nats is a factor of 3.3 at
    100 tokens): as "sequence", the cap hits long answers first.
    """
    log_N = (old_N - sampler_N).detach()
    if settings.importance == "off":
        return torch.ones_like(log_N)
    if settings.importance != "token":
        tokens_N = _row_sum(torch.ones_like(log_N), row_N)
        log_N = _row_sum(log_N, row_N)
        if settings.importance == "geometric":
            log_N = log_N / tokens_N
    weight_N = log_N.clamp(max=_LOG_RATIO_LIMIT).exp()
    over_N = weight_N > settings.importance_cap
    return weight_N.masked_fill(
        over_N, 0.0 if settings.beyond == "mask" else settings.importance_cap
    )


@dataclass(frozen=True, slots=True)
class KL:
    """Estimates of KL(pi || other) per token, for tokens sampled from pi. As metrics; not a loss.

    With d = log other - log pi: k1 = -d and k3 = e^d - 1 - d are unbiased, k3 never negative;
    k2 = d^2 / 2 is biased, yet it is the one whose gradient is that of KL(pi || other). k3 has the
    gradient of KL(other || pi), and k1's is zero in expectation.
    """

    k1_N: Tensor
    k2_N: Tensor
    k3_N: Tensor


def kl(logp_N: Tensor, other_N: Tensor) -> KL:
    d_N = other_N - logp_N
    return KL(-d_N, d_N**2 / 2, d_N.exp() - 1 - d_N)


def _row_sum(value_N: Tensor, row_N: Tensor) -> Tensor:
    """Sum over each token's row, given to every token of it."""
    rows = int(row_N.max()) + 1 if len(row_N) else 0
    return value_N.new_zeros(rows).index_add(0, row_N, value_N)[row_N]


# ---- a micro-batch --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LossBatch:
    """What the loss needs beside the policy's log-probabilities; all (N,) and without gradient.

    `old_N`: log pi_old by the trainer, `sampler_N` by the engine that sampled.
    """

    old_N: Tensor
    sampler_N: Tensor
    advantage_N: Tensor
    policy_weight_N: Tensor
    nll_weight_N: Tensor
    row_N: Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """`total` has the gradient; `policy` and `nll` are its parts. All are sums, to be added up.

    `logp_N` and `importance_N` are for the metrics, without gradient.
    """

    total: Tensor
    policy: Tensor
    nll: Tensor
    tokens: TokenLoss
    logp_N: Tensor
    importance_N: Tensor


def objective(logp_N: Tensor, batch: LossBatch, settings: LossSettings) -> Loss:
    """A micro-batch's share of L; importance weighs the policy loss only.

    Without loss tokens it is 0, and the backward pass still runs, as the other ranks expect.
    """
    tokens = policy_loss(logp_N, batch.old_N, batch.advantage_N, batch.row_N, settings)
    weight_N = importance(batch.old_N, batch.sampler_N, batch.row_N, settings)
    policy = (batch.policy_weight_N * weight_N * tokens.loss_N).sum()
    nll = -(batch.nll_weight_N * logp_N).sum()
    return Loss(policy + nll, policy.detach(), nll.detach(), tokens, logp_N.detach(), weight_N)
