"""Estimators of one question's n attempts: avg@k, pass@k, pass^k, maj@k, best of k.

All are unbiased for k <= n: each is the mean over all subsets of k of the n attempts. So the same
attempts give every k, and nothing depends on the order in which they came.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from random import Random
from typing import Any, Literal

# Of an attempt without a call, which has no pass rate. A number is the rate that it is given;
# the authors' code gives it 1 (method.md 5.2).
NoCode = Literal["below-all-pass"] | float

SUBSETS = 100  # of attempts that `best_of_k` looks at, at most


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k is right, c of n being so: 1 - C(n-c, k) / C(n, k)."""
    _check(n, c, k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Chance that all of k are right: C(c, k) / C(n, k)."""
    _check(n, c, k)
    return math.comb(c, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[int], right: Sequence[bool], n: int, k: int) -> float:
    """Chance that the majority of k is right; a tie goes to each of its answers alike.

    `votes`: of each distinct answer (clusters of `shared.grading.consensus`), `right`: whether it
    is; n - sum(votes) attempts have no answer and no vote. Without any vote there is no answer.
    """
    silent = n - sum(votes)
    _check(n, n - silent, k)
    won = Fraction(0)
    for mine, is_right in zip(votes, right, strict=True):
        if is_right:
            rest = list(votes)
            rest.remove(mine)  # any with as many votes is as good
            won += sum(
                (math.comb(mine, a) * _led(rest, silent, k - a, a) for a in range(1, mine + 1)),
                Fraction(0),
            )
    return float(won / math.comb(n, k))


def _led(others: Sequence[int], silent: int, size: int, a: int) -> Fraction:
    """Ways to choose `size` more attempts with no other answer chosen more than `a` times.

    Each way counts 1 / (1 + answers that were also chosen `a` times): the leader's share of a tie.
    """
    if size < 0:
        return Fraction(0)
    ways = {(0, 0): 1}  # (chosen, tied) -> ways
    for votes in others:
        longer: dict[tuple[int, int], int] = {}
        for (chosen, tied), n in ways.items():
            for b in range(min(votes, a, size - chosen) + 1):
                key = (chosen + b, tied + (b == a))
                longer[key] = longer.get(key, 0) + n * math.comb(votes, b)
        ways = longer
    return sum(
        (
            Fraction(n * math.comb(silent, size - chosen), tied + 1)
            for (chosen, tied), n in ways.items()
        ),
        Fraction(0),
    )


# ---- best of N by self-rewarded pass rate ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the choice between attempts may look at: nothing that needs the reference.

    `cluster`: which answers are equal to each other; None where it has none.
    """

    n_calls: int
    n_ok: int
    cluster: int | None
    n_tokens: int


def choose(candidates: Sequence[Candidate], seed: int, no_code: NoCode = "below-all-pass") -> int:
    """The best by the share of its calls that succeed (method.md 5.2, 9.2 no. 23).

    Ties are broken by: having a boxed answer, then the majority among those still tied (no one is
    out where the majorities tie), then the fewest tokens, then the seed.
    """
    rates = [_rate(candidate, no_code) for candidate in candidates]
    return _choose(range(len(candidates)), candidates, rates, seed)


def _choose(
    among: Sequence[int],
    candidates: Sequence[Candidate],
    rates: Sequence[tuple[float, int]],
    seed: int,
) -> int:
    left = _best(among, rates.__getitem__)
    if len(left) > 1:
        left = _best(left, lambda i: candidates[i].cluster is not None)
    if len(left) > 1:
        votes = Counter(candidates[i].cluster for i in left)
        left = _best(left, lambda i: votes[candidates[i].cluster])
    if len(left) > 1:
        left = _best(left, lambda i: -candidates[i].n_tokens)
    return left[0] if len(left) == 1 else Random(seed).choice(left)


def _rate(candidate: Candidate, no_code: NoCode) -> tuple[float, int]:
    """Pass rate; the second number puts "no code" just below those whose calls all succeed."""
    if candidate.n_calls:
        return candidate.n_ok / candidate.n_calls, 1
    return (1.0, 0) if no_code == "below-all-pass" else (float(no_code), 1)


def _best(left: Sequence[int], score: Callable[[int], Any]) -> list[int]:
    scores = [score(i) for i in left]
    top = max(scores)
    return [i for i, found in zip(left, scores, strict=True) if found == top]


def best_of_k(
    candidates: Sequence[Candidate],
    right: Sequence[bool],
    k: int,
    seed: int,
    no_code: NoCode = "below-all-pass",
) -> float:
    """Chance that the chosen of k attempts is right: over all subsets, or SUBSETS random ones."""
    n = len(candidates)
    _check(n, n, k)
    random = Random(seed)
    subsets: Iterable[Sequence[int]]
    if math.comb(n, k) <= SUBSETS:
        subsets = list(combinations(range(n), k))
    else:
        subsets = [sorted(random.sample(range(n), k)) for _ in range(SUBSETS)]
    rates = [_rate(candidate, no_code) for candidate in candidates]
    hits = [right[_choose(s, candidates, rates, random.getrandbits(32))] for s in subsets]
    return sum(hits) / len(hits)


def _check(n: int, c: int, k: int) -> None:
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, c={c}, k={k}: 0 <= c <= n and 1 <= k <= n must hold")
