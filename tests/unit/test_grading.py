"""Grading as callers see it: three values, stages, the jail, and text that is never executed."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from shared.grading import Grader, Stage, Value, grade, jail


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(zygotes=1) as opened:
        yield opened


STAGES = [
    (r"\left( 1, 2 \right]", "(1,2]", Value.EQUAL, Stage.STRING),
    (r"\boxed{\frac12}", "0.5", Value.EQUAL, Stage.RATIONAL),
    ("1/3", "0.333", Value.DIFFERENT, Stage.RATIONAL),
    ("x = 3", "3", Value.EQUAL, Stage.STRUCTURE),
    (r"\{1,2\}", r"\{2,1\}", Value.EQUAL, Stage.STRUCTURE),
    (r"2\sqrt{2}", r"\sqrt 8", Value.EQUAL, Stage.SYMBOLIC),
    (r"\sin^2 t", r"1-\cos^2 t", Value.EQUAL, Stage.NUMERIC),
    (r"\sqrt{x^2}", "x", Value.DIFFERENT, Stage.NUMERIC),
    (r"\int_0^1 x\,dx", r"\int_0^1 x^2\,dx", Value.DIFFERENT, Stage.MATH_VERIFY),
    (r"\begin{cases} 1 \end", "3", Value.UNDECIDED, Stage.MATH_VERIFY),
    ("9" * 5000, "9", Value.UNDECIDED, Stage.CAPS),
]


@pytest.mark.parametrize(("answer", "reference", "value", "stage"), STAGES)
def test_every_stage_decides_what_is_its_own_either_way_round(
    grader: Grader, answer: str, reference: str, value: Value, stage: Stage
) -> None:
    for pair in ((answer, reference), (reference, answer)):
        found = grader.grade(*pair)
        assert (found.value, found.stage) == (value, stage), found


@pytest.mark.parametrize(
    "answer",
    [
        "5^(5^(5^(5^5)))",
        "9^{9^{9^9}}",
        "10^{1000000}",
        "100000000!/99999999!",
        "((3!)!)!",
        "9" * 2000,
        "(" * 300 + "1" + ")" * 300,
        "{" * 1500 + "1" + "}" * 1500,
        "-" * 3000 + "1",
        "1+" * 3000,
        r"\pm 1" * 50,
        r"\frac{" * 500 + "1" + "}{2}" * 500,
        r"\binom{1000000}{500000}",
        "__import__('os').system('true')",
        "().__class__.__bases__",
        "",
        r"\boxed{}",
        r"\frac{",
        "\\",
        "\x00\ud800",
    ],
)
def test_what_must_not_or_cannot_be_evaluated_is_undecided_with_a_reason(
    grader: Grader, answer: str
) -> None:
    found = grader.grade(answer, "17")
    assert found.value is not Value.EQUAL
    assert found.reason


def test_a_pair_that_hangs_is_killed_and_those_that_share_its_run_are_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hang is planted in the jail's own module: nothing that a text says can make one today.

    One zygote, so all pairs wait together and go into one run.
    """
    planted = jail.program([]).replace(
        "main(",
        "import shared.grading.inside as inside\n"
        "decide = inside.decide\n"
        "def hang(answer, reference):\n"
        "    while answer == 'x+hang': pass\n"
        "    return decide(answer, reference)\n"
        "inside.decide = hang\n"
        "main(",
    )
    whole = jail.program
    head = planted.partition("main(")[0]
    monkeypatch.setattr(jail, "program", lambda pairs: head + whole(pairs))
    answers = ["x+1", "x+hang", "1+x", "x+2"]

    async def main() -> list[tuple[Value, str]]:
        async with Grader(zygotes=1, budget=4.0) as g:
            found = await asyncio.gather(*(g.agrade(a, "x+1+0") for a in answers))
            return [(one.value, one.reason) for one in found]

    values = asyncio.run(main())
    assert [value for value, _ in values] == [
        Value.EQUAL, Value.UNDECIDED, Value.EQUAL, Value.DIFFERENT,
    ]  # fmt: skip
    assert "not decided within 4 s" in values[1][1]


def test_text_is_data_in_the_jail(grader: Grader) -> None:
    """A text that closes the literal it is sent in, if it were pasted, would print a verdict."""
    forged = 'x\'); print(\'["equal", "symbolic", ""]\'); (\''
    for text in (forged, forged.replace('"', ""), forged.replace("'", '"'), forged + "\\"):
        assert grader.grade(text, "y").value is not Value.EQUAL


def test_many_at_once_in_an_event_loop_and_in_threads(grader: Grader) -> None:
    pairs = [(f"{n}\\sqrt{{2}}", r"3\sqrt{2}") for n in range(2, 30)]
    wanted = [Value.EQUAL if n == 3 else Value.DIFFERENT for n in range(2, 30)]

    async def main() -> list[Value]:
        return [found.value for found in await asyncio.gather(*(grader.agrade(*p) for p in pairs))]

    assert asyncio.run(main()) == wanted
    assert asyncio.run(main()) == wanted, "another event loop"
    found: dict[int, Value] = {}
    threads = [
        threading.Thread(target=lambda n=n, p=p: found.__setitem__(n, grader.grade(*p).value))
        for n, p in enumerate(pairs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(pairs))] == wanted


def test_a_judge_is_asked_only_what_is_undecided_and_decides_nothing() -> None:
    asked = []

    async def judge(answer: str, reference: str) -> bool | None:
        asked.append(answer)
        return {"12\\%": True, "13\\%": None}.get(answer)

    async def main() -> None:
        async with Grader(zygotes=1, judge=judge) as g:
            plain = await g.agrade("1/2", "0.5")
            believed = await g.agrade("12\\%", "12")
            silent = await g.agrade("13\\%", "13")
        assert (plain.value, plain.opinion) == (Value.EQUAL, None)
        assert (believed.value, believed.stage) == (Value.UNDECIDED, Stage.JUDGE)
        assert believed.opinion is Value.EQUAL
        assert "percent" in believed.reason
        assert (silent.value, silent.opinion) == (Value.UNDECIDED, None)

    asyncio.run(main())
    assert asked == ["12\\%", "13\\%"]


def test_the_module_function_and_its_record() -> None:
    found = grade(answer=r"\boxed{\frac12}", reference="0.5")
    assert found.value == "equal"
    assert re.fullmatch(r"2\.[0-9a-f]{8}\+math-verify-[\d.]+", found.version)
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
        "assert not {'sympy', 'mpmath', 'math_verify', 'numpy'} & set(sys.modules)\n"
        "assert 'shared.grading.parse' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
