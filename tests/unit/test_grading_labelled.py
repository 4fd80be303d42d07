"""The grader against labels that were written by hand, before and apart from its rules.

Accepted means counted as right: undecided is not accepted. A false positive is a wrong training
label or a wrong reward, so there is none; a false negative only loses a right answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from shared.grading import Grade, Grader, Value
from tests.labelled import Pair, counted, grades, load, math_verify_accepts, score

# Math-Verify is slow, and hangs at some: here it sees every tenth pair, in bench/ all of them.
SAMPLE = slice(9, None, 10)
CATEGORIES = """integer decimal fraction mixed_number percent currency unit degree
thousands_separator scientific_notation text multiple_choice ratio base set list tuple interval
union inequality matrix assignment equation_of_a_curve surd trigonometry logarithm exponential
complex polynomial factorial_and_binomial repeating_decimal plus_or_minus boxed several_boxes
without_a_box thinking"""

Judged = list[tuple[Pair, Grade]]


@pytest.fixture(scope="module")
def judged() -> Judged:
    pairs = counted()

    async def all_of_them() -> list[Grade]:
        async with Grader() as grader:
            return await grades(grader, pairs)

    return list(zip(pairs, asyncio.run(all_of_them()), strict=True))


def test_the_set_is_large_balanced_and_covers_every_kind_of_answer() -> None:
    """A grader that always says yes, or always no, scores about one half."""
    pairs = counted()
    assert len(pairs) >= 450
    assert 0.45 <= sum(not p.equal for p in pairs) / len(pairs) <= 0.55
    by_label = Counter((p.category, p.equal) for p in pairs)
    for name in CATEGORIES.split():
        category = name.replace("_", " ")
        assert by_label[category, True] >= 4, category
        assert by_label[category, False] >= 4, category
    assert all(p.reason and p.answer and p.reference for p in load())
    assert len({(p.answer, p.reference) for p in load()}) == len(load()), "no pair counts twice"


def test_no_wrong_answer_is_accepted(judged: Judged) -> None:
    wrong = [_said(p, g) for p, g in judged if g.value is Value.EQUAL and not p.equal]
    assert not wrong, "\n".join(wrong)


def test_at_least_97_percent_of_the_labels_are_met(judged: Judged) -> None:
    found = score(*zip(*((p, g.value is Value.EQUAL) for p, g in judged), strict=True))["all"]
    lost = [_said(p, g) for p, g in judged if g.value is not Value.EQUAL and p.equal]
    assert found.accuracy >= 0.97, f"{found}\n" + "\n".join(lost)


def test_a_right_answer_is_seldom_called_wrong(judged: Judged) -> None:
    """Where it cannot tell it should say so: undecided can be looked at again, different cannot."""
    wrong = [_said(p, g) for p, g in judged if g.value is Value.DIFFERENT and p.equal]
    assert len(wrong) <= 0.02 * len(judged), "\n".join(wrong)


def test_it_is_better_than_math_verify_alone_both_in_accuracy_and_in_false_positives(
    judged: Judged,
) -> None:
    sample = judged[SAMPLE]
    pairs = [pair for pair, _ in sample]
    ours = score(pairs, [grade.value is Value.EQUAL for _, grade in sample])["all"]
    theirs = score(pairs, math_verify_accepts(pairs, 3.0))["all"]
    assert theirs.accuracy > 0.8, "the peer is set up as it should be"
    assert ours.accuracy > theirs.accuracy
    assert ours.false_positives < theirs.false_positives


def _said(pair: Pair, grade: Grade) -> str:
    return (
        f"[{pair.category}] {pair.answer!r} | {pair.reference!r}: {grade.value} by {grade.stage}"
        f" ({grade.reason}); the label's reason: {pair.reason}"
    )
