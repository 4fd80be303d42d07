"""The parsers of our own: boxed answers, rationals, caps."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from shared.grading.exact import canonical, normalise, rational, too_much
from shared.grading.extract import last_boxed

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
    assert last_boxed("\\boxed{" * 20_000 + "}" * 20_000) is not None  # linear, not recursive


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


def test_what_is_no_rational() -> None:
    for text in ("", "1,23", "1/0", r"\frac{1}{0}", "1.2.3", "1e5", "٣", "--1", "1/2/3", "x",
                 "0x10", "1_000", "1 2", r"1\frac{-1}{2}", "9" * 101):  # fmt: skip
        assert rational(text) is None, text


def test_normal_forms() -> None:
    assert normalise(r"so $\boxed{ 5 }$.") == "5"
    assert normalise(r"$$x$$") == "x"
    assert normalise(r"\( 7 \)") == "7"
    assert canonical(r"\left( 1 ,\, 2 \right)") == "(1,2)"
    assert canonical("a b") != canonical("ab")
    assert canonical(r"\pi r") != canonical(r"\pir")


def test_caps_say_why_and_let_ordinary_answers_pass() -> None:
    for text in (r"\frac{\sqrt{3}}{2}", "2^{10}", "10!", "x^{2}+y^{2}=r^{2}", "e^{x^2}", "1.5 m/s"):
        assert too_much(text) is None, text
    for text, word in (("2^{2^{2^2}}", "tower"), ("501!", "factorial"), ("a.b", "code")):
        assert word in (too_much(text) or "")
