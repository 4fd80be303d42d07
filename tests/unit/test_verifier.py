"""The verifier: every check passes and fails for its own reason, and only rules decide."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from shared.endpoints import Usage
from shared.errors import SandboxError
from shared.fences import action, observation
from shared.grading import Value
from shared.sandbox.observation import observe
from shared.sandbox.result import Outcome, RunResult
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict
from tests.scripted import InMemory, ScriptedSandbox, Server, ran
from tirgen import seeds
from tirgen.agents.verifier import Judge, Verifier
from tirgen.config import RunConfig, parse

PROBLEM = Problem("How many pens?", "12")
CODE = "import math\nprint(math.prod([3, 4]))"
TRIVIAL = "print(3 * 4)"
ROLE = {"endpoint": {"base_url": "http://memory/v1", "model": "scripted"}}


@dataclass(frozen=True)
class Grade:
    value: Value
    stage: str = "stage"
    reason: str = "because"
    version: str = "g1"


class ScriptedGrader:
    def __init__(self, value: Value = Value.EQUAL) -> None:
        self.value = value
        self.asked: list[tuple[str, str]] = []

    async def agrade(self, answer: str, reference: str) -> Grade:
        self.asked.append((answer, reference))
        return Grade(self.value)


def twelve(code: str, seed: int) -> RunResult:
    return ran(Outcome.OK, "12\n")


def call(code: str = CODE, output: str = "12", outcome: Outcome = Outcome.OK) -> ToolCall:
    return ToolCall(code, output, ran(outcome, f"{output}\n"))


def trajectory(*calls: ToolCall, tail: str = "So \\boxed{12}", opening: str = "") -> Trajectory:
    """Well formed: each call after a thought, then `tail`."""
    steps = [Step(f"Thought {i}.", c, original="x") for i, c in enumerate(calls)] + [Step(tail)]
    pieces = [
        s.thought + (action(s.call.code) + observation(s.call.observation) if s.call else "")
        for s in steps
    ]
    return Trajectory(
        PROBLEM.key,
        tuple(steps),
        opening + "".join(pieces),
        End.ANSWERED,
        "12",
        bool(opening),
        seed=5,
        n_tokens=1,
    )


GOOD = trajectory(call())


def config(**verifier: Any) -> RunConfig:
    values = {"prompts": "compact", "reasoner": ROLE, "extractor": ROLE, "verifier": verifier}
    return parse(values, "test")


def make(
    script: Callable[[str, int], RunResult] = twelve,
    value: Value = Value.EQUAL,
    judge: Judge | None = None,
    **verifier: Any,
) -> Verifier:
    sandbox: Any = ScriptedSandbox(script)
    grader: Any = ScriptedGrader(value)
    return Verifier(config(**verifier), sandbox, grader, judge)


def verdicts(t: Trajectory, verifier: Verifier | None = None) -> dict[Check, Verdict]:
    found = asyncio.run((verifier or make()).verify(PROBLEM, t, Usage()))
    by_check = {v.check: v for v in found}
    assert len(by_check) == len(found), "one verdict per check"
    return by_check


def failed(t: Trajectory, verifier: Verifier | None = None) -> set[Check]:
    return {c for c, v in verdicts(t, verifier).items() if v.passed is not True}


def test_a_good_trajectory_passes_every_rule_and_is_vetted() -> None:
    """The control of every test below."""
    verifier = make()
    found = tuple(verdicts(GOOD, verifier).values())
    assert {v.check for v in found} == set(Check) - {Check.JUDGE}
    assert all(v.passed for v in found)
    assert verifier.rejected_by(found) is None
    assert all(v.version and v.reason for v in found)


def test_without_an_executed_call_nothing_is_vetted() -> None:
    assert failed(trajectory()) == {Check.EXECUTED, Check.CODE_QUALITY}
    infrastructure = trajectory(call(outcome=Outcome.INFRASTRUCTURE_ERROR))
    assert Check.EXECUTED in failed(infrastructure)


@pytest.mark.parametrize("end", [e for e in End if e is not End.ANSWERED])
def test_only_an_answered_trajectory_is_well_formed(end: End) -> None:
    assert failed(replace(GOOD, end=end)) == {Check.FORMAT}
    assert verdicts(replace(GOOD, end=end))[Check.FORMAT].reason == f"ended by {end.value}"


@pytest.mark.parametrize("answer", [None, "", " \n"])
def test_an_answer_is_there_and_not_empty(answer: str | None) -> None:
    assert Check.FORMAT in failed(replace(GOOD, answer=answer))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n```python\nprint(1)\n```\n",
        lambda text: text + "\n```output\n12\n```\n",
        lambda text: text.replace("```output\n12", "```output\n13"),
        lambda text: text.replace("math.prod", "math.comb"),
        lambda text: text.replace("```output\n12\n```\n", ""),
        lambda text: text + "\n```latex\nx",
        lambda text: text + "\n```python\nprint(1)",
    ],
)
def test_the_text_holds_the_executed_blocks_and_no_others(change: Callable[[str], str]) -> None:
    """9.1 no. 12: an unexecuted block of the policy's own is refused."""
    assert change(GOOD.text) != GOOD.text
    assert failed(replace(GOOD, text=change(GOOD.text))) == {Check.FORMAT}


@pytest.mark.parametrize(
    "hostile", ["a\n```\nb", "```python\nprint(1)\n```", "</think>", "<think>"]
)
def test_hostile_output_is_data_in_its_block(hostile: str) -> None:
    t = trajectory(call(output=hostile), opening="<think>\n", tail="\n</think>\n\\boxed{12}")
    verifier = make(lambda code, seed: ran(Outcome.OK, f"{hostile}\n"))
    assert failed(t, verifier) == set()


THOUGHT = trajectory(call(), opening="<think>\n", tail="\n</think>\n\nSo \\boxed{12}")


def test_a_thinking_trajectory_thinks_once_and_first() -> None:
    assert failed(THOUGHT) == set()
    for text in (
        THOUGHT.text.replace("</think>", ""),
        THOUGHT.text.removeprefix("<think>\n"),
        "Well. " + THOUGHT.text,
        THOUGHT.text + "</think>",
        THOUGHT.text.replace("So", "<think>So"),
    ):
        found = verdicts(replace(THOUGHT, text=text))
        assert found[Check.FORMAT].reason == "not exactly one <think>...</think>"


def test_code_after_the_thinking_is_refused() -> None:
    t = trajectory(call(), opening="<think>\n</think>\n", tail="\\boxed{12}")
    assert verdicts(t)[Check.FORMAT].reason == "code after </think>"


@pytest.mark.parametrize("outcome", [Outcome.MODEL_ERROR, Outcome.TIMEOUT, Outcome.NO_OUTPUT])
def test_a_failed_call_that_stands_fails_calls_ok_and_nothing_else(outcome: Outcome) -> None:
    result = ran(outcome, "12\n")
    t = trajectory(call(), call(output=observe(result), outcome=outcome))
    results = iter([ran(Outcome.OK, "12\n"), result])
    assert failed(t, make(lambda code, seed: next(results))) == {Check.CALLS_OK}


def test_a_failed_call_that_was_taken_back_does_not_count() -> None:
    first = replace(GOOD.steps[0], discarded=(call(outcome=Outcome.MODEL_ERROR),))
    assert failed(replace(GOOD, steps=(first, *GOOD.steps[1:]))) == set()


def test_a_tampered_observation_is_not_reproduced() -> None:
    """The text agrees with itself: only running the code again tells."""
    tampered = trajectory(call(output="13"))
    found = verdicts(tampered)
    assert {c for c, v in found.items() if not v.passed} == {Check.REPRODUCED}
    assert found[Check.REPRODUCED].evidence == {"step": 0, "output": "12"}


def test_another_outcome_with_the_same_text_is_not_reproduced() -> None:
    def timed_out(code: str, seed: int) -> RunResult:
        return ran(Outcome.MODEL_ERROR, "12\n", "12")

    assert failed(GOOD, make(timed_out)) == {Check.REPRODUCED}


def test_every_block_runs_again_with_the_seed_and_place_it_had() -> None:
    t = trajectory(call(), call("import math\nprint(math.comb(12, 1))"))
    verifier = make()
    verdicts(t, verifier)
    runs = verifier.sandbox.runs  # type: ignore[attr-defined]
    assert runs == [(c.code, seeds.tool(t.seed, i)) for i, c in enumerate(t.calls)]
    assert len({seed for _, seed in runs}) == 2


def test_a_sandbox_that_fails_gives_no_verdict_at_all() -> None:
    with pytest.raises(SandboxError):
        verdicts(GOOD, make(lambda code, seed: ran(Outcome.INFRASTRUCTURE_ERROR)))


@pytest.mark.parametrize(
    ("value", "passed"),
    [(Value.EQUAL, True), (Value.DIFFERENT, False), (Value.UNDECIDED, None)],
)
def test_an_undecided_answer_is_not_a_right_one(value: Value, passed: bool | None) -> None:
    verifier = make(value=value)
    found = verdicts(GOOD, verifier)
    assert found[Check.ANSWER].passed is passed
    assert (verifier.rejected_by(tuple(found.values())) is None) == (value is Value.EQUAL)
    assert found[Check.ANSWER].version.endswith("/g1"), "the grader's version is part of it"


def test_without_an_answer_the_grader_is_not_asked() -> None:
    verifier = make()
    assert verdicts(replace(GOOD, answer=None), verifier)[Check.ANSWER].passed is False
    assert verifier.grader.asked == []  # type: ignore[attr-defined]


def test_trivial_code_fails_code_quality_only() -> None:
    assert failed(trajectory(call(TRIVIAL))) == {Check.CODE_QUALITY}
    assert failed(trajectory(call(), call(TRIVIAL))) == set()
    assert failed(trajectory(call(), *[call(TRIVIAL)] * 3)) == {Check.CODE_QUALITY}
    assert failed(trajectory(call(), *[call(TRIVIAL)] * 3), make(max_trivial=1.0)) == set()


def test_the_rule_of_code_quality_is_a_setting() -> None:
    long = trajectory(call("\n".join(["x = 1"] * 5 + ["print(12)"])))
    assert failed(long) == {Check.CODE_QUALITY}
    assert failed(long, make(trivial="lines")) == set()


def test_the_first_required_check_that_did_not_pass_is_the_reason() -> None:
    bad = trajectory(call(TRIVIAL, output="13"))
    verifier = make(value=Value.DIFFERENT)
    found = tuple(verdicts(bad, verifier).values())
    assert verifier.rejected_by(found) is Check.REPRODUCED
    order = ["executed", "code_quality", "answer", "reproduced"]
    assert make(required=order).rejected_by(found) is Check.CODE_QUALITY
    assert make(required=["executed", "format"]).rejected_by(found) is None
    assert verifier.rejected_by(found[::-1]) is Check.REPRODUCED, "the verdicts' order is nothing"


def test_a_required_check_without_a_verdict_has_not_passed() -> None:
    assert make().rejected_by(()) is Check.EXECUTED


def judge(word: str) -> tuple[Judge, Server]:
    server = Server(chat=lambda user, seed: word)
    settings = parse({"reasoner": ROLE, "extractor": ROLE, "judge": ROLE}, "test").judge
    assert settings is not None
    return Judge(InMemory(server), settings, "compact"), server


@pytest.mark.parametrize(
    ("word", "passed"), [("yes", True), ("No.", False), ("perhaps", None), ("", None)]
)
def test_a_models_opinion_is_recorded_and_never_decides(word: str, passed: bool | None) -> None:
    opinion, server = judge(word)
    verifier = make(judge=opinion)
    found = verdicts(GOOD, verifier)
    assert found[Check.JUDGE].passed is passed
    assert verifier.rejected_by(tuple(found.values())) is None
    wrong = make(value=Value.DIFFERENT, judge=judge("yes")[0])
    assert wrong.rejected_by(tuple(verdicts(GOOD, wrong).values())) is Check.ANSWER
    assert server.chats() == ["Is the answer the same?\n12\n12"], "it does not see the problem"


def test_the_same_trajectory_gets_the_same_verdicts() -> None:
    """Re-judging stored data must be repeatable; only durations differ."""

    def judged() -> list[Verdict]:
        found = verdicts(GOOD, make(judge=judge("yes")[0])).values()
        return [replace(v, duration=0.0) for v in found]

    assert judged() == judged()
