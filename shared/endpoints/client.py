"""The client of one model, on one server or on several.

What always holds:
- A server has as many requests in flight as its admission allows (admission.py), and a request goes
  where its trajectory is at home (balancer.py). A permit comes back however a try ends, cancelled
  too.
- A call ends: one try within `timeout`, all of them and the waits between them within `deadline`,
  whatever the server trickles in meanwhile. Only the wait for the first permit is not counted, and
  where no server is up that wait ends with `deadline` as well.
- A call that fails raises EndpointError and nothing else. Transient failures are retried, on
  another server if there is one, at most `max_retries` times (and once more for each further
  server), after what Retry-After asks plus a jittered exponential wait.
- A reply costs at most transport.MAX_REPLY_BYTES of memory.
- The API key is in no error, no config and no repr.
- Usage is complete when a call returns or raises: every request sent, every token reported.

An endpoint belongs to the event loop (and the process) that first uses it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx2
from pydantic import ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exception,
    wait_random_exponential,
)

from shared import tracing
from shared.endpoints.admission import Admission, Outcome, Ticket, View
from shared.endpoints.balancer import Balancer, Place
from shared.endpoints.config import EndpointConfig, Sampling
from shared.endpoints.failures import Failures, is_transient, outcome_of, retry_after
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

AT_ROOT = frozenset({"/tokenize", "/detokenize"})
"""What vLLM keeps beside /v1, not under it; it generates nothing."""

Message = Mapping[str, object]
R = TypeVar("R", bound=Part)


Learned = dict[tuple[EndpointConfig, str], Admission]
"""What is known of servers, by address, for as long as the process lives: give the same one to each
Endpoint of a process, and the next one of the same config begins where the last one ended."""


class Endpoint:
    """One model; share it between all roles that the model plays.

    Raises ConfigError if the key cannot be sent; every call raises EndpointError (see failures.py).
    `meter` is the Usage of the role that calls, `meter["reasoner"]` of a UsageMeter.
    `extra` goes into the request body as it is (chat_template_kwargs, response_format,
    return_token_ids, ...) and wins over the fields set here; None removes a field.
    """

    def __init__(self, config: EndpointConfig, learned: Learned | None = None) -> None:
        import openai  # half a second, for those alone who call a server

        key = config.read_key()
        self.config = config
        self._failures = Failures(config, key)
        learned = {} if learned is None else learned
        for url in config.base_urls:
            if (config, url) not in learned:
                learned[config, url] = _admission(config)
        self._balancer = Balancer(config.base_urls, [learned[config, u] for u in config.base_urls])
        self._clients = [
            openai.AsyncOpenAI(
                base_url=url,
                api_key=key,
                max_retries=0,  # retried here, where each try has its deadline and is counted
                http_client=BoundedClient(config, url),
            )
            for url in config.base_urls
        ]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._balancer.close()
        for client in self._clients:
            await client.close()

    def view(self) -> dict[str, View]:
        """How each server is doing, by address."""
        now = time.monotonic()
        pairs = zip(self.config.base_urls, self._balancer.admissions, strict=True)
        return {url: admission.view(now) for url, admission in pairs}

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
        return (await self._post("/tokenize", body, TokenizeReply)).tokens

    async def tokenize_chat(
        self, messages: Sequence[Message], **chat_template_kwargs: object
    ) -> list[int]:
        """Token ids of the rendered conversation, up to where the assistant speaks (vLLM, nano)."""
        body = {
            "messages": list(messages),
            "add_generation_prompt": True,
            "chat_template_kwargs": chat_template_kwargs or None,
        }
        return (await self._post("/tokenize", body, TokenizeReply)).tokens

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids (vLLM, nano)."""
        body = {"tokens": list(ids)}
        return (await self._post("/detokenize", body, DetokenizeReply)).prompt

    async def check(self) -> tuple[str, ...]:
        """The names of the models that the server has; raises if ours is not one of them.

        One try: a preflight that fails should say so at once. Of several servers, all that answer
        must have the model, and one must answer; the names are those that all of these have.
        """
        asked = (self._models(i) for i in range(len(self._clients)))
        said = await asyncio.gather(*asked, return_exceptions=True)
        found = [models for models in said if not isinstance(models, BaseException)]
        for error in said:
            if isinstance(error, BaseException) and not (found and is_transient(error)):
                raise error
        return tuple(name for name in found[0] if all(name in models for models in found))

    async def _models(self, server: int) -> tuple[str, ...]:
        url = self.config.base_urls[server] + "/models"
        seconds = min(CHECK_TIMEOUT, self.config.timeout)
        reply = await self._try(server, "get", url, None, ModelList, seconds, Usage())
        models = tuple(model.id for model in reply.data)
        if self.config.model not in models:
            raise self._failures.model_missing(url, models)
        return models

    async def _post(
        self,
        path: str,
        fields: Mapping[str, object],
        reply: type[R],
        meter: Usage | None = None,
    ) -> R:
        """Send until it succeeds, or may not be sent again. `path` is relative to the base URL."""
        fields = {"model": self.config.model, **fields}
        body = {name: value for name, value in fields.items() if value is not None}
        clock = asyncio.get_running_loop().time
        servers, spent = self._balancer.order(), Usage()
        failed: list[tuple[int, EndpointError]] = []  # by which server
        try:
            first: Place | None = await self._place(servers, self.config.deadline)
            ends = clock() + self.config.deadline

            async def attempt() -> R:
                nonlocal first
                place, first = first, None
                if place is None:
                    n = len(failed) % len(servers)  # that have been asked in this round
                    asked = {server for server, _ in failed[len(failed) - n :]}
                    rest = [i for i in servers if i not in asked]
                    place = await self._place(rest, ends - clock(), failed[-1][1])
                seconds = min(self.config.timeout, ends - clock())
                try:
                    return await self._permitted(*place, path, body, reply, seconds, spent)
                except EndpointError as error:
                    failed.append((place[0], error))
                    raise

            return await self._retrying(len(servers))(attempt)
        except EndpointError:
            spent.failures = 1
            raise
        finally:
            spent.retries = max(0, spent.requests - 1)
            if meter is not None:
                meter.add(spent)

    def _retrying(self, servers: int) -> AsyncRetrying:
        """Each server is asked once before any is waited for."""

        def wait(state: RetryCallState) -> float:
            if state.attempt_number < servers:
                return 0.0
            return wait_exception(retry_after)(state) + BACKOFF(state)

        return AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait,
            stop=stop_after_attempt(self.config.max_retries + servers)
            | stop_before_delay(self.config.deadline),
            reraise=True,
        )

    async def _place(
        self, order: Sequence[int], within: float, failed: EndpointError | None = None
    ) -> Place:
        """A server and a permit of it; where there is none in time, raises `failed`. Without that
        a server that is only busy is waited for."""
        while True:
            try:
                return await self._balancer.acquire(order, within)
            except TimeoutError:
                if failed is not None:
                    raise failed from failed.__cause__
                if self._balancer.is_down():
                    raise self._failures.down(self.config.base_url, within) from None

    async def _permitted(
        self,
        server: int,
        ticket: Ticket,
        path: str,
        body: Mapping[str, object],
        reply: type[R],
        seconds: float,
        spent: Usage,
    ) -> R:
        """One try under `ticket`, which is given back with what the try says about the server."""
        url, at_root = self.config.base_urls[server], path in AT_ROOT
        url = (url.removesuffix("/v1") if at_root else url) + path
        billed, made = spent.prompt_tokens + spent.completion_tokens, spent.completion_tokens
        outcome, asked_to_wait = Outcome.ABANDONED, 0.0
        try:
            with tracing.span(
                f"POST {path}", **{"url.full": url, "gen_ai.request.model": self.config.model}
            ):
                got = await self._try(server, "post", url, body, reply, seconds, spent)
            outcome, spent.base_url = Outcome.REPLY, self.config.base_urls[server]
            return got
        except EndpointError as error:
            outcome, asked_to_wait = outcome_of(error), retry_after(error)
            raise
        finally:
            self._balancer.release(
                server,
                ticket,
                outcome,
                tokens=spent.prompt_tokens + spent.completion_tokens - billed,
                completion_tokens=None if at_root else spent.completion_tokens - made,
                retry_after=asked_to_wait,
            )

    async def _try(
        self,
        server: int,
        method: Literal["get", "post"],
        url: str,
        body: Mapping[str, object] | None,
        reply: type[R],
        seconds: float,
        spent: Usage,
    ) -> R:
        """One exchange: its reply within `seconds`, or EndpointError; `spent` is added to."""
        import openai

        clock = asyncio.get_running_loop().time
        client, options = self._clients[server], openai.RequestOptions(headers=tracing.headers())
        began = clock()
        spent.requests += 1
        try:
            async with asyncio.timeout(seconds):
                if method == "get":
                    response = await client.get(url, cast_to=httpx2.Response, options=options)
                else:
                    response = await client.post(
                        url, cast_to=httpx2.Response, body=body, options=options
                    )
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


def _admission(config: EndpointConfig) -> Admission:
    return Admission(
        least=config.min_concurrency,
        begin=config.start_concurrency,
        most=config.concurrency,
        now=time.monotonic(),  # the clock of asyncio's event loops
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
    )
