"""Code quality (9.2 no. 18): what counts as more than arithmetic; hostile code decides nothing."""

from __future__ import annotations

import cProfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tirgen.code_quality import is_trivial, passes, trivial_allowed

MORE_THAN_ARITHMETIC = [
    "import math\nprint(math.comb(5, 2))",
    "import sympy as sp\nprint(sp.solve('x - 1'))",
    "import scipy.optimize as so\nprint(so.brentq(f, 0, 1))",
    "import numpy.linalg\nprint(numpy.linalg.det(m))",
    "from fractions import Fraction as F\nprint(F(1, 3) + F(1, 6))",
    "from sympy import *\nprint(solve('x - 1'))",
    "from math import prod\nprint(prod([1, 2]).bit_length())",
    "t = 0\nfor i in range(9):\n    t += i\nprint(t)",
    "while False:\n    pass",
    "print(1 if 2 > 1 else 0)",
    "if 1:\n    print(1)",
    "match 1:\n    case 1:\n        print(1)",
    "print(sum(i for i in range(3)))",
    "print([i for i in range(3)])",
    "print({i: i for i in range(3)})",
    "print({i for i in range(3)})",
    "def f(x):\n    return x\nprint(f(1))",
    "print(max([1], key=lambda x: -x))",
]
MERE_ARITHMETIC = [
    "",
    "print(3 * 4)",
    "# for i in range(3)\nprint('while True: def f(): import math')",
    "import math\nprint(3 * 4)",
    "import math\nprint(math.pi * 2)",
    "import sys\nprint(sys.getsizeof(1))",
    "from os import getpid\nprint(getpid())",
    "from __future__ import annotations\nprint(1)",
    "from . import math\nprint(math.sqrt(4))",
    "from sympy import *\nprint(3 * 4)",
    "math.sqrt(4)",
    "import sympy\nmath.sqrt(4)",
    "x = round(abs(-3.5), 1)\nprint(x)",
]
UNPARSABLE = ["for i in", "import math\nmath.sqrt(", "\0", "import math; math.sqrt(4)\0", "\ud800"]


@pytest.mark.parametrize("code", MORE_THAN_ARITHMETIC)
def test_a_used_library_or_control_flow_is_not_trivial(code: str) -> None:
    assert not is_trivial(code)


@pytest.mark.parametrize("code", MERE_ARITHMETIC)
def test_arithmetic_is_trivial_whatever_is_imported_or_mentioned(code: str) -> None:
    """An import that no call uses, and words in comments and strings, change nothing."""
    assert is_trivial(code)


@pytest.mark.parametrize("code", UNPARSABLE)
def test_code_that_does_not_parse_is_trivial(code: str) -> None:
    assert is_trivial(code)


HOSTILE = {
    "nested parentheses": "(" * 9_000 + ")" * 9_000,
    "nested lists": "[" * 150 + "]" * 150,
    "unary": "-" * 19_000 + "1",
    "not": "not " * 4_900 + "1",
    "attributes": "a" + ".b" * 9_000,
    "calls": "f" + "()" * 9_000,
    "subscripts": "a" + "[0]" * 6_000,
    "sums": "1" + "+1" * 9_000,
    "powers": "1" + "**1" * 6_000,
    "lambdas": "lambda:" * 2_800 + "1",
    "indents": "\n".join(" " * i + "if 1:" for i in range(150)),
    "f-strings": "f'{" * 5_000,
    "digits": "9" * 19_000,
    "many calls": "f();" * 4_900,
    "huge": "import math\nmath.sqrt(2)\n" * 100_000,
    "strings of escapes": "'" + "\\d" * 9_000 + "'",
}


@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_code_gives_an_answer_and_no_exception(code: str) -> None:
    assert is_trivial(code) in (True, False)


def test_work_grows_with_the_length_of_a_chain_and_not_with_its_square() -> None:
    """From Python 3.12 on chains of 10,000 calls parse, and took a minute."""

    def steps(n: int) -> int:
        profile = cProfile.Profile()
        assert profile.runcall(is_trivial, "f" + "()" * n)
        return sum(entry.callcount for entry in profile.getstats())

    assert steps(400) > 400, "control: it is parsed, and looked at"
    assert steps(800) < 3 * steps(400)


def test_a_chain_is_judged_by_the_name_at_its_bottom() -> None:
    assert not is_trivial("from sympy import symbols\nsymbols('x').subs(1, 2).evalf().n()")
    assert not is_trivial("from sympy import N\nlen(x).a(N(1)).b()"), "what is inside, too"
    assert is_trivial("from sympy import N\nlen(x).a(N).b()")


def test_what_is_too_long_is_trivial() -> None:
    good = "import math\nprint(math.sqrt(2))\n"
    assert not is_trivial(good)
    assert is_trivial(good + "#" * 20_000)


@given(st.text(alphabet="ab.()[]{}:=\n \t'\"\\*-+0123,#@", max_size=60))
def test_any_text_gives_an_answer(code: str) -> None:
    assert is_trivial(code) in (True, False)
    assert is_trivial(code, "lines") in (True, False)


def test_the_rule_of_the_release_counts_lines() -> None:
    """At most five lines that are neither empty nor a comment (method.md 1.4 no. 7)."""
    five = "a = 1\n# comment\n\nb = 2\nc = 3\n   # comment\nd = 4\nprint(a)"
    assert is_trivial(five, "lines")
    assert not is_trivial(five + "\nprint(b)", "lines")
    assert is_trivial("import math\nprint(math.sqrt(4))", "lines"), "control: rules do differ"


@pytest.mark.parametrize(
    ("blocks", "share", "allowed"),
    [(1, 0.4, 0), (2, 0.4, 1), (3, 0.4, 2), (5, 0.4, 2), (6, 0.4, 3), (3, 0.0, 0), (4, 1.0, 3)],
)
def test_some_blocks_may_be_trivial_but_never_all(blocks: int, share: float, allowed: int) -> None:
    assert trivial_allowed(blocks, share) == allowed


def test_a_trajectory_passes_with_one_good_block_and_few_trivial_ones() -> None:
    good, bad = MORE_THAN_ARITHMETIC[0], MERE_ARITHMETIC[1]
    assert passes([good], 0.4) == (True, 0)
    assert passes([good, bad], 0.4) == (True, 1)
    assert passes([good, bad, bad, bad], 0.4) == (False, 3)
    assert passes([bad], 1.0) == (False, 1)
    assert passes([], 1.0) == (False, 0)
