"""The code extractor: what it sees, when it falls back to three calls, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.endpoints import Endpoint, EndpointConfig, Usage
from tests.fake_endpoint import FakeEndpoint
from tests.scripted import Answer, InMemory, Server, http
from tirgen.agents.code_extractor import CodeExtractor, Extraction, Left, lcs, overlap
from tirgen.config import ExtractorConfig

ENDPOINT = EndpointConfig(base_url="http://memory/v1", model="scripted")
STEP = "We have 3 boxes of 4 pens, so there are 3 * 4 = 12 pens.\n\n"
LOGIC = "We have 3 boxes of 4 pens, so there are"
CODE = "print(3 * 4)"
GOOD = json.dumps({"solvable": True, "logic": LOGIC, "code": CODE})
ONE, JUDGE, STRIP, CONVERT = "Turn the step", "Can code compute", "Remove the", "Write code"


def answers(by_prompt: dict[str, str | tuple[str, str]]) -> Answer:
    def chat(user: str, seed: int) -> str | tuple[str, str]:
        return next(reply for start, reply in by_prompt.items() if user.startswith(start))

    return chat


def three(judge: Any = "yes", logic: Any = LOGIC, code: Any = f"```python\n{CODE}\n```") -> Any:
    return {JUDGE: judge, STRIP: logic, CONVERT: code}


def extract(
    by_prompt: dict[str, Any], step: str = STEP, **fields: Any
) -> tuple[Extraction | Left, list[str], Server]:
    """(what came of it, how each prompt that was asked begins, the server)"""
    server = Server(chat=answers(by_prompt))
    config = ExtractorConfig(endpoint=ENDPOINT, **fields)
    extractor = CodeExtractor(InMemory(server), config, "compact")
    found = asyncio.run(extractor.extract(step, seed=1, meter=Usage()))
    asked = [
        next(p for p in (ONE, JUDGE, STRIP, CONVERT) if c.startswith(p)) for c in server.chats()
    ]
    return found, asked, server


def test_one_call_judges_extracts_and_converts() -> None:
    found, asked, _ = extract({ONE: GOOD})
    assert found == Extraction(LOGIC, CODE)
    assert asked == [ONE]


def test_one_call_may_find_nothing_to_compute() -> None:
    found, asked, _ = extract({ONE: '{"solvable": false}'})
    assert found == Left("not_solvable")
    assert asked == [ONE]


@pytest.mark.parametrize(
    "wrapped", [f"```json\n{GOOD}\n```", f"Here it is: {GOOD} That's all.", f"\n {GOOD}"]
)
def test_an_object_in_a_fence_or_a_sentence_is_found(wrapped: str) -> None:
    assert extract({ONE: wrapped})[0] == Extraction(LOGIC, CODE)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no",
        "{}",
        "{" * 50_000,
        '{"solvable": "yes"}',
        '{"solvable": true, "logic": 1}',
        '{"solvable": true, "logic": "\\ud800"}',
        GOOD[:-1],
        "[1]",
        (GOOD, "length"),
    ],
)
def test_a_reply_that_is_no_such_object_or_was_cut_off_falls_back_to_three_calls(
    reply: Any,
) -> None:
    found, asked, _ = extract({ONE: reply, **three()})
    assert found == Extraction(LOGIC, CODE)
    assert asked == [ONE, JUDGE, STRIP, CONVERT]


def test_three_calls_as_published_never_ask_for_json() -> None:
    found, asked, _ = extract(three(), calls="three")
    assert found == Extraction(LOGIC, CODE)
    assert asked == [JUDGE, STRIP, CONVERT]


def test_three_calls_stop_after_a_no() -> None:
    found, asked, _ = extract(three(judge="No."), calls="three")
    assert found == Left("not_solvable")
    assert asked == [JUDGE]


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        (three(judge="maybe"), "unreadable_judgement"),
        (three(judge=""), "unreadable_judgement"),
        (three(logic=(LOGIC, "length")), "truncated"),
        (three(code=("```python\nprint(", "length")), "truncated"),
        (three(code=CODE), "not_one_block"),
        (three(code="```python\nprint("), "not_one_block"),
        (three(code="```python\n1\n```\n```python\n2\n```"), "not_one_block"),
        (three(code="```latex\n1\n```"), "not_one_block"),
        (three(code="```python\n\n```"), "empty_code"),
    ],
)
def test_each_way_in_which_three_calls_go_wrong_leaves_the_step(replies: Any, reason: str) -> None:
    assert extract(replies, calls="three")[0] == Left(reason)


def guarded(logic: str, code: str = CODE, step: str = STEP, **fields: Any) -> Extraction | Left:
    reply = json.dumps({"solvable": True, "logic": logic, "code": code})
    return extract({ONE: reply}, step, **fields)[0]


@pytest.mark.parametrize(
    ("logic", "code", "reason"),
    [
        (LOGIC, " \n", "empty_code"),
        (f"{LOGIC}\n```python\nprint(1)\n```", CODE, "fence_in_logic"),
        (f"{LOGIC}\n```output\n12\n```", CODE, "fence_in_logic"),
        (f"{LOGIC}\n```", CODE, "fence_in_logic"),
        (f"{LOGIC} \\boxed{{12}}", CODE, "answers_beyond_step"),
        (f"{LOGIC} </think>", CODE, "thinking_mark_in_logic"),
        (f"<think> {LOGIC}", CODE, "thinking_mark_in_logic"),
        ("The total number of pens can be computed by a product", CODE, "drift"),
        (" ".join(reversed(LOGIC.split())), CODE, "drift"),
        (f"{LOGIC} I will now go on to solve the rest of this problem on my own", CODE, "drift"),
    ],
)
def test_what_goes_beyond_the_step_is_refused(logic: str, code: str, reason: str) -> None:
    assert guarded(logic, code) == Left(reason)
    assert isinstance(guarded(LOGIC), Extraction), "control"


def test_a_boxed_answer_may_stay_but_not_change() -> None:
    step = f"{LOGIC} 12, that is \\boxed{{12}}."
    assert isinstance(guarded(f"{LOGIC} \\boxed{{12}}.", step=step), Extraction)
    assert isinstance(guarded(LOGIC, step=step), Extraction)
    assert guarded(f"{LOGIC} \\boxed{{13}}.", step=step) == Left("answers_beyond_step")


def test_the_drift_guard_is_a_setting() -> None:
    drifted = "The total number of pens can be computed by a product"
    assert guarded(drifted, min_overlap=0.6) == Left("drift")
    assert isinstance(guarded(drifted, min_overlap=0.0), Extraction)


def test_what_keeps_a_step_apart_from_the_one_before_it_is_kept() -> None:
    assert guarded(LOGIC, step="\n  " + STEP) == Extraction("\n  " + LOGIC, CODE)


WORDS = st.lists(st.sampled_from("abcd"), max_size=80)


@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_the_textbooks(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
    assert lcs(a, b) == table[-1][-1]


@given(WORDS.map(" ".join), st.data())
def test_taking_words_away_is_no_drift(step: str, data: st.DataObject) -> None:
    kept = [w for w in step.split() if data.draw(st.booleans())]
    assert overlap(" ".join(kept), step) == 1.0


@pytest.mark.parametrize("profile", ["compact", "full"])
@pytest.mark.parametrize("calls", ["one", "three"])
def test_what_goes_over_the_wire_is_a_template_around_the_step(calls: Any, profile: Any) -> None:
    """9.1 no. 12, byte for byte: prompts of two steps differ in nothing but the step."""

    def wire(step: str) -> list[str]:
        by_word = {"yes or no": "yes", "Can code": "yes", "python block": "```python\n1\n```"}

        def chat(user: str, seed: int) -> str:
            return next((reply for word, reply in by_word.items() if word in user), "XLOGICX")

        server = Server(chat=chat)
        with FakeEndpoint(http(server)) as fake:

            async def ask() -> None:
                address = EndpointConfig(base_url=fake.base_url, model="fake")
                config = ExtractorConfig(endpoint=address, calls=calls, min_overlap=0)
                async with Endpoint(address) as endpoint:
                    extractor = CodeExtractor(endpoint, config, profile)
                    await extractor.extract(step, seed=1, meter=Usage())

            asyncio.run(ask())
            return [json.dumps(r.json) for r in fake.requests]

    first, second = wire("STEPONE"), wire("STEPTWO")
    assert len(first) >= (1 if calls == "one" else 3)
    assert [p.replace("STEPONE", "STEPTWO") for p in first] == second
    assert first != second, "control: the step is there"


def test_the_critic_is_asked_not_to_think_unless_the_user_says_otherwise() -> None:
    _, _, server = extract({ONE: GOOD})
    assert server.sent("/chat/completions")[0]["chat_template_kwargs"] == {"enable_thinking": False}
    _, _, server = extract({ONE: GOOD}, chat_template_kwargs={})
    assert "chat_template_kwargs" not in server.sent("/chat/completions")[0]


@pytest.mark.parametrize("kind", ["text", "json_object", "json_schema"])
def test_a_response_format_is_asked_for_in_the_one_call_only(kind: Any) -> None:
    _, _, server = extract({ONE: "no json", **three()}, response_format=kind)
    kinds = [b.get("response_format", {}).get("type") for b in server.sent("/chat/completions")]
    assert kinds == [None if kind == "text" else kind, None, None, None]


def test_every_call_of_an_extraction_has_a_seed_of_its_own() -> None:
    _, _, server = extract({ONE: "no json", **three()})
    seeds = [body["seed"] for body in server.sent("/chat/completions")]
    assert len(set(seeds)) == 4
    assert seeds == [b["seed"] for b in extract({ONE: "", **three()})[2].sent("/chat/completions")]
