"""Code benchmarks: a task with its tests as a problem, and the tests run in the sandbox.

A task becomes a `Problem` whose text asks for a program and whose answer is the tests, as JSON; so
it is stored, sampled and queried like any other. What is judged is the last ```python block that
the policy wrote. It runs in the jail together with the tests: that protects the host, not the tests
from a program that sets out to fool them.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from shared import seeds
from shared.errors import InputError, SandboxError
from shared.fences import Kind, parse
from shared.policy import Tool
from shared.rows import Row, brief
from shared.trajectory import Check, Outcome, Problem, Verdict, canonical_json

Style = Literal["humaneval", "mbpp", "livecodebench"]

VERSION = "code-1"
MAX_CASES = 64  # of a task's input/output tests, the first so many
MAX_TESTS = 1 << 22  # characters of a task's tests

_COLUMNS: Mapping[Style, tuple[str, ...]] = {
    "humaneval": ("task_id", "prompt", "entry_point", "test"),
    "mbpp": ("task_id", "prompt", "test_list", "test"),
    "livecodebench": (
        "question_id", "question_content", "starter_code", "public_test_cases",
        "private_test_cases", "metadata", "difficulty",
    ),
}  # fmt: skip
_FINISH = "Put the final program, complete with its imports, into the last ```python block."


def columns(style: Style) -> frozenset[str]:
    return frozenset(_COLUMNS[style])


def problem(row: Row, style: Style, source: str, where: str) -> Problem:
    """A task as a problem. Raises InputError for a row that is not of the style."""
    match style:
        case "humaneval":
            text = f"Complete this Python function.\n{_text(row, 'prompt', where)}\n{_FINISH}"
            tests: dict[str, Any] = {
                "asserts": f"{_text(row, 'test', where)}\ncheck({_text(row, 'entry_point', where)})"
            }
        case "mbpp":
            example = str(next(iter(row.get("test_list") or ()), "")).strip()
            shown = f"\nIt must pass: {example}" if example else ""
            text = f"{_text(row, 'prompt', where).strip()}{shown}\n{_FINISH}"
            tests = {"asserts": _text(row, "test", where)}
        case "livecodebench":
            text, tests = _contest(row, where)
    answer = canonical_json(tests).decode()
    if len(answer) > MAX_TESTS:
        raise InputError(
            f"its tests have {len(answer)} characters, at most {MAX_TESTS} can be stored",
            where=where,
            remedy="leave the task out, or shorten its tests",
        )
    return Problem(
        text=text,
        answer=answer,
        source=source,
        external_id=str(row.get("task_id") or row.get("question_id") or ""),
        level=str(row["difficulty"]) if row.get("difficulty") else None,
    )


def _contest(row: Row, where: str) -> tuple[str, dict[str, Any]]:
    """LiveCodeBench: cases of input and output, for a whole program or one of its functions."""
    cases = [
        case
        for name in ("public_test_cases", "private_test_cases")
        for case in _cases(row.get(name), f"{where}, {name}")
    ]
    if not cases:
        raise InputError("it has no test cases", where=where)
    metadata = row.get("metadata") or "{}"
    called = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    starter = str(row.get("starter_code") or "").strip()
    how = (
        f"Complete this code:\n{starter}"
        if starter
        else "Write a program that reads the input from stdin and prints the answer."
    )
    text = f"{_text(row, 'question_content', where).strip()}\n{how}\n{_FINISH}"
    return text, {"cases": cases[:MAX_CASES], "call": called}


def _cases(value: Any, where: str) -> list[dict[str, str]]:
    """Test cases as they are, or as LiveCodeBench packs them: base64 of zlib of a pickled text."""
    try:
        if isinstance(value, str) and not value.lstrip().startswith("["):
            value = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
        found = json.loads(value) if isinstance(value, str | bytes) else value or []
        return [{"input": str(c["input"]), "output": str(c["output"])} for c in found]
    except (ValueError, KeyError, TypeError, zlib.error, binascii.Error, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        what = f"the test cases cannot be read: {error}"
        raise InputError(what, where=where) from error


class _TextOnly(pickle.Unpickler):
    """Reads a pickled text and refuses everything that a pickle could do besides."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def _text(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"the field {name!r} is {brief(value)}, expected a text",
            where=where,
            remedy="see docs/evaluation.md for the columns of each code benchmark",
        )
    return value


# ---- judging --------------------------------------------------------------------------------


def last_program(text: str) -> str | None:
    """The last closed python block of a response."""
    blocks = [b.body for b in parse(text) if b.kind is Kind.PYTHON and b.closed]
    return blocks[-1] if blocks else None


async def judge(sandbox: Tool, response: str, tests: str, *, seed: int, timeout: float) -> Verdict:
    """Does the response's program pass all tests? `timeout`: CPU seconds for all of them.

    Raises SandboxError where the sandbox fails.
    """
    program = last_program(response)
    if program is None:
        return Verdict(Check.ANSWER, False, VERSION, "no program")
    # Only what comes to its end knows the last word: a program that exits early passes nothing.
    word = f"passed {seeds.derive(seed, 'tests')}"
    code = test_program(program, tests, word)
    result = await sandbox.arun(code, seed=seeds.derive(seed, "code"), timeout=timeout)
    if result.outcome is Outcome.INFRASTRUCTURE_ERROR:
        raise SandboxError("The sandbox failed while a program was tested.")
    passed = result.outcome is Outcome.OK and result.stdout.rstrip().endswith(word)
    error = result.error
    reason = "all tests pass" if passed else _why(result.outcome, error.type if error else None)
    evidence = {"outcome": result.outcome, "error": error.message[:500] if error else None}
    return Verdict(Check.ANSWER, passed, VERSION, reason, evidence, result.duration)


def _why(outcome: Outcome, error: str | None) -> str:
    if outcome is Outcome.MODEL_ERROR and error:
        return f"a test failed: {error}"
    return "it ended before the tests did" if outcome is Outcome.OK else str(outcome)


def test_program(program: str, tests: str, word: str) -> str:
    """Python that runs `program` with its tests and prints `word` if all of them pass."""
    return _HARNESS.format(task=json.dumps([program, tests]), word=word)


_HARNESS = '''
import contextlib as _contextlib, io as _io, json as _json, sys as _sys
from decimal import Decimal as _Decimal

_program, _tests = _json.loads({task!r})
_tests = _json.loads(_tests)
_COMMON = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""

def _run(source, space, given=""):
    out = _io.StringIO()
    _sys.stdin = _io.TextIOWrapper(_io.BytesIO(given.encode()), encoding="utf-8")
    with _contextlib.redirect_stdout(out):
        try:
            exec(compile(source, "program", "exec"), space)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise RuntimeError(f"exit code {{end.code}}")
    return out.getvalue()

def _lines(text):
    return [line.strip() for line in text.strip().splitlines()]

def _same(one, other):
    if one == other:
        return True
    if len(one) != len(other):
        return False
    for a, b in zip(one, other):
        if a != b:
            try:
                if [_Decimal(x) for x in a.split()] != [_Decimal(x) for x in b.split()]:
                    return False
            except ArithmeticError:
                return False
    return True

def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value

if "asserts" in _tests:
    _space = {{"__name__": "solution"}}
    _run(_program, _space)
    _run(_tests["asserts"], _space)
else:
    for _n, _case in enumerate(_tests["cases"]):
        if _tests.get("call"):
            _space = {{"__name__": "solution"}}
            exec(_COMMON, _space)
            _run(_program, _space)
            _owner = _space["Solution"]() if "Solution" in _space else None
            _call = getattr(_owner, _tests["call"]) if _owner else _space[_tests["call"]]
            _arguments = [_json.loads(a) for a in _case["input"].split("\\n") if a.strip()]
            with _contextlib.redirect_stdout(_io.StringIO()):
                _got = _plain(_call(*_arguments))
            assert _got == _json.loads(_case["output"]), f"case {{_n}}"
        else:
            _space = {{"__name__": "__main__"}}
            exec(_COMMON, _space)
            _got = _run(_program, _space, _case["input"])
            assert _same(_lines(_got), _lines(_case["output"])), f"case {{_n}}"
print({word!r})
'''
