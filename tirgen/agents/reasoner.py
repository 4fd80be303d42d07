"""The reasoner (π_actor): writes one step at a time, continuing its own turn token by token.

Its server is asked by token ids (vLLM's /tokenize and token-id prompts): the chat header is
rendered once and never touched again, and L_step, L_suf and budgets count the policy's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.endpoints import Endpoint, Usage
from shared.fences import Kind, parse
from shared.prompts import Profile, render
from shared.trajectory import Problem
from tirgen.config import ReasonerConfig
from tirgen.seeds import derive

PARAGRAPH = "\n\n"
BEGIN_THINK, END_THINK = "<think>", "</think>"
HEADER_TAIL = 16  # tokens of the header that are looked at for a <think> of the template's own


@dataclass(frozen=True, slots=True)
class Opening:
    """The rendered prompt (token ids), and what the response starts with, as ids and as text."""

    header: list[int]
    response: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A step r_t as sampled. `ended`: the reasoner closed its turn after it.

    `block` is the python block, fences and all, that the reasoner wrote itself right after r_t.
    """

    text: str
    ended: bool
    block: str = ""


class Reasoner:
    def __init__(self, endpoint: Endpoint, config: ReasonerConfig, prompts: Profile) -> None:
        self._endpoint, self._config, self._prompts = endpoint, config, prompts

    async def open(self, problem: Problem) -> Opening:
        """The chat up to where the reasoner speaks; a thinking reasoner starts inside <think>."""
        content = render(self._prompts, "reasoner", problem=problem.text)
        header = await self._endpoint.tokenize_chat(
            [{"role": "user", "content": content}], enable_thinking=self._config.thinking
        )
        if not self._config.thinking:
            return Opening(header, [], "")
        text = BEGIN_THINK + "\n"
        tail = await self._endpoint.detokenize(header[-HEADER_TAIL:])
        if tail.rstrip().endswith(BEGIN_THINK):
            return Opening(header, [], text)  # some chat templates write it themselves
        return Opening(header, await self.tokens(text), text)

    async def step(
        self, context: Sequence[int], *, room: int, seed: int, meter: Usage, begun: str = ""
    ) -> Draft:
        """The next step after `context` (header and response so far).

        It has at most L_step and at most `room` tokens, with `begun`, the part that backtracking
        kept. A blank line inside a block ends no step.
        """
        config = self._config
        stop = (PARAGRAPH,) if config.boundary == "paragraph" else ()
        text, ids = begun, await self.tokens(begun)
        while True:
            left = max(1, min(config.l_step, room) - len(ids))
            reply = await self._endpoint.complete(
                [*context, *ids],
                config.sampling(left, stop),
                seed=derive(seed, len(ids)),
                meter=meter,
            )
            text += reply.text
            if reply.finish_reason == "length":
                return Draft(self._cut(text, len(begun)), ended=False)
            # Servers report a stop string and the end of the turn alike; only the text tells.
            if not (stop and reply.text.endswith(PARAGRAPH)):
                return Draft(text, ended=True)
            ids = await self.tokens(text)
            if parse(text)[-1].closed or len(ids) >= min(config.l_step, room):
                return Draft(text, ended=False)

    async def tokens(self, text: str) -> list[int]:
        return await self._endpoint.tokenize(text) if text else []

    async def backtrack(self, step: str, l_suf: int) -> str:
        """r_pre: the step without its last L_suf tokens, never less than nothing (9.1 no. 4)."""
        kept = (await self.tokens(step))[:-l_suf]
        text = await self._endpoint.detokenize(kept) if kept else ""
        while not step.startswith(text):  # a cut inside a character detokenizes to U+FFFD
            text = text[:-1]
        return text

    def _cut(self, text: str, at_least: int) -> str:
        """Cut a step that reached L_step back to a natural boundary, never into a block."""
        blocks = parse(text)
        if not blocks:
            return text
        start = len(text) - len(blocks[-1].raw)
        if not blocks[-1].closed and start > at_least:
            return text[:start]  # the block shall have a step of its own
        if blocks[-1].kind is Kind.TEXT:
            for mark in self._config.cut_at:
                end = text.rfind(mark, max(start, at_least))
                if end >= 0:
                    return text[: end + len(mark)]
        return text
