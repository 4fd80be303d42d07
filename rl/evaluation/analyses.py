"""Do calls that succeed go with right answers; what does self-correction repair; at what cost.

The paper's Table 4 counts trajectories, pooled over questions. An easy question has calls that
succeed and answers that are right, so a part of that association is the question's doing: the same
is therefore computed within each question and put together (Cochran-Mantel-Haenszel), where only
questions with both kinds of trajectories and both kinds of answers have a say.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rl.evaluation.attempts import Attempt
from rl.evaluation.intervals import wilson
from shared.trajectory import End

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Table:
    """Trajectories with calls by whether every call succeeded and whether the answer is right."""

    ok_right: int
    ok_wrong: int
    failed_right: int
    failed_wrong: int

    @property
    def n(self) -> int:
        return self.ok_right + self.ok_wrong + self.failed_right + self.failed_wrong

    @property
    def rows(self) -> tuple[int, int]:
        return self.ok_right + self.ok_wrong, self.failed_right + self.failed_wrong

    @property
    def columns(self) -> tuple[int, int]:
        return self.ok_right + self.failed_right, self.ok_wrong + self.failed_wrong

    @property
    def determinant(self) -> int:
        return self.ok_right * self.failed_wrong - self.ok_wrong * self.failed_right


@dataclass(frozen=True, slots=True)
class Association:
    """Of a 2 x 2 table, without Yates' correction, as the paper has it; None where a margin is 0.

    p_right_ok, p_right_failed: P(right | every call ok), P(right | a call failed), with their 95 %
    Wilson intervals. odds_ratio: infinite where a cell is empty.
    """

    chi2: float | None
    p: float | None
    phi: float | None
    odds_ratio: float | None
    p_right_ok: tuple[float, float, float] | None
    p_right_failed: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class Stratified:
    """Cochran-Mantel-Haenszel over questions; None where no question has a say.

    n_informative: questions in which neither rows nor columns are all of one kind; n_trajectories:
    theirs. chi2 without continuity correction, one degree of freedom. odds_ratio: Mantel and
    Haenszel's, with the 95 % interval of Robins, Breslow and Greenland.
    """

    n_questions: int
    n_informative: int
    n_trajectories: int
    chi2: float | None
    p: float | None
    odds_ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class ToolSuccess:
    """`n_without_calls`: trajectories that made no call and are in no table."""

    table: Table
    pooled: Association
    by_question: Stratified
    n_without_calls: int


def tool_success(attempts: Iterable[Attempt], *, first_try: bool = False) -> ToolSuccess:
    """Do successful calls go with right answers?

    A trajectory failed if a call that stands failed, or with `first_try` if the first try of an
    action did, whatever self-correction made of it.
    """
    cells: dict[str, Counter[tuple[bool, bool]]] = defaultdict(Counter)
    without = 0
    for one in attempts:
        calls = [call for call in one.calls if first_try or call.stands]
        if not calls:
            without += 1
            continue
        ok = all(call.first_ok if first_try else call.ok for call in calls)
        cells[one.question][ok, one.right is True] += 1
    tables = [_table(counts) for counts in cells.values()]
    whole = _table(sum(cells.values(), Counter()))
    return ToolSuccess(whole, association(whole), stratified(tables), without)


def _table(counts: Counter[tuple[bool, bool]]) -> Table:
    return Table(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def association(table: Table) -> Association:
    """chi2 = n d^2 / (r1 r2 c1 c2), phi = d / sqrt(r1 r2 c1 c2), d = ad - bc."""
    (ok, failed), margins = table.rows, math.prod((*table.rows, *table.columns))
    share_ok = _share(table.ok_right, ok)
    share_failed = _share(table.failed_right, failed)
    if not margins:
        return Association(None, None, None, None, share_ok, share_failed)
    chi2 = table.n * table.determinant**2 / margins
    against = table.ok_wrong * table.failed_right
    odds = table.ok_right * table.failed_wrong / against if against else math.inf
    p = _tail(chi2)
    phi = table.determinant / math.sqrt(margins)
    return Association(chi2, p, phi, odds, share_ok, share_failed)


def _tail(chi2: float) -> float:
    """P(X >= chi2) of a chi-square with one degree of freedom."""
    return math.erfc(math.sqrt(chi2 / 2))


def _share(hits: int, n: int) -> tuple[float, float, float] | None:
    return (hits / n, *wilson(hits, n)) if n else None


def stratified(tables: Sequence[Table]) -> Stratified:
    """Cochran-Mantel-Haenszel over 2 x 2 tables."""
    useful = [t for t in tables if math.prod((*t.rows, *t.columns))]
    n_trajectories = sum(t.n for t in useful)
    if not useful:
        return Stratified(len(tables), 0, 0, None, None, None, None, None)
    excess = sum(t.ok_right - t.rows[0] * t.columns[0] / t.n for t in useful)
    variance = sum(math.prod((*t.rows, *t.columns)) / (t.n * t.n * (t.n - 1)) for t in useful)
    chi2 = excess**2 / variance
    odds, low, high = _common_odds(useful)
    return Stratified(
        len(tables), len(useful), n_trajectories, chi2, _tail(chi2),
        odds, low, high,
    )  # fmt: skip


def _common_odds(tables: Sequence[Table]) -> tuple[float, float | None, float | None]:
    """Mantel-Haenszel odds ratio and its interval (Robins, Breslow, Greenland 1986)."""
    r = [t.ok_right * t.failed_wrong / t.n for t in tables]
    s = [t.ok_wrong * t.failed_right / t.n for t in tables]
    total_r, total_s = sum(r), sum(s)
    if not total_r or not total_s:
        return (math.inf if total_r else 0.0), None, None
    p = [(t.ok_right + t.failed_wrong) / t.n for t in tables]
    q = [(t.ok_wrong + t.failed_right) / t.n for t in tables]

    def products(one: Sequence[float], other: Sequence[float]) -> float:
        return sum(x * y for x, y in zip(one, other, strict=True))

    variance = (
        products(p, r) / (2 * total_r**2)
        + (products(p, s) + products(q, r)) / (2 * total_r * total_s)
        + products(q, s) / (2 * total_s**2)
    )
    odds, half = total_r / total_s, _Z * math.sqrt(variance)
    return odds, odds * math.exp(-half), odds * math.exp(half)


# ---- correction funnel ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """Actions that came to one end of the funnel, and those whose trajectory is right."""

    n: int
    n_right: int


@dataclass(frozen=True, slots=True)
class Funnel:
    """What became of actions whose first try failed; each is counted once.

    corrected: by the try that succeeded (1 is the first regeneration). never: the error stands.
    abandoned: after a try was taken back, the policy took no action any more. untried: the error
    stands and was not tried again (no self-correction, or its budget was used up). first_ok: for
    comparison, actions whose first try succeeded.
    """

    n_actions: int
    first_ok: Ended
    failed: Ended
    corrected: dict[int, Ended]
    never: Ended
    abandoned: Ended
    untried: Ended

    @property
    def n_corrected(self) -> int:
        return sum(ended.n for ended in self.corrected.values())


def correction_funnel(attempts: Iterable[Attempt]) -> Funnel:
    """failed -> corrected at try 1..N -> answer right."""
    seen: Counter[tuple[str, int]] = Counter()
    right: Counter[tuple[str, int]] = Counter()
    for one in attempts:
        for call in one.calls:
            if call.first_ok and call.stands and len(call.outcomes) == 1:
                place = ("first_ok", 0)
            elif (at := call.corrected_at) is not None:
                place = ("corrected", at)
            elif not call.stands:
                place = ("abandoned", 0)
            else:
                place = ("never" if len(call.outcomes) > 1 else "untried", 0)
            seen[place] += 1
            right[place] += one.right is True

    def ended(name: str, at: int = 0) -> Ended:
        return Ended(seen[name, at], right[name, at])

    tries = sorted(at for name, at in seen if name == "corrected")
    first_ok = ended("first_ok")
    return Funnel(
        n_actions=seen.total(),
        first_ok=first_ok,
        failed=Ended(seen.total() - first_ok.n, right.total() - first_ok.n_right),
        corrected={at: ended("corrected", at) for at in tries},
        never=ended("never"),
        abandoned=ended("abandoned"),
        untried=ended("untried"),
    )


# ---- cost and accuracy ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CostPoint:
    """Accuracy if every attempt had had at most `tokens` sampled tokens, retries counted.

    `spent`: mean of what the attempts would have sampled within that budget.
    """

    tokens: int
    accuracy: float
    spent: float


def cost_accuracy(attempts: Sequence[Attempt], points: int = 24) -> list[CostPoint]:
    """Accuracy against a token budget: an attempt that needed more than that counts as wrong."""
    if not attempts:
        return []
    costs = sorted(one.n_generated for one in attempts)
    budgets = sorted({costs[min(len(costs) - 1, i * len(costs) // points)] for i in range(points)})
    budgets = sorted({*budgets, costs[-1]})
    return [
        CostPoint(
            tokens=budget,
            accuracy=sum(one.right is True and one.n_generated <= budget for one in attempts)
            / len(attempts),
            spent=sum(min(one.n_generated, budget) for one in attempts) / len(attempts),
        )
        for budget in budgets
    ]


def ends(attempts: Iterable[Attempt]) -> dict[End, int]:
    """How often each end came, commonest first."""
    return dict(Counter(one.end for one in attempts).most_common())
