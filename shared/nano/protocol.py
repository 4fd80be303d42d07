"""What goes over the wire: request bodies of the OpenAI and vLLM interfaces, and their replies.

Fields and shapes are vLLM's, so that a client cannot tell the nano server from it; the contract
test compares both. Fields unknown to us are ignored, as vLLM does; known ones that would change
the result and that we do not support are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.nano.sampling import SamplingParams, TokenLogprob
from shared.nano.text import TextCodec

JsonObject = dict[str, Any]
_FLOOR = -9999.0  # JSON has no -inf; vLLM writes this instead
_UNSUPPORTED = (
    "best_of", "echo", "frequency_penalty", "guided_choice", "guided_grammar", "guided_json",
    "guided_regex", "logit_bias", "min_p", "min_tokens", "presence_penalty", "prompt_logprobs",
    "repetition_penalty", "structured_outputs", "suffix", "tools", "use_beam_search",
)  # fmt: skip
_NEUTRAL = {"repetition_penalty": (1, None), "best_of": (1, None)}


class ApiError(Exception):
    """Becomes an error reply of OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param

    def body(self) -> JsonObject:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Sampled(BaseModel):
    """Parameters that both generating interfaces share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=1000, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = 1
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: JsonObject | None = None

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> _Sampled:
        given = self.model_extra or {}
        for name in _UNSUPPORTED:
            if given.get(name) not in _NEUTRAL.get(name, (None, 0, False, [], {}, "")):
                raise ValueError(f"the nano server does not support `{name}`")
        kind = (self.response_format or {"type": "text"}).get("type")
        if kind != "text":
            raise ValueError(f"the nano server does not support response_format {kind!r}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options can only be defined when `stream=True`.")
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if "" in (self.stop or []):
            raise ValueError("stop cannot contain an empty string.")
        return self

    def sampling(
        self, defaults: JsonObject, *, max_tokens: int, logprobs: int | None
    ) -> SamplingParams:
        """`defaults` come from generation_config.json, for what the request leaves open."""

        def chosen(name: str, fallback: float) -> float:
            value = getattr(self, name)
            return float(defaults.get(name, fallback) if value is None else value)

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=chosen("temperature", 1.0),
            top_p=chosen("top_p", 1.0),
            top_k=max(0, int(chosen("top_k", 0))),
            seed=self.seed,
            stop=tuple(self.stop or ()),
            include_stop=self.include_stop_str_in_output,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
        )


class CompletionRequest(_Sampled):
    prompt: str | list[int]
    max_tokens: Annotated[int | None, Field(ge=1)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    add_special_tokens: bool = True


class _Chat(BaseModel):
    messages: Annotated[list[JsonObject], Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: JsonObject | None = None

    def plain_messages(self) -> list[JsonObject]:
        """Messages with text parts joined by newlines, as vLLM does for text-only templates."""
        return [
            {**message, "content": _flat_text(message.get("content"))} for message in self.messages
        ]


def _flat_text(content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(str(text) for text in texts)
    raise ApiError(400, "message content must be a string or a list of text parts")


class ChatRequest(_Sampled, _Chat):
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("when using `top_logprobs`, `logprobs` must be set to true.")
        return self


class TokenizeText(BaseModel):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChat(_Chat):
    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def usage(prompt_tokens: int, completion_tokens: int) -> JsonObject:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
    }


class LogprobListing:
    """The log-probabilities of one choice as JSON, whole or piece by piece of a stream."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._before: list[int] = []
        self._offset = 0

    def completion(self, entries: Sequence[TokenLogprob], count: int) -> JsonObject:
        """The lists of /v1/completions, with `count` alternatives."""
        listing: JsonObject = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []
        }  # fmt: skip
        for entry in entries:
            text = self._text(entry.token)
            top: JsonObject = {}
            # The sampled token is always listed, even beyond the `count` best.
            for token, logprob in ((entry.token, entry.logprob), *entry.top[:count]):
                top.setdefault(self._text(token), max(logprob, _FLOOR))
            listing["text_offset"].append(self._offset)
            listing["token_logprobs"].append(max(entry.logprob, _FLOOR))
            listing["tokens"].append(text)
            listing["top_logprobs"].append(top)
            self._before.append(entry.token)
            self._offset += len(text)
        return listing

    def chat(self, entries: Sequence[TokenLogprob]) -> JsonObject:
        """The content list of /v1/chat/completions."""
        content = []
        for entry in entries:
            top = [self._chat_token(token, logprob) for token, logprob in entry.top]
            content.append({**self._chat_token(entry.token, entry.logprob), "top_logprobs": top})
            self._before.append(entry.token)
        return {"content": content}

    def _text(self, token: int) -> str:
        return self._codec.token_text(token, self._before)

    def _chat_token(self, token: int, logprob: float) -> JsonObject:
        text = self._text(token)
        return {"token": text, "logprob": max(logprob, _FLOOR), "bytes": list(text.encode())}
