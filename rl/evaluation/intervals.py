"""How sure a figure is: bootstrap by question, and two evaluations compared on the same questions.

Samples of one question are not independent of each other, so the question is what is drawn again.
Every figure is a ratio of two sums over questions (a mean is one with denominators of 1), which
keeps pooled rates (calls that succeed of all calls) and means of questions under one roof.

Axis suffixes: `_Q` questions, `_R` bootstrap replicates or permutations.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
PERMUTATIONS = 10_000
EXACT = 13  # questions that differ, up to which every permutation is looked at
_CHUNK = 1 << 22  # numbers in memory at once


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure over questions: sum(top_Q) / sum(bottom_Q).

    `strata_Q`: what each question belongs to (its benchmark); it is drawn again within that, so
    that benchmarks keep their sizes. `is_share`: every question's top lies between 0 and bottom.
    """

    top_Q: Floats
    bottom_Q: Floats
    strata_Q: tuple[Hashable, ...] = ()
    is_share: bool = False

    @property
    def value(self) -> float | None:
        bottom = self.bottom_Q.sum()
        return float(self.top_Q.sum() / bottom) if bottom else None


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its confidence interval; `n` questions bear on it. None: nothing to divide by.

    method: "bootstrap" (percentiles over questions), "wilson" (a share of exactly 0 or 1, which
    resampling can only repeat, as if each question were one trial), "none" (one question).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str


def ratio(
    top: Iterable[float],
    bottom: Iterable[float] | None = None,
    strata: Sequence[Hashable] = (),
    *,
    is_share: bool = False,
) -> Ratio:
    top_Q = np.asarray(list(top), dtype=np.float64)
    bottom_Q = np.ones_like(top_Q) if bottom is None else np.asarray(list(bottom), np.float64)
    if top_Q.shape != bottom_Q.shape or (strata and len(strata) != len(top_Q)):
        raise ValueError(f"{len(top_Q)} numerators, {len(bottom_Q)} denominators")
    return Ratio(top_Q, bottom_Q, tuple(strata), is_share)


def interval(
    figure: Ratio, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """The figure with its interval at `level`."""
    value, n = figure.value, int((figure.bottom_Q > 0).sum())
    if value is None:
        return Interval(None, None, None, n, "none")
    if figure.is_share and value in (0.0, 1.0):
        return Interval(value, *wilson(round(value * n), n, level), n, "wilson")
    if n < 2:
        return Interval(value, None, None, n, "none")
    replicates_R = _replicates(figure, seed, resamples)
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(replicates_R, [tail, 100 - tail])
    return Interval(value, float(low), float(high), n, "bootstrap")


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    z = NormalDist().inv_cdf(1 - (1 - level) / 2)
    centre = (hits + z * z / 2) / (n + z * z)
    half = z * np.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A on the questions that both have; `n` of them, `n_different` of which differ.

    p: two-sided, of the hypothesis that A and B are the same policy: sides are swapped question by
    question ("exact" over all swaps, or "permutation" over random ones).
    """

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    n_different: int
    method: str


def compare(
    a: Ratio,
    b: Ratio,
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> Comparison:
    """Paired comparison; question i of `a` is question i of `b`."""
    if a.top_Q.shape != b.top_Q.shape:
        raise ValueError(f"{len(a.top_Q)} and {len(b.top_Q)} questions cannot be paired")
    n = len(a.top_Q)
    differs_Q = (a.top_Q != b.top_Q) | (a.bottom_Q != b.bottom_Q)
    n_different = int(differs_Q.sum())
    if a.value is None or b.value is None:
        return Comparison(a.value, b.value, None, None, None, None, n, n_different, "none")
    difference = b.value - a.value
    drawn_R = _replicates(b, seed, resamples) - _replicates(a, seed, resamples)  # the same draws
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(drawn_R, [tail, 100 - tail])
    p, method = _swapped(a, b, differs_Q, abs(difference), seed, permutations)
    return Comparison(
        a.value, b.value, difference, float(low), float(high), p, n, n_different, method
    )


def _swapped(
    a: Ratio, b: Ratio, differs_Q: NDArray[np.bool_], observed: float, seed: int, permutations: int
) -> tuple[float, str]:
    """How often random sides give a difference at least as large, and how that was found."""
    top_Q = (b.top_Q - a.top_Q)[differs_Q]
    bottom_Q = (b.bottom_Q - a.bottom_Q)[differs_Q]
    m = len(top_Q)
    if not m:
        return 1.0, "exact"
    exact = m <= EXACT
    total = 1 << m if exact else permutations
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // m)
    as_large = 0
    for start in range(0, total, step):
        size = min(step, total - start)
        if exact:
            masks = (np.arange(start, start + size)[:, None] >> np.arange(m)) & 1
        else:
            masks = random.integers(0, 2, (size, m))
        with np.errstate(divide="ignore", invalid="ignore"):
            a_R = (a.top_Q.sum() + masks @ top_Q) / (a.bottom_Q.sum() + masks @ bottom_Q)
            b_R = (b.top_Q.sum() - masks @ top_Q) / (b.bottom_Q.sum() - masks @ bottom_Q)
        # Sums in another order differ in the last digits; such swaps are as large.
        as_large += int((np.abs(b_R - a_R) >= observed - 1e-12).sum())
    if exact:
        return as_large / total, "exact"
    return (1 + as_large) / (1 + total), "permutation"


def _replicates(figure: Ratio, seed: int, resamples: int) -> Floats:
    """The figure over `resamples` draws of its questions, with replacement, within strata."""
    random = np.random.default_rng(seed)
    strata = figure.strata_Q or (0,) * len(figure.top_Q)
    top_R, bottom_R = np.zeros(resamples), np.zeros(resamples)
    for stratum in dict.fromkeys(strata):
        at = np.array([i for i, s in enumerate(strata) if s == stratum])
        top_Q, bottom_Q = figure.top_Q[at], figure.bottom_Q[at]
        n = len(at)
        step = max(1, _CHUNK // n)
        for start in range(0, resamples, step):
            part = slice(start, min(start + step, resamples))
            drawn = random.multinomial(n, np.full(n, 1 / n), size=part.stop - part.start)
            top_R[part] += drawn @ top_Q
            bottom_R[part] += drawn @ bottom_Q
    with np.errstate(divide="ignore", invalid="ignore"):
        replicates_R: Floats = top_R / bottom_R
    return replicates_R
