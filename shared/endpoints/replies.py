"""Replies, read strictly: a server is not trusted to send what it should.

Strict types, bounded counts and pydantic's own parser (which bounds nesting) instead of the
library's models, which accept anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]  # fits the database's integer
TokenIds = list[Count]


@dataclass(frozen=True)
class Completion:
    """One sampled reply.

    `text` is the answer; `reasoning` the thoughts that a server with a reasoning parser split off
    (None elsewhere, where thoughts are part of the text). `token_ids` are the sampled ids (length
    completion_tokens) and `logprobs` of each, if the server was asked for them and sends them.
    `stop_reason` (vLLM, nano): the stop string, or the id other than the tokenizer's own EOS, that
    ended it.
    """

    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning: str | None = None
    logprobs: tuple[float, ...] | None = None
    stop_reason: str | int | None = None


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Tokens(Part):
    prompt_tokens: Count
    completion_tokens: Count


class Billed(Part):
    """The least that is read of any reply: what it cost, even if nothing else can be used."""

    usage: Tokens


class Message(Part):
    content: str | None
    reasoning: str | None = None  # vLLM
    reasoning_content: str | None = None  # older vLLM, SGLang, DeepSeek


class ChatChoice(Part):
    message: Message
    finish_reason: str
    token_ids: TokenIds | None = None


class ChatReply(Billed):
    choices: Annotated[list[ChatChoice], Field(min_length=1)]

    def completion(self) -> Completion:
        choice = self.choices[0]
        message = choice.message
        return Completion(
            text=message.content or "",
            token_ids=None if choice.token_ids is None else tuple(choice.token_ids),
            finish_reason=choice.finish_reason,
            prompt_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens,
            reasoning=message.reasoning or message.reasoning_content,
        )


class TextLogprobs(Part):
    token_logprobs: list[Annotated[float, Field(allow_inf_nan=False)]]


class TextChoice(Part):
    text: str
    finish_reason: str
    token_ids: TokenIds | None = None
    logprobs: TextLogprobs | None = None
    stop_reason: str | int | None = None


class TextReply(Billed):
    choices: Annotated[list[TextChoice], Field(min_length=1)]

    def completion(self) -> Completion:
        choice = self.choices[0]
        return Completion(
            text=choice.text,
            token_ids=None if choice.token_ids is None else tuple(choice.token_ids),
            finish_reason=choice.finish_reason,
            prompt_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens,
            logprobs=None if choice.logprobs is None else tuple(choice.logprobs.token_logprobs),
            stop_reason=choice.stop_reason,
        )


class TokenizeReply(Part):
    tokens: TokenIds


class DetokenizeReply(Part):
    prompt: str


class Model(Part):
    id: str


class ModelList(Part):
    data: list[Model]
