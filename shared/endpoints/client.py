"""The client of one endpoint.

What always holds:
- At most `concurrency` requests are in flight; a call that waits to retry keeps its permit, so a
  server that says 429 gets less to do. A permit comes back however a call ends, cancelled too.
- A call ends: one try within `timeout`, all of them and the waits between them within `deadline`,
  whatever the server trickles in meanwhile. Only the wait for a permit is not counted.
- A call that fails raises EndpointError and nothing else. Transient failures are retried, at most
  `max_retries` times, after what Retry-After asks plus a jittered exponential wait.
- A reply costs at most transport.MAX_REPLY_BYTES of memory.
- The API key is in no error, no config and no repr.
- Usage is complete when a call returns or raises: every request sent, every token reported.

An endpoint belongs to the event loop (and the process) that first uses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx2
import openai
from pydantic import ValidationError
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exception,
    wait_random_exponential,
)

from shared.endpoints.config import EndpointConfig, Sampling
from shared.endpoints.failures import Failures, is_transient, retry_after
from shared.endpoints.replies import (
    Billed,
    ChatReply,
    Completion,
    DetokenizeReply,
    ModelList,
    Part,
    TextReply,
    TokenizeReply,
)
from shared.endpoints.transport import BoundedClient
from shared.endpoints.usage import Usage
from shared.errors import EndpointError

BACKOFF = wait_random_exponential(multiplier=0.5, max=30.0)  # seconds, full jitter

CHECK_TIMEOUT = 10.0  # seconds; nobody waits longer to learn that a server is down

Message = Mapping[str, object]
R = TypeVar("R", bound=Part)


class Endpoint:
    """One model on one server; share it between all roles that the model plays.

    Raises ConfigError if the key cannot be sent; every call raises EndpointError (see failures.py).
    `meter` is the Usage of the role that calls, `meter["reasoner"]` of a UsageMeter.
    `extra` goes into the request body as it is (chat_template_kwargs, response_format,
    return_token_ids, ...) and wins over the fields set here; None removes a field.
    """

    def __init__(self, config: EndpointConfig) -> None:
        key = config.read_key()
        self.config = config
        self._failures = Failures(config, key)
        self._permits = asyncio.Semaphore(config.concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=key,
            max_retries=0,  # retried here, where each try has its deadline and is counted
            http_client=BoundedClient(config),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        seed: int | None = None,
        meter: Usage | None = None,
        **extra: object,
    ) -> Completion:
        """One assistant message for `messages` (role and content each)."""
        body = {"messages": list(messages)} | sampling.request_fields(seed) | extra
        return (await self._post("/chat/completions", body, ChatReply, meter)).completion()

    async def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        seed: int | None = None,
        meter: Usage | None = None,
        **extra: object,
    ) -> Completion:
        """The continuation of a text or of token ids, with the ids that were sampled.

        The ids need vLLM or nano; `return_token_ids=None` for a server that refuses the field.
        """
        own = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        body = own | {"return_token_ids": True} | sampling.request_fields(seed) | extra
        return (await self._post("/completions", body, TextReply, meter)).completion()

    async def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text` (vLLM, nano); no BOS unless asked, so that pieces can be joined."""
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        return (await self._post(self.config.root_url + "/tokenize", body, TokenizeReply)).tokens

    async def tokenize_chat(
        self, messages: Sequence[Message], **chat_template_kwargs: object
    ) -> list[int]:
        """Token ids of the rendered conversation, up to where the assistant speaks (vLLM, nano)."""
        body = {
            "messages": list(messages),
            "add_generation_prompt": True,
            "chat_template_kwargs": chat_template_kwargs or None,
        }
        return (await self._post(self.config.root_url + "/tokenize", body, TokenizeReply)).tokens

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids (vLLM, nano)."""
        body = {"tokens": list(ids)}
        return (
            await self._post(self.config.root_url + "/detokenize", body, DetokenizeReply)
        ).prompt

    async def check(self) -> tuple[str, ...]:
        """The names of the models that the server has; raises if ours is not one of them.

        One try: a preflight that fails should say so at once.
        """
        url = self.config.base_url + "/models"
        seconds = min(CHECK_TIMEOUT, self.config.timeout)
        async with self._permits:
            reply = await self._try("get", url, None, ModelList, seconds, Usage())
        models = tuple(model.id for model in reply.data)
        if self.config.model not in models:
            raise self._failures.model_missing(url, models)
        return models

    async def _post(
        self, path: str, fields: Mapping[str, object], reply: type[R], meter: Usage | None = None
    ) -> R:
        """Send until it succeeds, or may not be sent again. `path` is relative to base_url."""
        url = path if path.startswith("http") else self.config.base_url + path
        fields = {"model": self.config.model, **fields}
        body = {name: value for name, value in fields.items() if value is not None}
        clock = asyncio.get_running_loop().time
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait_exception(retry_after) + BACKOFF,
            stop=stop_after_attempt(1 + self.config.max_retries)
            | stop_before_delay(self.config.deadline),
            reraise=True,
        )
        spent = Usage()
        try:
            async with self._permits:
                ends = clock() + self.config.deadline

                async def attempt() -> R:
                    seconds = min(self.config.timeout, ends - clock())
                    return await self._try("post", url, body, reply, seconds, spent)

                return await retrying(attempt)
        except EndpointError:
            spent.failures = 1
            raise
        finally:
            spent.retries = max(0, spent.requests - 1)
            if meter is not None:
                meter.add(spent)

    async def _try(
        self,
        method: Literal["get", "post"],
        url: str,
        body: Mapping[str, object] | None,
        reply: type[R],
        seconds: float,
        spent: Usage,
    ) -> R:
        """One exchange: its reply within `seconds`, or EndpointError; `spent` is added to."""
        clock = asyncio.get_running_loop().time
        began = clock()
        spent.requests += 1
        try:
            async with asyncio.timeout(seconds):
                if method == "get":
                    response = await self._client.get(url, cast_to=httpx2.Response)
                else:
                    response = await self._client.post(url, cast_to=httpx2.Response, body=body)
        except TimeoutError as error:
            raise self._failures.timeout(url, seconds) from error
        except openai.APIConnectionError as error:
            raise self._failures.connection(url, error) from error
        except openai.APIStatusError as error:
            raise self._failures.status(url, error) from error
        except ValueError as error:
            raise self._failures.unsendable(url, error) from error
        finally:
            spent.seconds += clock() - began
        return self._parse(url, response.content, reply, spent)

    def _parse(self, url: str, raw: bytes, reply: type[R], spent: Usage) -> R:
        try:
            parsed = reply.model_validate_json(raw)
        except ValidationError as error:
            with suppress(ValidationError):  # what a useless reply cost may still be known
                _count(Billed.model_validate_json(raw), spent)
            raise self._failures.bad_reply(url, raw, error) from error
        if isinstance(parsed, Billed):
            _count(parsed, spent)
        return parsed


def _count(reply: Billed, spent: Usage) -> None:
    spent.prompt_tokens += reply.usage.prompt_tokens
    spent.completion_tokens += reply.usage.completion_tokens
