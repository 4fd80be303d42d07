"""The fence parser: what is an action, what is not, and that chunks cannot change the answer."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shared.fences import Block, FenceParser, Kind, action, observation, parse, prose

PIECES = st.sampled_from(
    [
        "```", "```python\n", "```py\n", "```output\n", "```latex\n", "~~~\n", "````\n", "\n",
        "python", "# this is python\n", "x = 1\n", " ", "    ", "`", "text", "\r\n", "``` \n",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join)


@given(TEXTS)
def test_blocks_joined_are_the_input(text: str) -> None:
    assert "".join(block.raw for block in parse(text)) == text


@given(TEXTS, st.lists(st.integers(0, 200), max_size=10))
def test_chunk_boundaries_change_nothing(text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parser = FenceParser()
    blocks = [b for i, j in itertools.pairwise(edges) for b in parser.feed(text[i:j])]
    assert blocks + parser.finish() == parse(text)


@given(TEXTS)
def test_only_the_last_block_can_be_open(text: str) -> None:
    assert all(block.closed for block in parse(text)[:-1])


@given(st.text(alphabet="ab`\n ~#", max_size=40), st.text(alphabet="ab`\n ~", max_size=40))
def test_action_and_observation_survive_any_body(code: str, output: str) -> None:
    blocks = parse("thought" + action(code) + observation(output))
    assert [b.kind for b in blocks] == [Kind.TEXT, Kind.PYTHON, Kind.OUTPUT]
    assert [b.body for b in blocks[1:]] == [code, output]


def test_the_word_python_in_code_is_code() -> None:
    """The released extractor drops everything above such a line (method.md 2)."""
    code = "x = 1  # this is python\n# python\nprint(x)"
    assert parse(f"```python\n{code}\n```") == [
        Block(Kind.PYTHON, code, f"```python\n{code}\n```", closed=True)
    ]


def test_other_languages_pass_through() -> None:
    kinds = [b.kind for b in parse("```latex\nx\n```\n```pythonic\ny\n```\n```\nz\n```\n")]
    assert kinds == [Kind.OTHER, Kind.OTHER, Kind.OTHER]


def test_an_output_block_of_the_policy_is_not_an_action_nor_text() -> None:
    blocks = parse("a\n```output\n42\n```\nb")
    assert [b.kind for b in blocks] == [Kind.TEXT, Kind.OUTPUT, Kind.TEXT]


def test_an_unclosed_block_is_marked_open() -> None:
    (block,) = parse("```python\nprint(1)")
    assert not block.closed
    assert block.body == "print(1)"


def test_a_fence_in_the_middle_of_a_line_opens_nothing() -> None:
    assert [b.kind for b in parse("see ```python\nx\n")] == [Kind.TEXT]


def test_a_longer_fence_is_not_closed_by_a_shorter_one() -> None:
    (block,) = parse("````python\n```\n````")
    assert block.body == "```"


def test_prose_is_what_stands_outside_code_and_output() -> None:
    text = "a" + action("</think>") + observation("\\boxed{1}") + "b\n```latex\nc\n```\n"
    assert prose(text) == "a\nb\n```latex\nc\n```\n"
    assert prose("```python\nopen") == ""
