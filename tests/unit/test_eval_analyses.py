"""Analyses against published tables: THOR's Table 4, and Berkeley's admissions for the strata."""

from __future__ import annotations

import math

import pytest

from rl.evaluation.analyses import (
    Association,
    Table,
    association,
    correction_funnel,
    cost_accuracy,
    stratified,
    tool_success,
)
from rl.evaluation.attempts import Attempt, Tried
from shared.trajectory import End, Outcome

OK, ERROR, TIMEOUT = Outcome.OK, Outcome.MODEL_ERROR, Outcome.TIMEOUT
THOR = Table(ok_right=3950, ok_wrong=1549, failed_right=139, failed_wrong=318)


def made(
    question: str = "q",
    right: bool | None = True,
    *calls: Tried,
    n_generated: int = 10,
) -> Attempt:
    return Attempt(
        question, 0, right, None, "1", calls, End.ANSWERED, 10, n_generated, 0, None, None
    )


def test_the_papers_table() -> None:
    """chi2 = 336.3, p = 4.09e-75, phi 0.24, odds ratio 5.8, 71.8 % and 30.4 % (method.md 6.3).

    Control: with Yates' correction, which the paper did not use, it would be 334.4.
    """
    found = association(THOR)
    assert found.chi2 == pytest.approx(336.3, abs=0.05)
    assert found.p == pytest.approx(4.09e-75, rel=0.01)
    assert found.phi == pytest.approx(0.24, abs=0.005)
    assert found.odds_ratio == pytest.approx(5.8, abs=0.05)
    assert found.p_right_ok is not None
    assert found.p_right_ok[0] == pytest.approx(0.718, abs=5e-4)
    assert found.p_right_failed is not None
    assert found.p_right_failed[0] == pytest.approx(0.304, abs=5e-4)
    yates = THOR.n * (abs(THOR.determinant) - THOR.n / 2) ** 2
    yates /= math.prod((*THOR.rows, *THOR.columns))
    assert yates == pytest.approx(334.4, abs=0.05)


def test_a_margin_of_nothing_has_no_association() -> None:
    found = association(Table(5, 3, 0, 0))
    assert found == Association(None, None, None, None, found.p_right_ok, None)
    assert association(Table(5, 0, 0, 3)).odds_ratio == math.inf


BERKELEY = [  # admitted, rejected; men, then women (Bickel et al. 1975), by department
    (512, 313, 89, 19), (353, 207, 17, 8), (120, 205, 202, 391),
    (138, 279, 131, 244), (53, 138, 94, 299), (22, 351, 24, 317),
]  # fmt: skip


def test_stratified_against_r() -> None:
    """R: mantelhaen.test(UCBAdmissions, correct = FALSE): 1.5246, p 0.2169, common odds ratio
    0.9046968 (0.7719074 to 1.0603298). Control: pooled, the famous paradox, it is 1.84."""
    found = stratified([Table(*row) for row in BERKELEY])
    assert found.chi2 == pytest.approx(1.5246, abs=5e-5)
    assert found.p == pytest.approx(0.2169, abs=5e-5)
    assert found.odds_ratio == pytest.approx(0.9046968, abs=5e-7)
    assert found.low == pytest.approx(0.7719074, abs=5e-7)
    assert found.high == pytest.approx(1.0603298, abs=5e-7)
    pooled = association(Table(*(sum(column) for column in zip(*BERKELEY, strict=True))))
    assert pooled.odds_ratio == pytest.approx(1.84, abs=0.005)


def test_difficulty_alone_makes_a_pooled_association() -> None:
    """Within each question calls and answers have nothing to do with each other.

    Easy questions have good calls and right answers; pooled, that is a strong association, and
    stratified by question it is gone.
    """
    ok, failed = Tried((OK,)), Tried((ERROR,))

    def question(name: str, good: int, bad: int) -> list[Attempt]:
        """`good` to `bad` right answers, whatever the call did; calls ok in the same share."""
        return [
            made(name, right, call)
            for right, n in ((True, good), (False, bad))
            for call, m in ((ok, good), (failed, bad))
            for _ in range(n * m)
        ]

    found = tool_success([*question("easy", 9, 1), *question("hard", 1, 9)])
    assert found.pooled.odds_ratio is not None
    assert found.pooled.odds_ratio > 10
    assert found.by_question.odds_ratio == pytest.approx(1)
    assert found.by_question.p == pytest.approx(1)
    assert found.by_question.n_informative == 2


def test_questions_of_one_kind_have_no_say() -> None:
    ok = Tried((OK,))
    found = tool_success([made("a", True, ok), made("a", False, ok), made("b", True)])
    assert found.table == Table(1, 1, 0, 0)
    assert found.n_without_calls == 1
    assert found.by_question.n_questions == 1
    assert found.by_question.n_informative == 0
    assert found.by_question.odds_ratio is None


def test_undecided_is_not_right() -> None:
    found = tool_success([made("a", None, Tried((OK,)))])
    assert found.table == Table(0, 1, 0, 0)


def test_a_corrected_call_counts_as_it_stands_or_as_it_was_first() -> None:
    attempts = [made("a", True, Tried((ERROR, OK))), made("b", True, Tried((ERROR,), stands=False))]
    stands = tool_success(attempts)
    assert (stands.table, stands.n_without_calls) == (Table(1, 0, 0, 0), 1)
    assert tool_success(attempts, first_try=True).table == Table(0, 0, 2, 0)


def test_every_failed_action_comes_to_one_end_of_the_funnel() -> None:
    attempts = [
        made("a", True, Tried((OK,)), Tried((ERROR, OK))),
        made("b", False, Tried((ERROR, TIMEOUT, OK))),
        made("c", False, Tried((ERROR, ERROR, ERROR))),
        made("d", True, Tried((ERROR, ERROR), stands=False)),
        made("e", False, Tried((ERROR,))),
    ]
    found = correction_funnel(attempts)
    assert found.n_actions == 6
    assert (found.first_ok.n, found.first_ok.n_right) == (1, 1)
    assert (found.failed.n, found.failed.n_right) == (5, 2)
    assert {at: (e.n, e.n_right) for at, e in found.corrected.items()} == {1: (1, 1), 2: (1, 0)}
    assert (found.never.n, found.abandoned.n, found.untried.n) == (1, 1, 1)
    assert found.failed.n == (
        found.n_corrected + found.never.n + found.abandoned.n + found.untried.n
    )


def test_cost_and_accuracy() -> None:
    """Within a budget an attempt that needed more is wrong, and has used it up."""
    attempts = [made(n_generated=10), made(n_generated=20), made("b", False, n_generated=40)]
    found = {point.tokens: point for point in cost_accuracy(attempts)}
    assert found[10].accuracy == pytest.approx(1 / 3)
    assert found[10].spent == 10
    assert found[20].accuracy == pytest.approx(2 / 3)
    assert found[40].spent == pytest.approx(70 / 3)
    assert cost_accuracy([]) == []
