"""The reasoner: where a step ends, what backtracking keeps, and what its server is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.endpoints import EndpointConfig, Usage
from shared.trajectory import Problem
from tests.scripted import ASSISTANT, USER, InMemory, Server, encode, split
from tirgen.agents.reasoner import Draft, Reasoner
from tirgen.config import ReasonerConfig

HEADER = [USER, *encode("Q"), ASSISTANT]
ENDPOINT = EndpointConfig(base_url="http://memory/v1", model="scripted")


def make(server: Server, **fields: Any) -> Reasoner:
    config = ReasonerConfig(endpoint=ENDPOINT, **{"l_step": 64, **fields})
    return Reasoner(InMemory(server), config, "compact")


def step(
    said: str,
    *,
    response: str = "",
    room: int = 10_000,
    begun: str = "",
    seed: int = 1,
    **fields: Any,
) -> Draft:
    """The draft where the reasoner would say `said`, counted from the end of `response`."""
    server = Server(lambda user, before, seed: said.removeprefix(before.removeprefix(response)))
    return asyncio.run(
        make(server, **fields).step(
            [*HEADER, *encode(response)], room=room, seed=seed, meter=Usage(), begun=begun
        )
    )


def test_a_paragraph_is_a_step_and_short_ones_stay_short() -> None:
    """No minimum window: the release skips thoughts below 2048 tokens (method.md 1.2)."""
    assert step("Hi.\n\nThere.\n\nEnd.") == Draft("Hi.\n\n", ended=False)


def test_the_last_paragraph_ends_the_turn() -> None:
    assert step("End.") == Draft("End.", ended=True)
    assert step("") == Draft("", ended=True)


def test_a_window_goes_over_paragraphs_up_to_l_step() -> None:
    assert step("a\n\nb", boundary="window") == Draft("a\n\nb", ended=True)
    long = "word. " * 30
    assert step(long, boundary="window") == Draft("word. " * 10, ended=False)


@pytest.mark.parametrize("boundary", ["paragraph", "window"])
@given(said=st.text(alphabet="ab .\n`é", max_size=200), room=st.integers(1, 100))
def test_a_step_is_a_prefix_of_what_was_said_and_no_longer_than_its_limits(
    boundary: str, said: str, room: int
) -> None:
    draft = step(said, room=room, boundary=boundary)
    assert said.startswith(draft.text)
    assert len(draft.text.encode()) <= min(64, room)
    assert not draft.ended or draft.text == said


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("a" * 20 + "\n\n" + "b. " * 30, "a" * 20 + "\n\n"),
        ("a" * 20 + ". " + "b\n" * 30, "a" * 20 + ". "),
        ("a" * 20 + "\n" + "b" * 90, "a" * 20 + "\n"),
        ("a" * 90, "a" * 64),
    ],
)
def test_a_step_that_reached_l_step_is_cut_at_the_first_mark_that_occurs(
    said: str, kept: str
) -> None:
    assert step(said, boundary="window") == Draft(kept, ended=False)


BLOCK = "```python\na = 1\n\nprint(a)\n```\n"


def test_a_blank_line_inside_a_block_ends_no_step() -> None:
    draft = step(f"See:\n{BLOCK}\nThus.\n\nEnd.")
    assert draft == Draft(f"See:\n{BLOCK}\n", ended=False)


def test_a_block_that_does_not_fit_any_more_starts_a_step_of_its_own() -> None:
    draft = step("First some words. " * 2 + "\n" + BLOCK + "more", boundary="window")
    assert draft == Draft("First some words. " * 2 + "\n", ended=False)


def test_a_cut_never_falls_into_a_block() -> None:
    draft = step("x\n" + BLOCK + "y" * 90, boundary="window")
    assert BLOCK in draft.text
    long = "```python\n" + "a = 1\n\n" * 20
    assert step(long).text == long[:64], "a block longer than a step is left to the graph to refuse"


@pytest.mark.parametrize("boundary", ["paragraph", "window"])
def test_what_backtracking_kept_counts_towards_l_step_and_is_never_cut_off(boundary: str) -> None:
    begun = "One. Two. "
    draft = step(begun + "c" * 90, begun=begun, boundary=boundary)
    assert draft.text == begun + "c" * 54
    draft = step(begun + "d. " + "c" * 90, begun=begun, boundary=boundary)
    assert draft.text == begun + "d. "


def test_what_was_kept_is_in_the_prompt_after_the_untouched_header() -> None:
    server = Server(lambda user, response, seed: "rest")
    reasoner = make(server)
    draft = asyncio.run(
        reasoner.step([*HEADER, *encode("so ")], room=99, seed=1, meter=Usage(), begun="far ")
    )
    (body,) = server.sent("/completions")
    assert split(body["prompt"]) == ("Q", "so far ")
    assert draft.text == "far rest"


TEXTS = st.text(alphabet="ab é😀\n", max_size=30)


@given(TEXTS, st.integers(1, 40))
def test_backtracking_keeps_a_prefix_and_drops_at_least_l_suf_tokens(text: str, l_suf: int) -> None:
    """9.1 no. 4, also where the cut falls inside a character, and never beyond the step's start."""
    kept = asyncio.run(make(Server()).backtrack(text, l_suf))
    assert text.startswith(kept)
    dropped = len(text.encode()) - len(kept.encode())
    assert dropped >= min(l_suf, len(text.encode()))
    assert dropped <= l_suf + 3, "a whole character at most above L_suf"


def open_(server: Server, thinking: bool) -> tuple[list[int], list[int], str]:
    opening = asyncio.run(make(server, thinking=thinking).open(Problem("2+2?", "4")))
    return opening.header, opening.response, opening.text


def test_a_thinking_response_starts_with_think() -> None:
    server = Server()
    assert open_(server, True)[1:] == (encode("<think>\n"), "<think>\n")
    assert server.requests[0][1]["chat_template_kwargs"] == {"enable_thinking": True}
    assert open_(server, False)[1:] == ([], "")


def test_a_template_that_opens_the_thinking_itself_is_not_doubled() -> None:
    header, response, text = open_(Server(header_tail="<think>\n"), True)
    assert (header[-8:], response, text) == (encode("<think>\n"), [], "<think>\n")


def test_think_in_the_problem_is_not_the_templates() -> None:
    server = Server(header_tail="\n")
    opening = asyncio.run(make(server, thinking=True).open(Problem("what is <think>", "4")))
    assert opening.response == encode("<think>\n")


def test_sampling_is_what_the_config_says() -> None:
    server = Server()
    asyncio.run(make(server, top_k=30).step(HEADER, room=9, seed=1, meter=Usage()))
    (body,) = server.sent("/completions")
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.6, 1.0, 30)
    assert (body["max_tokens"], body["stop"]) == (9, ["\n\n"])
    assert body["include_stop_str_in_output"] is True


def test_each_request_of_a_step_has_a_seed_of_its_own() -> None:
    """A step that goes on after a blank line in a block draws anew, but always the same."""

    def seeds(seed: int) -> list[int]:
        said = f"{BLOCK}\nEnd."
        server = Server(lambda user, response, seed: said[len(response) :])
        asyncio.run(make(server).step(HEADER, room=99, seed=seed, meter=Usage()))
        return [body["seed"] for body in server.sent("/completions")]

    assert seeds(1) == seeds(1)
    assert len(set(seeds(1) + seeds(2))) == len(seeds(1)) * 2 == 4
