"""Trajectories: canonical bytes, what the content hash covers, and the one boundary that cleans."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sandbox.result import CodeError, Outcome, RunResult, Tier
from shared.trajectory import (
    End,
    Problem,
    Step,
    ToolCall,
    Trajectory,
    canonical_json,
    clean,
    content_hash,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
ANY_TEXT = st.text(st.characters() | st.sampled_from("\0\ud800\udc00\ufeff"), max_size=12)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
HOSTILE = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
RESULTS = st.builds(
    RunResult,
    outcome=st.sampled_from(Outcome),
    stdout=TEXT,
    stderr=TEXT,
    error=st.none() | st.builds(CodeError, TEXT, TEXT, st.none() | st.integers(1, 99), TEXT),
    tier=st.sampled_from(Tier),
    duration=st.floats(0, 100),
    cpu_time=st.floats(0, 100),
    peak_memory=st.integers(0, 2**40),
    bytes_cut=st.integers(0, 2**40),
)
CALLS = st.builds(ToolCall, TEXT, TEXT, RESULTS)
STEPS = st.builds(
    Step,
    thought=TEXT,
    call=st.none() | CALLS,
    original=st.none() | TEXT,
    discarded=st.lists(CALLS, max_size=2).map(tuple),
)
TRAJECTORIES = st.builds(
    Trajectory,
    problem_key=TEXT,
    steps=st.lists(STEPS, max_size=3).map(tuple),
    text=TEXT,
    end=st.sampled_from(End),
    answer=st.none() | TEXT,
    thinking=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
    n_tokens=st.integers(0, 9999),
    meta=st.dictionaries(TEXT, TEXT | st.floats(0, 9), max_size=3),
)
RUN = RunResult(Outcome.OK, "4\n", "", None, Tier.A, 0.1, 0.1, 1000, 0)
CALL = ToolCall("print(4)", "4", RUN)
BASE = Trajectory("k", (Step("t", CALL, "o", (CALL,)),), "x", End.ANSWERED, "4", False, 1, 9)


def shuffled(value: Any) -> Any:
    """An equal value whose dictionaries were filled in the opposite order."""
    if isinstance(value, dict):
        return {k: shuffled(v) for k, v in reversed(list(value.items()))}
    return [shuffled(v) for v in value] if isinstance(value, list) else value


@given(HOSTILE)
def test_equal_values_give_equal_bytes_and_the_bytes_give_the_value_back(value: Any) -> None:
    value, _ = clean(value)
    assert canonical_json(value) == canonical_json(shuffled(value))
    assert json.loads(canonical_json(value)) == value


@given(HOSTILE, st.dictionaries(ANY_TEXT | st.integers(), st.floats() | st.integers()))
def test_canonical_bytes_are_those_of_json_itself(value: Any, odd: dict[Any, Any]) -> None:
    """Whoever writes them: the same bytes, or an error where `json` has one."""

    def by_json(value: Any) -> bytes | None:
        rules: dict[str, Any] = {"sort_keys": True, "ensure_ascii": False, "allow_nan": False}
        try:
            return json.dumps(value, separators=(",", ":"), **rules).encode()
        except (TypeError, ValueError):
            return None

    for one in (value, [value, 1e-05, 1e16, -0.0, 2**70], odd):
        expected = by_json(one)
        if expected is None:
            with pytest.raises((TypeError, ValueError)):
                canonical_json(one)
        else:
            assert canonical_json(one) == expected


@given(TRAJECTORIES)
def test_a_trajectory_is_written_as_its_body_is(trajectory: Trajectory) -> None:
    assert canonical_json(trajectory) == canonical_json(trajectory.body())


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": -math.inf}, "\ud800"])
def test_what_json_cannot_say_is_refused_not_invented(value: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json and the codec word it differently
        canonical_json(value)


@given(HOSTILE)
def test_clean_leaves_nothing_that_postgresql_refuses_and_is_idempotent(value: Any) -> None:
    cleaned, dirty = clean(value)
    text = canonical_json(cleaned).decode()
    assert "\\u0000" not in text
    assert "\0" not in text
    assert clean(cleaned) == (cleaned, False)
    if not dirty:
        assert cleaned == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\0b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("\udc00x", "\ufffdx"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ufeffx\0", "\ufeffx\ufffd"),
        ([{"a": (math.nan, math.inf, -math.inf)}], [{"a": ["NaN", "Infinity", "-Infinity"]}]),
        ({"k\0": 1}, {"k\ufffd": 1}),
    ],
)
def test_what_is_replaced_and_by_what(value: Any, expected: Any) -> None:
    assert clean(value) == (expected, True)


@pytest.mark.parametrize("value", ["", "é\U0001f600\ufeff", 1, 1.5, None, True, {"a": ["b"]}])
def test_what_is_fit_is_left_alone(value: Any) -> None:
    """Control: `clean` does not report a change where there is none."""
    assert clean(value) == (value, False)


@given(TRAJECTORIES)
def test_a_trajectory_survives_its_body(trajectory: Trajectory) -> None:
    plain = canonical_json(trajectory.body())
    assert Trajectory.from_json(plain) == Trajectory.from_body(json.loads(plain)) == trajectory


@pytest.mark.parametrize("n", [2**63, 2**64, -(2**63) - 1, 10**40])
def test_an_integer_comes_back_as_it_was_however_large(n: int) -> None:
    """A faster reader of JSON would make a float of it, and say nothing."""
    for made in (
        replace(BASE, seed=n),
        replace(BASE, meta={"a": [{"b": n}]}),
        replace(
            BASE, steps=(Step("t", discarded=(replace(CALL, result=replace(RUN, peak_memory=n)),)),)
        ),
    ):
        again = Trajectory.from_json(canonical_json(made))
        assert again == made
        assert canonical_json(again) == canonical_json(made)


@given(TRAJECTORIES, st.floats(0, 9), RESULTS)
def test_the_hash_ignores_how_it_was_made(t: Trajectory, seconds: float, other: RunResult) -> None:
    """Timings, hosts, models, memory and the words of stderr are not what was generated."""

    def call(c: ToolCall) -> ToolCall:
        return replace(c, result=replace(other, outcome=c.result.outcome))

    steps = tuple(
        replace(s, call=s.call and call(s.call), discarded=tuple(map(call, s.discarded)))
        for s in t.steps
    )
    same = replace(t, steps=steps, meta={"seconds": seconds, "reasoner": "another"}, n_tokens=1)
    assert content_hash(same.identity()) == content_hash(t.identity())


FAILED = replace(CALL, result=replace(RUN, outcome=Outcome.TIMEOUT))


@pytest.mark.parametrize(
    "change",
    [
        {"problem_key": "l"},
        {"text": "y"},
        {"end": End.GAVE_UP},
        {"answer": None},
        {"thinking": True},
        {"steps": ()},
        {"steps": (Step("u", CALL, "o", (CALL,)),)},
        {"steps": (Step("t", None, "o", (CALL,)),)},
        {"steps": (Step("t", CALL, None, (CALL,)),)},
        {"steps": (Step("t", CALL, "o"),)},
        {"steps": (Step("t", FAILED, "o", (CALL,)),)},
        {"steps": (Step("t", replace(CALL, code="print(5)"), "o", (CALL,)),)},
        {"steps": (Step("t", replace(CALL, observation="5"), "o", (CALL,)),)},
    ],
)
def test_the_hash_covers_everything_that_was_generated(change: dict[str, Any]) -> None:
    assert content_hash(replace(BASE, **change).identity()) != content_hash(BASE.identity())


def test_infrastructure_errors_are_not_failed_calls() -> None:
    def with_outcome(outcome: Outcome) -> Trajectory:
        return replace(BASE, steps=(Step("", replace(CALL, result=replace(RUN, outcome=outcome))),))

    failed = {o for o in Outcome if with_outcome(o).n_failed_calls}
    assert failed == {Outcome.MODEL_ERROR, Outcome.TIMEOUT, Outcome.NO_OUTPUT}


def test_a_problem_is_its_text_and_answer() -> None:
    problem = Problem("1+1?", "2", source="a", level="easy")
    assert problem.key == Problem("1+1?", "2", source="b").key
    assert len({problem.key, Problem("1+1?", "3").key, Problem("1+1?2", "").key}) == 3
    assert Problem("a\0\ud800", "2").key == Problem("a\ufffd\ufffd", "2").key
