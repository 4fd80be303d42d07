"""The graph on blocks that the reasoner wrote itself, and on reasoners that think."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.sandbox.result import Outcome, RunResult
from shared.trajectory import End
from tests.scripted import ran, speech
from tests.scripted_graph import BOXED, SUFFIX, case, judged
from tirgen.agents.verifier import format_ok

# ---- the reasoner's own blocks (9.1 no. 3 and 12) ----------------------------------------------

OWN = "S0 let me see\n```python\na = 1\n\nprint(a)\n```\n```output\n999\n```"


def test_the_reasoners_own_block_is_executed_and_its_invented_output_dropped() -> None:
    made = case(speech(OWN, f"S1 {BOXED}"))
    trajectory = made.run()
    assert made.sandbox.runs[0][0] == "a = 1\n\nprint(a)"
    first = trajectory.steps[0]
    assert first.call is not None
    assert first.call.observation == "ran a = 1\n\nprint(a)"
    assert first.original == OWN.partition("```output")[0]
    assert "999" not in trajectory.text
    assert judged(made) == [f"S1 {BOXED}"], "the extractor has nothing to do with it"
    assert format_ok(trajectory).passed


def test_the_reasoners_own_block_is_rejected_if_so_set() -> None:
    made = case(speech(OWN, f"S1 {BOXED}"), reasoner={"own_blocks": "reject"})
    trajectory = made.run()
    assert trajectory.end is End.OWN_BLOCK
    assert made.sandbox.runs == []
    assert not format_ok(trajectory).passed


@pytest.mark.parametrize(
    "block",
    [
        "S0 hm\n```output\n7\n```",
        "S0 hm\n```output\n7",
        "S0 hm\n```python\nprint(7)",
        "S0 hm\n```output\n7\n```\n```python\nprint(7)\n```",
    ],
)
def test_a_block_that_nobody_can_execute_ends_the_trajectory(block: str) -> None:
    made = case(speech(block, f"S1 {BOXED}"))
    trajectory = made.run()
    assert trajectory.end is End.OWN_BLOCK
    assert made.sandbox.runs == []
    assert not format_ok(trajectory).passed


def test_own_blocks_are_charged_to_the_call_budget() -> None:
    made = case(speech("S0 CALC", OWN.replace("S0", "S1")), budgets={"calls": 1})
    trajectory = made.run()
    assert trajectory.end is End.OWN_BLOCK
    assert len(made.sandbox.runs) == 1


def test_backtracking_from_an_own_block_cuts_the_thought_and_not_the_code() -> None:
    """9.1 no. 4: the opening fence belongs to a^t."""

    def reasoner(user: str, response: str, seed: int) -> str:
        if "```" in response:
            return f"S1 {BOXED}"
        return f"{'' if 'S0' in response else 'S0 let me'} see\n```python\n{seed}\n```\n\n"

    failed: list[str] = []

    def outcome(code: str, seed: int) -> RunResult:
        failed.append(code)
        return ran(Outcome.MODEL_ERROR if len(failed) == 1 else Outcome.OK, "x")

    made = case(reasoner, outcome, correction=SUFFIX)
    trajectory = made.run()
    assert made.server.drafted()[1][0] == "S0 let me"
    assert trajectory.steps[0].thought == "S0 let me see"
    assert trajectory.steps[0].call is not None
    assert trajectory.steps[0].call.code != failed[0]
    assert format_ok(trajectory).passed


def test_other_fences_are_text_like_any_other() -> None:
    latex = "S0 see\n```latex\nx\n\ny\n```"
    trajectory = case(speech(latex, f"S1 {BOXED}")).run()
    assert trajectory.steps[0].thought == latex + "\n\n"
    assert trajectory.end is End.ANSWERED


def test_an_answer_in_an_observation_is_no_answer() -> None:
    made = case(
        speech("S0 CALC", "S1 dunno"), lambda code, seed: ran(Outcome.OK, f"{BOXED}\n```\n{BOXED}")
    )
    trajectory = made.run()
    assert BOXED in trajectory.text, "control"
    assert (trajectory.end, trajectory.answer) == (End.GAVE_UP, None)


# ---- thinking ----------------------------------------------------------------------------------

THINKING = {"thinking": True}


def test_nothing_after_the_thinking_goes_to_the_extractor() -> None:
    made = case(speech("S0 CALC one", "S1 two\n</think>", f"S2 CALC so {BOXED}"), reasoner=THINKING)
    trajectory = made.run()
    assert trajectory.text.startswith("<think>\nS0 one")
    assert judged(made) == ["S0 CALC one\n\n", "S1 two\n"]
    assert trajectory.n_calls == 1
    assert trajectory.text.endswith(f"S2 CALC so {BOXED}")
    assert (trajectory.end, trajectory.answer) == (End.ANSWERED, "7")


def ends_thinking(user: str, response: str, seed: int) -> str:
    """Says </think> again after the step before it was spliced."""
    if "S0" not in response:
        return f"S0 CALC one\n</think>\n\nS1 so {BOXED}"
    return f"S1 so {BOXED}" if "</think>" in response else f"</think>\n\nS1 so {BOXED}"


def test_a_whole_thinking_trajectory_is_well_formed() -> None:
    trajectory = case(ends_thinking, reasoner=THINKING).run()
    assert trajectory.text.count("</think>") == 1
    assert trajectory.n_calls == 1
    assert format_ok(trajectory).passed


def test_an_answer_inside_the_thinking_is_not_the_answer() -> None:
    trajectory = case(speech(f"S0 maybe {BOXED}", "S1 dunno"), reasoner=THINKING).run()
    assert (trajectory.end, trajectory.answer) == (End.GAVE_UP, None)
    assert case(speech(f"S0 maybe {BOXED}")).run().end is End.ANSWERED, "control: not thinking"


def test_an_own_block_before_the_end_of_thinking_is_executed() -> None:
    def reasoner(user: str, response: str, seed: int) -> str:
        if "S0" not in response:
            return f"{OWN}\n</think>\n\n{BOXED}"
        return f"</think>\n\n{BOXED}".removeprefix("</think>\n\n" if "</think>" in response else "")

    made = case(reasoner, reasoner={**THINKING, "boundary": "window"})
    trajectory = made.run()
    assert len(made.sandbox.runs) == 1
    assert "999" not in trajectory.text
    assert format_ok(trajectory).passed


def test_code_after_the_thinking_is_refused_by_format() -> None:
    def reasoner(user: str, response: str, seed: int) -> str:
        if "```output" in response:
            return BOXED
        own = "S0 and\n```python\nprint(7)\n```"
        return own if "</think>" in response else f"</think>\n\n{own}"

    trajectory = case(reasoner, reasoner=THINKING).run()
    assert trajectory.answer == "7", "control: nothing else is wrong"
    assert format_ok(trajectory).reason == "code after </think>"


def test_an_observation_cannot_end_the_thinking_nor_give_the_answer() -> None:
    """Code that prints </think> and a boxed answer must not look like a finished trajectory."""
    made = case(
        speech("S0 CALC one", "S1 CALC two"),
        lambda code, seed: ran(Outcome.OK, f"</think>\n{BOXED}"),
        reasoner=THINKING,
    )
    trajectory = made.run()
    assert "</think>" in trajectory.text, "control"
    assert trajectory.n_calls == 2, "the second step was still thinking"
    assert (trajectory.end, trajectory.answer) == (End.GAVE_UP, None)
    answered = replace(trajectory, end=End.ANSWERED, answer="7")
    assert format_ok(answered).reason == "not exactly one <think>...</think>"
