"""Text on both sides of the nano model: tokenizer, chat template, and text that grows by tokens."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from shared.errors import InputError
from shared.nano.model import read_json

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how decoding shows a piece of a character
_PROMPT_TAIL = 6  # prompt tokens a decoder needs to see to place leading spaces


class PromptError(ValueError):
    """A request's messages cannot be turned into a prompt; the message is for the client."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for trainers; it renders its body unchanged."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 asks for

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class TextCodec:
    """Tokenizer and chat template of a model folder, with the settings of transformers."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self.tokenizer: Any = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises the bare class
            raise InputError(f"cannot read the tokenizer: {error}", where=str(path)) from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.ids: frozenset[int] = frozenset(self.tokenizer.get_vocab().values())
        config = read_json(folder / "tokenizer_config.json")
        named = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        named["unk_token"] = config.get("unk_token")
        self._special = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in named.items()
            if token is not None
        }
        eos = self._special.get("eos_token")
        self.eos_id: int | None = None if eos is None else self.tokenizer.token_to_id(eos)
        template = folder / "chat_template.jinja"
        self._source: str | None = (
            template.read_text(encoding="utf-8")
            if template.exists()
            else config.get("chat_template")
        )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(self._source) if self._source else None
        self._tokens: dict[int, str] = {}
        self._longest = max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def least_tokens(self, text: str) -> int:
        """A lower bound of a text's tokens without encoding it: huge prompts are refused early."""
        return len(text) // self._longest

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token: int, before: Sequence[int] = ()) -> str:
        """How one token reads in a log-probability listing, as vLLM writes it.

        A piece of a UTF-8 character reads as nothing, and the token that completes the character
        (with the sampled tokens `before` it) as the whole character.
        """
        if token not in self._tokens:
            self._tokens[token] = self.decode([token], skip_special_tokens=False)
        text = self._tokens[token]
        if not text.endswith(_UNFINISHED):
            return text
        for count in range(1, min(4, len(before)) + 1):
            context = list(before[-count:])
            whole = self.decode([*context, token], skip_special_tokens=False)
            if whole.endswith(_UNFINISHED):
                continue
            while context and self.token_text(context[-1]) == "":
                context.pop()
            return whole[len(self.decode(context, skip_special_tokens=False)) :]
        return ""

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation; the same text as transformers' apply_chat_template.

        Raises PromptError with the template's complaint, or if there is no template.
        """
        if self._template is None or self._source is None:
            raise PromptError("the model has no chat template; use /v1/completions")
        messages = [dict(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise PromptError(
                    "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
                )
            if not messages or not isinstance(messages[-1].get("content"), str):
                raise PromptError("continue_final_message needs a final message with text content")
            final = messages[-1]["content"]
            messages[-1]["content"] = final + _CONTINUE
        try:
            text = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special, **kwargs},
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"the chat template refused these messages: {error}") from error
        if not continue_final_message:
            return text
        if final.strip() not in text or _CONTINUE.strip() not in text:
            raise PromptError("the chat template drops the final message; it cannot be continued")
        at = text.rindex(_CONTINUE.strip())
        kept = text[:at]
        # Without the tag's trailing space the template trims messages, so ours is trimmed as well.
        return kept if text[at : at + len(_CONTINUE)] == _CONTINUE else kept.rstrip()


class GrowingText:
    """The text of tokens that arrive one by one, never ending inside a UTF-8 character.

    Only the few newest tokens are decoded again at each step, so the cost does not grow.
    """

    def __init__(self, codec: TextCodec, prompt: list[int], *, skip_special_tokens: bool) -> None:
        self._codec, self._skip = codec, skip_special_tokens
        self._ids = prompt[-_PROMPT_TAIL:]
        self._known = self._decode()  # text of _ids[:_read], already given out
        self._read = len(self._ids)

    def _decode(self) -> str:
        return self._codec.decode(self._ids, skip_special_tokens=self._skip)

    def add(self, token: int) -> str:
        """The text that this token completes, perhaps none yet."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(_UNFINISHED) or len(text) <= len(self._known):
            return ""
        new = text[len(self._known) :]
        del self._ids[: self._read]
        self._known = self._decode()
        self._read = len(self._ids)
        return new


def find_stop(text: str, new: int, stops: tuple[str, ...]) -> tuple[str, int] | None:
    """The first-listed stop string that the newest `new` characters complete, and where it begins.

    A stop string may begin in older text: stop strings cross token boundaries freely.
    """
    for stop in stops:
        at = text.find(stop, max(0, len(text) - new - len(stop) + 1))
        if at >= 0:
            return stop, at
    return None
