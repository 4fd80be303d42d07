"""Grading: three values, the stage that decided, and model text that is never executed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shared.grading import Grader, Stage, Value, grade


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(zygotes=2) as opened:
        yield opened


EQUAL = [
    (r"\boxed{\frac12}", "0.5", Stage.RATIONAL),
    ("$1,234$", "1234", Stage.RATIONAL),
    (r"\frac{3}{6}", "1/2", Stage.RATIONAL),
    (r"1\frac12", "1.5", Stage.RATIONAL),
    ("-0.50", r"-\dfrac{1}{2}", Stage.RATIONAL),
    ("x = 3", "3", Stage.STRING),
    (r"\left( 1, 2 \right]", "(1,2]", Stage.STRING),
    (r"x \in [1,2]", "[1, 2]", Stage.STRING),
    (r"2\sqrt{2}", r"\sqrt 8", Stage.MATH_VERIFY),
    ("(x+1)^2", "x^2+2x+1", Stage.MATH_VERIFY),
    (r"\{1,2\}", r"\{2,1\}", Stage.MATH_VERIFY),
    (r"50\%", "0.5", Stage.MATH_VERIFY),
]

DIFFERENT = [
    ("1/3", "0.333"),
    ("2", "3"),
    ("-5", "5"),
    ("(1,2]", "[1,2)"),
    ("(1,2)", "(2,1)"),
    ("4", r"4\sqrt{2}"),
    ("3.14159", r"\pi"),
    ("3*x-1*y+13=0", "3x+4y+14=0"),
    ("x+1", "x-1"),
]


@pytest.mark.parametrize(("answer", "reference", "stage"), EQUAL)
def test_equal_either_way_round(grader: Grader, answer: str, reference: str, stage: Stage) -> None:
    for pair in ((answer, reference), (reference, answer)):
        found = grader.grade(*pair)
        assert (found.value, found.stage) == (Value.EQUAL, stage), found


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_either_way_round(grader: Grader, answer: str, reference: str) -> None:
    for pair in ((answer, reference), (reference, answer)):
        assert grader.grade(*pair).value is Value.DIFFERENT


@pytest.mark.parametrize(
    ("answer", "reference", "reason"),
    [
        ("1/2^{99}", "1/2^{98}", "rounding"),
        (r"2\pi r", r"2\pi R", "upper and lower"),
        ("x+1", "y+1", ""),
    ],
)
def test_what_math_verify_accepts_wrongly_is_not_equal(
    grader: Grader, answer: str, reference: str, reason: str
) -> None:
    """math-verify 0.9.0 says True for the first two (service.md 4a)."""
    found = grader.grade(answer, reference)
    assert found.value is not Value.EQUAL
    assert reason in found.reason


@pytest.mark.parametrize(
    "answer",
    [
        "5^(5^(5^(5^5)))",
        "9^{9^{9^9}}",
        "10^{100000}",
        "100000000!/99999999!",
        "9" * 200,
        "(" * 100 + "1" + ")" * 100,
        "1+" * 3000,
        "__import__('os').system('true')",
        "().__class__",
        "",
        r"\boxed{}",
        r"\frac{",
    ],
)
def test_what_must_not_or_cannot_be_evaluated_is_undecided_with_a_reason(
    grader: Grader, answer: str
) -> None:
    found = grader.grade(answer, "17")
    assert found.value is Value.UNDECIDED
    assert found.reason


def test_a_comparison_that_hangs_is_killed_and_undecided(
    grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever gets past the static caps meets the sandbox's clock, also inside one long C call."""
    monkeypatch.setattr("shared.grading.grader.TIMEOUT", 0.5)
    monkeypatch.setattr("shared.grading.exact.MAX_EXPONENT", 10**12)
    found = grader.grade("7^{10000000000}", "x+1")
    assert (found.value, found.stage) == (Value.UNDECIDED, Stage.MATH_VERIFY), found


def test_text_is_data_in_the_jail(grader: Grader) -> None:
    """A text that closes the literal it is sent in, if it were pasted, would print a verdict."""
    forged = 'x\'); print(\'{"value": "equal", "reason": ""}\'); (\''
    assert grader.grade(forged, "y").value is not Value.EQUAL
    assert grader.grade(forged.replace('"', ""), "y").value is not Value.EQUAL


def test_many_at_once_in_an_event_loop() -> None:
    async def main() -> list[Value]:
        async with Grader(zygotes=2) as g:
            pairs = [(f"{n}\\sqrt{{2}}", r"3\sqrt{2}") for n in range(2, 42)]
            return [found.value for found in await asyncio.gather(*(g.agrade(*p) for p in pairs))]

    values = asyncio.run(main())
    assert values == [Value.EQUAL if n == 3 else Value.DIFFERENT for n in range(2, 42)]


def test_the_module_function_and_its_record() -> None:
    found = grade(answer=r"\boxed{\frac12}", reference="0.5")
    assert found.value == "equal"
    assert found.version.startswith("1+math-verify-")
    assert found.duration >= 0


def test_the_module_function_works_in_a_forked_child_of_a_process_that_used_it() -> None:
    assert grade(r"\sqrt{8}", r"2\sqrt{2}").value is Value.EQUAL
    pid = os.fork()
    if pid == 0:
        os._exit(0 if grade(r"\sqrt{18}", r"3\sqrt{2}").value is Value.EQUAL else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert grade(r"\sqrt{8}", r"2\sqrt{2}").value is Value.EQUAL


def test_the_callers_process_never_loads_what_evaluates() -> None:
    code = (
        "import sys\nfrom shared.grading import grade, last_boxed\n"
        "assert grade(r'\\sqrt{8}', r'2\\sqrt{2}').value == 'equal'\n"
        "assert not {'sympy', 'math_verify', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
