"""What must hold of equality whatever is compared: hypothesis over random answers and random text.

The answers come from a grammar of their own, written as LaTeX; the reader is the one of the jail,
called in this process because what is drawn here is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shared.grading import opinion
from shared.grading.exact import decide as decide_cheaply
from shared.grading.exact import normalise
from shared.grading.inside import decide as decide_inside
from shared.grading.verdict import Decision, Stage, Value, undecided

SETTINGS = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.fixture(autouse=True, scope="module")
def without_math_verify() -> Iterator[None]:
    """Hostile text is shown to that library in the jail only, where it may hang."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opinion, "ask", lambda *_: undecided(Stage.MATH_VERIFY, "not asked"))
        yield


def compare(one: str, other: str) -> Decision:
    mine, gold = normalise(one), normalise(other)
    return decide_cheaply(mine, gold) or decide_inside(mine, gold)


whole = st.integers(0, 40).map(str)
numbers = (
    whole
    | st.builds(r"\frac{{{}}}{{{}}}".format, whole, st.integers(1, 12))
    | st.builds("{}.{:02d}".format, st.integers(0, 9), st.integers(0, 99))
    | st.builds(r"\sqrt{{{}}}".format, st.integers(2, 30))
    | st.just(r"\pi")
)


def longer(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return (
        st.builds("{} + {}".format, inner, inner)
        | st.builds("{} - {}".format, inner, inner)
        | st.builds(r"\left({}\right) \cdot {}".format, inner, numbers)
        | st.builds(r"\frac{{{}}}{{{}}}".format, inner, st.integers(1, 9))
        | st.builds("({})^{{{}}}".format, inner, st.integers(2, 3))
    )


scalars = st.recursive(numbers | st.sampled_from(["x", "y", "2x", "x^2"]), longer, max_leaves=5)
answers = (
    scalars
    | st.builds(r"({}, {})".format, scalars, scalars)
    | st.builds(r"\{{{}, {}\}}".format, scalars, scalars)
    | st.builds(r"\left[{}, {}\right)".format, numbers, numbers)
    | st.builds(r"x = {}".format, numbers)
    | st.builds(r"y = {}".format, scalars)
    | st.builds(r"x \le {}".format, numbers)
    | st.builds(r"{} \pm {}".format, numbers, numbers)
    | st.builds(r"\begin{{pmatrix}} {} \\ {} \end{{pmatrix}}".format, scalars, scalars)
    | st.builds(r"{}\text{{ cm}}".format, numbers)
    | st.builds(r"{}\%".format, numbers)
)
pieces = [*r"0123456789xyzein\{}()[]|^_+-*/=<>,;:.!%$ ", r"\frac", r"\sqrt", r"\text{", r"\pm",
          r"\le", r"\cup", r"\infty", r"\begin{pmatrix}", r"\end{pmatrix}", r"\log", r"\sin", "cm",
          r"\{", r"\}", r"\sum_{k=1}^", "or", r"\in"]  # fmt: skip
texts = st.text(max_size=40) | st.lists(st.sampled_from(pieces), max_size=20).map("".join)


@SETTINGS
@given(answers)
def test_every_answer_equals_itself_however_it_is_typeset(answer: str) -> None:
    """Reflexive, and invariant under what only changes how it looks."""
    for looks in (
        f"${answer}$.",
        rf"\( {answer} \)",
        rf"\boxed{{{answer}}}",
        rf"The answer is ${answer}$.",
        answer.replace(r"\frac", r"\dfrac"),
        answer.replace(r"\frac", r"\tfrac"),
        answer.replace(" ", "  "),
        answer.replace(r"\left", "").replace(r"\right", ""),
        answer.replace(" + ", "+").replace(" - ", r" -\,"),
        rf"\displaystyle {answer}",
    ):
        found = compare(looks, answer)
        assert found.value is Value.EQUAL, (looks, found)
        read = decide_inside(normalise(looks), answer)  # also where equal strings would do
        assert read.value is Value.EQUAL, (looks, read)


@SETTINGS
@given(answers, answers)
def test_equality_is_symmetric(one: str, other: str) -> None:
    assert compare(one, other).value is compare(other, one).value


@SETTINGS
@given(texts, texts | answers)
def test_any_text_gets_one_of_three_values_symmetrically_and_nothing_is_raised(
    one: str, other: str
) -> None:
    assert compare(one, other).value is compare(other, one).value


@SETTINGS
@given(scalars)
def test_what_is_one_more_is_different(scalar: str) -> None:
    for more in (f"{scalar} + 1", f"1 + ({scalar})", f"{scalar} - \\frac{{1}}{{10^{{30}}}}"):
        found = compare(scalar, more)
        assert found.value is Value.DIFFERENT, (more, found)


@SETTINGS
@given(scalars, scalars)
def test_sums_and_products_commute_and_differences_do_not(one: str, other: str) -> None:
    assert compare(f"{one} + ({other})", f"{other} + ({one})").value is Value.EQUAL
    assert compare(f"({one})({other})", f"({other}) \\cdot ({one})").value is Value.EQUAL
    assume(compare(one, other).value is Value.DIFFERENT)
    assert compare(f"{one} - ({other})", f"{other} - ({one})").value is not Value.EQUAL
    assert compare(f"({one}, {other})", f"({other}, {one})").value is Value.DIFFERENT
    assert compare(rf"\{{{one}, {other}\}}", rf"\{{{other}, {one}\}}").value is Value.EQUAL


@SETTINGS
@given(st.fractions(max_denominator=50), st.integers(1, 60))
def test_a_rounded_decimal_is_not_the_number_it_came_from(value: Fraction, places: int) -> None:
    """The policy on approximations: only a decimal that is exact is equal."""
    rounded = round(value, places)
    text = f"{rounded.numerator * 10**places // rounded.denominator}e-{places}"
    wanted = Value.EQUAL if rounded == value else Value.DIFFERENT
    assert compare(text, f"{value.numerator}/{value.denominator}").value is wanted
