"""Turning one row of logits into a token and its log-probabilities.

Every row is handled by itself with the request's own generator, so neighbours in a batch can
neither shift its random numbers nor its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of the sampler and of the stop rules (vLLM's names and meanings)."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is all
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # how many alternatives besides the sampled token


@dataclass(frozen=True)
class TokenLogprob:
    """The sampled token and the `top` best ones, (id, log-probability), best first.

    Log-probabilities are the model's own: before temperature, top-k and top-p.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def generator(seed: int | None, choice: int) -> np.random.Generator:
    """A stream of its own for each (seed, choice); without a seed, from the system's entropy."""
    if seed is None:
        return np.random.Generator(np.random.Philox())
    key = np.random.SeedSequence([seed % 2**64, choice])
    return np.random.Generator(np.random.Philox(key))


def sample(row: Row, params: SamplingParams, rng: np.random.Generator) -> int:
    """One token id; -inf entries are never chosen. Draws one number unless greedy."""
    if params.temperature == 0:
        return int(row.argmax())
    # Shifting first keeps the maximum at exp(0) however small the temperature is.
    scaled = (row - row.max()) / params.temperature
    if 0 < params.top_k < scaled.size:
        kth = np.partition(scaled, -params.top_k)[-params.top_k]
        scaled[scaled < kth] = -np.inf
    mass = np.exp(scaled)
    if params.top_p < 1:
        order = np.argsort(-mass, kind="stable")
        before = np.cumsum(mass[order]) - mass[order]
        mass[order[before >= params.top_p * mass.sum()]] = 0
    cumulative = mass.cumsum()
    total = cumulative[-1]
    token = int(cumulative.searchsorted(rng.random() * total, side="right"))
    # The product may round up to the total; then the last token with any mass is meant.
    return token if token < row.size else int(cumulative.searchsorted(total, side="left"))


def logprobs_of(row: Row, token: int, count: int) -> TokenLogprob:
    """Log-softmax of a row at `token` and at the `count` best finite entries."""
    shifted = row - row.max()
    normal = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-normal, kind="stable")[:count] if count else ()
    top = tuple((int(i), float(normal[i])) for i in best if np.isfinite(normal[i]))
    return TokenLogprob(token, float(normal[token]), top)
