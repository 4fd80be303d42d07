"""Benchmarks by name, and code tasks judged by their tests in a real sandbox."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.evaluation import code
from rl.evaluation.benchmarks import REGISTRY, find, load
from shared.errors import ConfigError, InputError
from shared.rows import read
from shared.sandbox import Sandbox
from shared.trajectory import Problem


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(zygotes=1) as opened:
        yield opened


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROW = {"id": "a", "problem": "What is 6 times 7?", "answer": "42"}


def test_a_name_a_file_and_a_name_with_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", ROW)
    assert find("math500").source == "HuggingFaceH4/MATH-500:test"
    own = find(path)
    assert (own.name, own.source, own.kind) == ("mine", path, "math")
    instead = find(f"math500={path}")
    assert (instead.name, instead.source, instead.fields) == ("math500", path, {})
    assert (find("aime24@16").name, find("aime24@16").samples) == ("aime24", 16)
    assert find("my-org/my-set:test").source == "my-org/my-set:test"
    with pytest.raises(ConfigError, match="no benchmark 'math5000'") as error:
        find("math5000")
    assert error.value.remedy == "did you mean 'math500'?"


def test_a_folder_of_data_comes_before_the_hub(tmp_path: Path) -> None:
    path = write(tmp_path / "gsm8k_test.jsonl", ROW)
    assert find("gsm8k", tmp_path).source == path
    assert find("aime24", tmp_path).source == REGISTRY["aime24"].source


def test_problems_carry_the_benchmarks_name_and_a_digest(tmp_path: Path) -> None:
    other = {"problem": "What is 2 times 3?", "answer": "6"}
    path = write(tmp_path / "x.jsonl", ROW, other, ROW, {"problem": "?", "answer": ""})
    loaded = load(find(path))
    assert [p.source for p in loaded.problems] == ["x", "x"]
    assert loaded.left_out == {"duplicates": 1, "without answer": 1}
    assert loaded.digest != load(find(path), limit=1).digest
    turned = write(tmp_path / "x.jsonl", other, ROW)
    assert load(find(turned)).digest != loaded.digest


def test_columns_of_ones_own_and_the_errors_of_problem_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"frage": "1+1?", "loesung": "2"})
    fields = {"problem": "frage", "answer": "loesung"}
    assert load(find(path, fields=fields)).problems[0].answer == "2"
    with pytest.raises(InputError, match="no field 'problem'"):
        load(find(path))


def test_nano_is_packaged() -> None:
    assert len(load(find("nano"), limit=20).problems) == 20


# ---- code tasks -----------------------------------------------------------------------------

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}
MBPP = {
    "task_id": 2,
    "prompt": "Write a function to add two numbers.",
    "test_list": ["assert add(1, 2) == 3"],
    "test": "assert add(1, 2) == 3\nassert add(0, 0) == 0\n",
}
CASES = [{"input": "3\n1 2 3\n", "output": "6\n", "testtype": "stdin"}]
PRIVATE = [{"input": "1\n5\n", "output": "5", "testtype": "stdin"}]
STDIN = {
    "question_id": "abc", "question_content": "Add n numbers.", "starter_code": "",
    "public_test_cases": json.dumps(CASES), "private_test_cases": json.dumps(PRIVATE),
    "metadata": "{}", "difficulty": "easy",
}  # fmt: skip
CALL = {
    "question_id": "def", "question_content": "Sort.",
    "starter_code": "class Solution:\n    def arrange(self, a: List[int], up: bool):",
    "public_test_cases": json.dumps([{"input": "[3, 1]\ntrue", "output": "[1, 3]"}]),
    "private_test_cases": "[]", "metadata": json.dumps({"func_name": "arrange"}),
}  # fmt: skip


def task(row: dict[str, Any], style: code.Style) -> Problem:
    return code.problem(row, style, "test", "row 1")


def judged(sandbox: Sandbox, problem: Problem, program: str) -> tuple[bool | None, str]:
    response = f"Here:\n```python\n{program}\n```\nDone."
    verdict = asyncio.run(code.judge(sandbox, response, problem.answer, seed=1, timeout=2))
    return verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("row", "style", "right", "wrong"),
    [
        (HUMANEVAL, "humaneval", "double = lambda x: 2 * x", "def double(x):\n    return 4"),
        (MBPP, "mbpp", "def add(a, b):\n    return a + b", "def add(a, b):\n    return 3"),
        (
            STDIN, "livecodebench",
            "n = int(input())\nprint(sum(map(int, input().split())))",
            "print(6)",  # right for the public case only
        ),
        (
            STDIN, "livecodebench",
            "import sys\n_, *a = sys.stdin.buffer.read().split()\nprint(float(sum(map(int, a))))",
            "print(open(0).read())",
        ),
        (
            CALL, "livecodebench",
            "class Solution:\n  def arrange(self, a: List[int], up):\n    return (*sorted(a),)",
            "class Solution:\n    def arrange(self, a, up):\n        return a",
        ),
    ],
)  # fmt: skip
def test_tests_decide(
    sandbox: Sandbox, row: dict[str, Any], style: code.Style, right: str, wrong: str
) -> None:
    problem = task(row, style)
    assert judged(sandbox, problem, right) == (True, "all tests pass")
    passed, reason = judged(sandbox, problem, wrong)
    assert passed is False
    assert reason != "all tests pass"


def test_a_program_that_ends_before_the_tests_passes_none(sandbox: Sandbox) -> None:
    """Control: it ends well and has printed something, so its outcome alone is "ok"."""
    problem = task(HUMANEVAL, "humaneval")
    assert judged(sandbox, problem, "import os\nprint('passed')\nos._exit(0)")[0] is False
    assert judged(sandbox, problem, "import sys\nprint('passed')\nsys.exit(0)")[0] is False
    assert judged(sandbox, problem, "while True: pass") == (False, "timeout")


def test_the_last_closed_block_is_the_program(sandbox: Sandbox) -> None:
    text = "```python\n1\n```\n```output\n2\n```\n```python\n3\n```\nand ```python\nopen"
    assert code.last_program(text) == "3"
    assert code.last_program("no code") is None


def test_a_lot_of_printing_hides_nothing(sandbox: Sandbox) -> None:
    program = "print('x' * 10**6)\ndef double(x):\n    return 2 * x"
    assert judged(sandbox, task(HUMANEVAL, "humaneval"), program)[0] is True


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_packed_cases_are_read_and_a_pickle_that_is_no_text_is_refused(sandbox: Sandbox) -> None:
    """A pickle may run anything when it is loaded; this one would call a function."""
    row = {**STDIN, "private_test_cases": packed(json.dumps(PRIVATE))}
    assert json.loads(task(row, "livecodebench").answer)["cases"][1]["input"] == "1\n5\n"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("loaded",)

    with pytest.raises(InputError, match=r"wants to load builtins\.print"):
        task({**STDIN, "private_test_cases": packed(Evil())}, "livecodebench")
    with pytest.raises(InputError, match="cannot be read"):
        task({**STDIN, "private_test_cases": "not base64!"}, "livecodebench")


def test_a_row_of_another_kind_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "humaneval+.jsonl", HUMANEVAL, {"task_id": "HumanEval/1"})
    with pytest.raises(InputError, match="'prompt' is None, expected a text") as error:
        load(find("humaneval+", tmp_path))
    assert error.value.where == f"{path}, line 2"


def test_a_code_benchmark_is_read_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "mbppplus.jsonl", MBPP, MBPP)
    loaded = load(find("mbpp+", tmp_path))
    assert [p.external_id for p in loaded.problems] == ["2"]
    assert "It must pass: assert add(1, 2) == 3" in loaded.problems[0].text
    rows, _ = read(find("mbpp+", tmp_path).source, code.columns("mbpp"))
    assert len(list(rows)) == 2
