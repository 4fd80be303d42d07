"""Intervals cover as often as they say, and p-values are as small as they may be: by simulation.

The truth is known there, because the data come from it. Each has a control that ignores what the
method is for, and fails.
"""

from __future__ import annotations

import numpy as np
import pytest

from rl.evaluation.intervals import Interval, Ratio, compare, interval, ratio, wilson

SIMULATED, QUESTIONS, SAMPLES = 250, 60, 8


def test_a_bootstrap_by_question_covers() -> None:
    """95 % intervals hold the true accuracy about 95 % of the time.

    Questions differ in difficulty, so samples of one question agree with each other. Control: the
    same bootstrap over single samples, as if they were independent, covers far less often.
    """
    random = np.random.default_rng(1)
    covered = naive = 0
    for i in range(SIMULATED):
        chance_Q = random.beta(0.6, 0.6, QUESTIONS)  # its mean, the truth, is 0.5
        right_QK = random.random((QUESTIONS, SAMPLES)) < chance_Q[:, None]
        covered += _covers(interval(ratio(right_QK.mean(1)), seed=i, resamples=400), 0.5)
        naive += _covers(interval(ratio(right_QK.ravel()), seed=i, resamples=400), 0.5)
    assert 0.91 <= covered / SIMULATED <= 0.985
    assert naive / SIMULATED < 0.8


def test_a_pooled_rate_covers() -> None:
    """Calls that succeed of all calls: questions with more calls also succeed more rarely here."""
    random = np.random.default_rng(2)
    levels = np.array([[2, 0.95], [10, 0.6]])  # calls, chance of each
    truth = (levels[:, 0] @ levels[:, 1]) / levels[:, 0].sum()
    covered = 0
    for i in range(SIMULATED):
        kind_Q = random.integers(0, 2, QUESTIONS)
        calls_Q = levels[kind_Q, 0].astype(int)
        ok_Q = random.binomial(calls_Q, levels[kind_Q, 1])
        covered += _covers(interval(ratio(ok_Q, calls_Q), seed=i, resamples=400), truth)
    assert 0.90 <= covered / SIMULATED <= 0.985


def _covers(found: Interval, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


def test_benchmarks_keep_their_sizes() -> None:
    """Drawn within strata, a difference between benchmarks is no uncertainty.

    Control: without strata it is.
    """
    top, strata = [0.0] * 30 + [1.0] * 30, ["hard"] * 30 + ["easy"] * 30
    within = interval(ratio(top, strata=strata), seed=0)
    assert (within.low, within.high) == (0.5, 0.5)
    across = interval(ratio(top), seed=0)
    assert across.low is not None
    assert across.low < 0.45


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_nothing_or_all_is_not_certain(value: float) -> None:
    """The bootstrap can only repeat what it saw; Wilson's interval has a width."""
    found = interval(ratio([value] * 30, is_share=True), seed=0)
    assert found.method == "wilson"
    assert found.low is not None
    assert found.high is not None
    assert 0.1 < found.high - found.low < 0.13
    naive = interval(ratio([value] * 30), seed=0)
    assert naive.low == naive.high == value


def test_wilson() -> None:
    assert wilson(0, 30) == pytest.approx((0, 0.11351), abs=1e-5)
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)


def test_a_figure_without_denominator_has_no_value() -> None:
    assert interval(ratio([0, 0], [0, 0]), seed=0) == Interval(None, None, None, 0, "none")
    assert interval(ratio([3.0]), seed=0) == Interval(3.0, None, None, 1, "none")


def test_the_same_seed_gives_the_same_interval() -> None:
    figure = ratio(np.random.default_rng(0).random(50))
    assert interval(figure, seed=4) == interval(figure, seed=4)
    assert interval(figure, seed=4) != interval(figure, seed=5)


# ---- paired comparison ----------------------------------------------------------------------


def test_p_values_by_hand() -> None:
    """n questions, all of them better with B: two of the 2^n swaps are as extreme."""
    found = compare(ratio([0] * 5), ratio([1] * 5), seed=0)
    assert (found.p, found.method, found.difference) == (2 / 32, "exact", 1)
    found = compare(ratio([0] * 5 + [1] * 50), ratio([1] * 5 + [1] * 50), seed=0)
    assert (found.p, found.n_different) == (2 / 32, 5)  # where they agree there is nothing to swap
    assert compare(ratio([0, 1]), ratio([0, 1]), seed=0).p == 1
    found = compare(ratio([0, 1, 1]), ratio([1, 1, 0]), seed=0)
    assert (found.difference, found.p) == (0, 1)


def test_random_swaps_agree_with_all_swaps() -> None:
    """Fourteen questions that differ are compared by random swaps; all 2^14 give the truth."""
    random = np.random.default_rng(5)
    a_Q, b_Q = random.random(14), random.random(14) + 0.15
    found = compare(ratio(a_Q), ratio(b_Q), seed=0)
    assert found.method == "permutation"
    signs = 1 - 2 * ((np.arange(1 << 14)[:, None] >> np.arange(14)) & 1)
    exact = (np.abs(signs @ (b_Q - a_Q)) >= abs((b_Q - a_Q).sum()) - 1e-9).mean()
    assert found.p == pytest.approx(exact, abs=0.02)


def test_p_is_small_by_chance_as_rarely_as_it_says() -> None:
    """Two policies, equally good on questions of their own: p < 0.05 in about 5 % of cases.

    Control: swapping sample by sample, as if those of a question were independent, finds a
    difference several times as often.
    """
    random = np.random.default_rng(7)
    by_question, by_sample = [], []
    for seed in range(200):
        chance_QA, chance_QB = random.beta(0.6, 0.6, (2, 40))
        a_QK, b_QK = (random.random((40, 4)) < c[:, None] for c in (chance_QA, chance_QB))
        by_question.append(_p(a_QK.mean(1), b_QK.mean(1), seed))
        by_sample.append(_p(a_QK.ravel(), b_QK.ravel(), seed))
    assert 0.015 <= np.mean([p < 0.05 for p in by_question]) <= 0.09
    assert np.mean([p < 0.05 for p in by_sample]) > 0.2


def _p(a_Q: np.ndarray, b_Q: np.ndarray, seed: int) -> float:
    p = compare(ratio(a_Q), ratio(b_Q), seed=seed, resamples=20, permutations=400).p
    assert p is not None
    return p


def test_pairing_sees_what_the_spread_of_questions_hides() -> None:
    """B solves each question a little more often; the intervals of A and B overlap widely."""
    random = np.random.default_rng(8)
    a_Q = random.beta(0.6, 0.6, 80)
    b_Q = np.minimum(1, a_Q + 0.03)
    found = compare(ratio(a_Q), ratio(b_Q), seed=0)
    assert found.p is not None
    assert found.p < 0.001
    apart = [interval(ratio(x), seed=0) for x in (a_Q, b_Q)]
    assert apart[0].high is not None
    assert apart[1].low is not None
    assert apart[0].high > apart[1].low


def test_rates_are_compared_as_rates() -> None:
    """Pooled over calls: a question with many calls counts more, on either side."""
    a, b = ratio([1, 9], [1, 10]), ratio([1, 5], [1, 10])
    found = compare(a, b, seed=0)
    assert found.difference == pytest.approx(6 / 11 - 10 / 11)


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(ratio([1]), ratio([1, 0]), seed=0)
    nothing: Ratio = ratio([0], [0])
    assert compare(nothing, ratio([1]), seed=0).p is None
