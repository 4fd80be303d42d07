r"""Where an answer is found in a text, and the stages that need no reading."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.grading.exact import canonical, decide, normalise, rational
from shared.grading.extract import Boxes, Found, Part, Rules, Source, boxes, find, last_boxed

balanced = st.recursive(
    st.text(alphabet="ab1 +\n", max_size=5),
    lambda inner: st.lists(st.builds("{{{}}}".format, inner) | inner, max_size=3).map("".join),
    max_leaves=20,
)


@given(st.text(alphabet="ab {}\\$", max_size=30).filter(lambda t: "\\boxed" not in t), balanced)
def test_the_last_complete_box_is_found_after_anything(before: str, content: str) -> None:
    # An escape or an open brace right before the box would change what the box is.
    text = before.rstrip("\\") + " \\boxed{" + content + "} and so on"
    assert last_boxed(text) == content.strip()


@given(balanced, balanced)
def test_a_cut_box_does_not_hide_the_complete_one_before_it(first: str, second: str) -> None:
    assert last_boxed(f"\\boxed{{{first}}} then \\boxed{{{second}") == first.strip()


@given(st.text(alphabet="\\boxed{} ", max_size=60))
def test_any_text_is_scanned_without_error_and_the_answer_is_part_of_it(text: str) -> None:
    answer = last_boxed(text)
    assert answer is None or answer in text


def test_boxes_by_example() -> None:
    assert last_boxed("no box") is None
    assert last_boxed(r"\boxed{1} and \boxed{2}") == "2"
    assert last_boxed(r"\boxed{\text{a \boxed{b}}}") == r"\text{a \boxed{b}}"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\boxed{\frac{1}{2}") is None
    assert last_boxed(r"\boxed {7}") == "7"
    assert last_boxed(r"\fbox{7}") == "7"
    assert last_boxed(r"so $\boxed 5$.") == "5"
    assert boxes(r"\boxed{1}, \boxed{2}") == ["1", "2"]
    assert last_boxed("\\boxed{" * 20_000 + "}" * 20_000) is not None  # linear, not recursive


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"The answer is 4, no: \boxed{5}", Found("5", Source.BOXED)),
        ("The final answer is: 18 dollars. Good.", Found("18 dollars", Source.PHRASE)),
        ("**Final Answer:** $x=3$", Found("$x=3$", Source.PHRASE)),
        ("#### 1,234", Found("1,234", Source.PHRASE)),
        ("The answer is 3.14.", Found("3.14", Source.PHRASE)),
        ("We get 12 apples and 1,234 pears", Found("1,234", Source.LAST_NUMBER)),
        ("no number", None),
        (r"<think>\boxed{1}</think> The answer is 2.", Found("2", Source.PHRASE)),
        (r"<think>\boxed{1}</think> Done.", None),
    ],
)
def test_fallbacks_in_their_order(text: str, found: Found | None) -> None:
    assert find(text) == found


def test_the_rules_say_which_box_and_which_part() -> None:
    text = r"\boxed{1} or \boxed{2} or \boxed{1}"  # ONLY falls back to the last number
    chosen = {rule: find(text, Rules(boxes=rule)) for rule in Boxes}
    assert {rule: one.text for rule, one in chosen.items() if one is not None} == {
        Boxes.LAST: "1", Boxes.FIRST: "1", Boxes.ALL: "1, 2", Boxes.ONLY: "1",
    }  # fmt: skip
    assert find(text, Rules(sources=(Source.BOXED,), boxes=Boxes.ONLY)) is None
    thought = r"<think>\boxed{1}</think> Done."
    assert find(thought, Rules(part=Part.EITHER)) == Found("1", Source.BOXED)
    assert find("It is 7", Rules(sources=(Source.BOXED, Source.PHRASE))) is None


numbers = st.fractions(max_denominator=10**6)


@given(numbers)
def test_every_spelling_of_a_fraction_has_its_value(value: Fraction) -> None:
    sign = "-" if value < 0 else ""
    top, bottom = abs(value.numerator), value.denominator
    for spelling in (
        f"{sign}{top}/{bottom}",
        f"{sign}\\frac{{{top}}}{{{bottom}}}",
        f"\\dfrac{{{sign}{top}}}{{{bottom}}}",
        f" {sign} {top} / {bottom} ",
    ):
        assert rational(spelling) == value


@given(st.integers(-(10**30), 10**30), st.integers(0, 9))
def test_integers_decimals_and_grouped_digits(number: int, places: int) -> None:
    assert rational(str(number)) == number
    assert rational(f"{number:,}") == number
    scaled = Fraction(number, 10**places)
    digits = str(abs(number)).rjust(places + 1, "0")
    split = len(digits) - places
    text = ("-" if number < 0 else "") + digits[:split] + ("." + digits[split:] if places else "")
    assert rational(text) == scaled


@given(st.text(max_size=40))
def test_the_rational_parser_never_fails_and_agrees_with_python_where_both_read(text: str) -> None:
    value = rational(text)
    if value is not None:
        assert any(letter.isdigit() for letter in text)
        assert rational(str(value)) == value


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_stages_before_the_jail_never_fail_and_are_symmetric(one: str, other: str) -> None:
    pairs = [(normalise(one), normalise(other)), (normalise(other), normalise(one))]
    there, back = (decide(*pair) for pair in pairs)
    assert (there and there.value) == (back and back.value)


def test_what_is_no_rational() -> None:
    for text in ("", "1,23", "1/0", r"\frac{1}{0}", "1.2.3", "1e5", "٣", "--1", "1/2/3", "x",
                 "0x10", "1_000", "1 2", r"1\frac{-1}{2}", "9" * 401, "1, 234"):  # fmt: skip
        assert rational(text) is None, text


def test_normal_forms() -> None:
    assert normalise(r"so $\boxed{ 5 }$.") == "5"
    assert normalise(r"$$x$$") == "x"
    assert normalise(r"\( 7 \)") == "7"
    assert normalise("**12**.") == "12"
    assert normalise("$1$, $2$") == "$1$, $2$"
    assert canonical(r"\left( 1 ,\, 2 \right)") == "(1,2)"
    assert canonical("a b") != canonical("ab")
    assert canonical(r"\pi r") != canonical(r"\pir")
    assert canonical("1, 234") != canonical("1,234")
