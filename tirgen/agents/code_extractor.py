"""The code extractor (π_critic): judges a step, keeps its logic, turns the rest into code.

It is given the isolated step and nothing else: no method here takes a problem or an answer, and a
test asserts it on what goes over the wire. Its reply is hostile until checked: one that is cut off,
goes beyond the step, or rewrites the author's words is refused, and the step stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.endpoints import Completion, Endpoint, Usage
from shared.fences import Kind, parse
from shared.grading.extract import last_boxed
from shared.prompts import Name, Profile, render
from tirgen.agents.reasoner import BEGIN_THINK, END_THINK
from tirgen.config import ExtractorConfig
from tirgen.seeds import derive


class Reply(BaseModel):
    """What the one-call prompt asks for."""

    model_config = ConfigDict(extra="ignore", strict=True)

    solvable: bool
    logic: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Extraction:
    """The step with its computation taken out (r_logic), and the code a_t that carries it out."""

    logic: str
    code: str


@dataclass(frozen=True, slots=True)
class Left:
    """The step stays as it is; `reason` says why, as a stable word that is counted."""

    reason: str


class CodeExtractor:
    def __init__(self, endpoint: Endpoint, config: ExtractorConfig, prompts: Profile) -> None:
        self._endpoint, self._config, self._prompts = endpoint, config, prompts

    async def extract(self, step: str, *, seed: int, meter: Usage) -> Extraction | Left:
        """JudgeCodeSolvable, ExtractLogic, ConvertToCode (Alg. 1) on one step."""
        reply: Reply | Left | None = None
        if self._config.calls == "one":
            reply = await self._one_call(step, seed, meter)
        if reply is None:
            reply = await self._three_calls(step, seed, meter)
        if isinstance(reply, Left):
            return reply
        if not reply.solvable:
            return Left("not_solvable")
        return self._guard(step, reply)

    async def _one_call(self, step: str, seed: int, meter: Usage) -> Reply | None:
        """None where the reply is no such object: then three plain questions are asked."""
        reply = await self._ask("extractor", derive(seed, "one"), meter, step=step)
        if reply.finish_reason == "length":
            return None
        try:
            return Reply.model_validate_json(_json_part(reply.text))
        except ValidationError:
            return None

    async def _three_calls(self, step: str, seed: int, meter: Usage) -> Reply | Left:
        judged = await self._ask("extractor_judge", derive(seed, "judge"), meter, step=step)
        word = judged.text.strip().strip(".").lower()
        if word not in ("yes", "no"):
            return Left("unreadable_judgement")
        if word == "no":
            return Reply(solvable=False)
        logic = await self._ask("extractor_logic", derive(seed, "logic"), meter, step=step)
        code = await self._ask(
            "extractor_code", derive(seed, "code"), meter, step=step, logic=logic.text
        )
        if "length" in (logic.finish_reason, code.finish_reason):
            return Left("truncated")
        blocks = [b.body for b in parse(code.text) if b.kind is Kind.PYTHON and b.closed]
        if len(blocks) != 1:
            return Left("not_one_block")
        return Reply(solvable=True, logic=logic.text, code=blocks[0])

    async def _ask(self, name: Name, seed: int, meter: Usage, **values: str) -> Completion:
        content = render(self._prompts, name, **values)
        extra: dict[str, Any] = {}
        if self._config.chat_template_kwargs:
            extra["chat_template_kwargs"] = self._config.chat_template_kwargs
        if name == "extractor" and self._config.response_format != "text":
            extra["response_format"] = _response_format(self._config.response_format)
        return await self._endpoint.chat(
            [{"role": "user", "content": content}],
            self._config.sampling(self._config.max_tokens),
            seed=seed,
            meter=meter,
            **extra,
        )

    def _guard(self, step: str, reply: Reply) -> Extraction | Left:
        """9.1 no. 13: the splice replaces the step, so it may only take away from it."""
        lead = step[: len(step) - len(step.lstrip())]  # what keeps it apart from the step before
        logic, code = lead + reply.logic.strip(), reply.code.strip("\n")
        if not code.strip():
            return Left("empty_code")
        if any(block.kind is not Kind.TEXT for block in parse(logic)):
            return Left("fence_in_logic")
        if BEGIN_THINK in logic or END_THINK in logic:
            return Left("thinking_mark_in_logic")
        if last_boxed(logic) not in (None, last_boxed(step)):
            return Left("answers_beyond_step")
        if overlap(logic, step) < self._config.min_overlap:
            return Left("drift")
        return Extraction(logic, code)


def overlap(logic: str, step: str) -> float:
    """ROUGE-L precision: share of `logic`'s words found, in order, among `step`'s. 1 if empty."""
    words = logic.split()
    return lcs(words, step.split()) / len(words) if words else 1.0


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; bit-parallel (Hyyrö 2004), for long steps.

    A row of the usual table is one integer: bit j is 0 where the row grows at b[j].
    """
    places: dict[str, int] = {}
    for j, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << j
    full = (1 << len(b)) - 1
    row = full
    for word in a:
        grown = row & places.get(word, 0)
        row = ((row + grown) | (row - grown)) & full
    return len(b) - row.bit_count()


def _json_part(text: str) -> str:
    """The outermost braces: models like to wrap an object in a fence or a sentence."""
    return text[text.find("{") : text.rfind("}") + 1]


def _response_format(kind: str) -> dict[str, Any]:
    if kind == "json_object":
        return {"type": "json_object"}
    schema = {"name": "extraction", "schema": Reply.model_json_schema()}
    return {"type": "json_schema", "json_schema": schema}
