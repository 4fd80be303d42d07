"""Estimators of rl/evaluation/metrics.py: each equals the mean over all subsets of k attempts.

The reference is that mean, by enumeration; the hand values are those of trainer.md 4.3 J.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.evaluation.metrics import (
    SUBSETS,
    Candidate,
    NoCode,
    best_of_k,
    choose,
    maj_at_k,
    pass_at_k,
    pass_hat_k,
)


def test_hand_values() -> None:
    assert pass_at_k(16, 4, 4) == pytest.approx(0.728022, abs=5e-7)
    assert pass_hat_k(16, 4, 4) == pytest.approx(1 / 1820)
    assert pass_at_k(4, 4, 1) == 1
    assert pass_at_k(4, 0, 4) == 0


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(n: int) -> None:
    """Control: the plug-in 1 - (1 - c/n)^k, which is biased, is something else."""
    plug_in_differs = False
    for c, k in product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        subsets = list(combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
        assert pass_hat_k(n, c, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))
        plug_in_differs |= abs(pass_at_k(n, c, k) - (1 - (1 - c / n) ** k)) > 1e-3
    assert plug_in_differs or n == 1


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="must hold"):
        pass_at_k(n, c, k)


def majority_by_enumeration(answers: list[int | None], right: dict[int, bool], k: int) -> float:
    total, subsets = 0.0, list(combinations(range(len(answers)), k))
    for subset in subsets:
        votes = Counter(a for i in subset if (a := answers[i]) is not None)
        leaders = [a for a, n in votes.items() if n == max(votes.values())]
        total += sum(right[a] for a in leaders) / len(leaders) if leaders else 0
    return total / len(subsets)


@given(
    answers=st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=1, max_size=8),
    right=st.lists(st.booleans(), min_size=4, max_size=4),
    data=st.data(),
)
def test_majority_of_k_with_ties(
    answers: list[int | None], right: list[bool], data: st.DataObject
) -> None:
    """Answers that tie share alike; attempts without an answer have no vote but are drawn."""
    k = data.draw(st.integers(1, len(answers)))
    votes = Counter(a for a in answers if a is not None)
    found = maj_at_k(list(votes.values()), [right[a] for a in votes], len(answers), k)
    assert found == pytest.approx(
        majority_by_enumeration(answers, dict(enumerate(right)), k), abs=1e-12
    )


def test_majority_hand_values() -> None:
    assert maj_at_k([2, 2], [True, False], 4, 4) == 0.5  # a tie
    assert maj_at_k([3, 1], [True, False], 4, 4) == 1
    assert maj_at_k([3, 1], [True, False], 4, 1) == 0.75  # one draw: avg@1
    assert maj_at_k([], [], 4, 4) == 0  # nobody answered
    assert maj_at_k([1], [True], 64, 64) == 1


# ---- best of N ------------------------------------------------------------------------------

ALL_PASS = Candidate(n_calls=2, n_ok=2, cluster=0, n_tokens=100)


@pytest.mark.parametrize(
    ("why", "better", "worse"),
    [
        ("pass rate", Candidate(2, 2, None, 900), Candidate(2, 1, 0, 10)),
        ("a rate, not a count", Candidate(1, 1, 0, 10), Candidate(9, 8, 0, 10)),
        ("a boxed answer", Candidate(1, 1, 0, 900), Candidate(1, 1, None, 10)),
        ("fewest tokens", Candidate(1, 1, 0, 10), Candidate(1, 1, 1, 11)),
        ("code that passes over none", Candidate(1, 1, 0, 900), Candidate(0, 0, 0, 10)),
        ("none over code that fails", Candidate(0, 0, 0, 900), Candidate(3, 2, 0, 10)),
    ],
)
def test_best_of_two(why: str, better: Candidate, worse: Candidate) -> None:
    """Each rule decides, in either order and with any seed."""
    for seed in range(8):
        assert choose([better, worse], seed) == 0, why
        assert choose([worse, better], seed) == 1, why


def test_the_majority_among_those_still_tied_decides_before_tokens() -> None:
    """The vote is among the candidates that are left: one of a lower pass rate has none."""
    tied = [Candidate(1, 1, 7, 500), Candidate(1, 1, 7, 600), Candidate(1, 1, 8, 10)]
    failed = [Candidate(1, 0, 8, 10)] * 5
    assert choose([*tied, *failed], seed=0) == 0


def test_the_seed_decides_what_nothing_else_does() -> None:
    """Same seed, same choice; over seeds, every one that ties is chosen, and no other."""
    candidates = [ALL_PASS, ALL_PASS, Candidate(2, 1, 0, 1), ALL_PASS]
    chosen = Counter(choose(candidates, seed) for seed in range(300))
    assert set(chosen) == {0, 1, 3}
    assert min(chosen.values()) > 60
    assert choose(candidates, 5) == choose(candidates, 5)


@pytest.mark.parametrize(("no_code", "chosen"), [(1.0, 1), (0.0, 0), (0.6, 0), (0.9, 1)])
def test_what_an_attempt_without_code_is_worth_is_a_setting(no_code: NoCode, chosen: int) -> None:
    """1 is the authors' code, where answering without the tool beats a call that failed."""
    candidates = [Candidate(4, 3, 0, 50), Candidate(0, 0, 0, 10)]
    assert choose(candidates, 0, no_code) == chosen


def test_without_any_code_the_other_rules_decide() -> None:
    assert choose([Candidate(0, 0, None, 1), Candidate(0, 0, 3, 90)], 0) == 1


def test_best_of_k_is_the_mean_over_subsets() -> None:
    candidates = [Candidate(1, 1, 0, 5), Candidate(1, 0, 1, 5), Candidate(1, 0, 2, 4)]
    right = [True, False, False]
    assert best_of_k(candidates, right, 1, seed=0) == pytest.approx(1 / 3)
    assert best_of_k(candidates, right, 2, seed=0) == pytest.approx(2 / 3)  # subsets with the first
    assert best_of_k(candidates, right, 3, seed=0) == 1


def test_best_of_k_of_many_attempts_looks_at_a_sample_of_subsets() -> None:
    """The estimate from random subsets is near the truth, k/n here, and the same each time."""
    n, k = 24, 6
    assert math.comb(n, k) > SUBSETS
    candidates = [ALL_PASS] + [Candidate(1, 0, 1, 5)] * (n - 1)
    right = [True] + [False] * (n - 1)
    found = best_of_k(candidates, right, k, seed=3)
    assert found == pytest.approx(k / n, abs=0.13)
    assert found == best_of_k(candidates, right, k, seed=3)
