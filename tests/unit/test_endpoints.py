"""Claims of shared/endpoints about replies, failures, retries and deadlines.

Every request here crosses a real loopback connection to a scripted server.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import socket
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import httpx2
import openai
import pytest
from pydantic import ValidationError
from tenacity import wait_none

from shared.endpoints import Completion, Endpoint, EndpointConfig, Sampling, Usage, client
from shared.endpoints.failures import retry_after
from shared.endpoints.transport import MAX_REPLY_BYTES
from shared.errors import ConfigError, EndpointError
from tests.fake_endpoint import (
    FakeEndpoint,
    Reply,
    chat,
    completion,
    error,
    models,
    ok,
    sequence,
    usage,
)

ASK = [{"role": "user", "content": "1+1?"}]
GREEDY = Sampling(temperature=0.0, max_tokens=8)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what Retry-After asks is waited for, so that no test depends on chance."""
    monkeypatch.setattr(client, "BACKOFF", wait_none())
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def config(base_url: str, **fields: Any) -> EndpointConfig:
    small: dict[str, Any] = {"timeout": 5.0, "deadline": 20.0, "max_retries": 2, "concurrency": 8}
    return EndpointConfig(base_url=base_url, model="fake", **small | fields)


def call(
    server_url: str, use: Callable[[Endpoint], Awaitable[Any]] | None = None, **fields: Any
) -> Any:
    """The result of `use` (default: one chat) on an endpoint of its own."""

    async def main() -> Any:
        async with Endpoint(config(server_url, **fields)) as endpoint:
            return await (use(endpoint) if use else endpoint.chat(ASK, GREEDY))

    return asyncio.run(main())


def patience(reply: Reply) -> float:
    """A short timeout for replies that never end, none to speak of for the others."""
    return 0.3 if reply.stall or reply.chunks is not None else 15.0


def failure(
    server_url: str, use: Callable[[Endpoint], Awaitable[Any]] | None = None, **fields: Any
) -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        call(server_url, use, **fields)
    assert caught.value.where is not None
    assert server_url in caught.value.where
    return caught.value


# -- what is sent and read ------------------------------------------------------------------------


def test_chat_sends_every_setting_and_reads_the_reply() -> None:
    """The body holds the sampling, the seed and extras as given; unset fields are not sent."""
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=7, stop=("```",), include_stop=True)

    with FakeEndpoint(sequence(chat("two", prompt_tokens=5, completion_tokens=3))) as server:
        reply = call(
            server.base_url,
            lambda e: e.chat(ASK, sampling, seed=11, chat_template_kwargs={"thinking": False}),
        )
    assert reply == Completion("two", None, "stop", 5, 3)
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].json == {
        "model": "fake",
        "messages": ASK,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "stop": ["```"],
        "include_stop_str_in_output": True,
        "seed": 11,
        "chat_template_kwargs": {"thinking": False},
    }


def test_an_extra_of_none_removes_a_field() -> None:
    """Servers that refuse max_tokens (OpenAI's newer models) can be spoken to."""
    with FakeEndpoint(sequence(chat("two"))) as server:
        call(
            server.base_url,
            lambda e: e.chat(ASK, GREEDY, max_tokens=None, max_completion_tokens=8),
        )
    assert "max_tokens" not in server.requests[0].json
    assert server.requests[0].json["max_completion_tokens"] == 8


def test_complete_sends_token_ids_and_returns_the_sampled_ones() -> None:
    """Prompt ids go out untouched; the ids that were sampled come back as they were sent."""
    with FakeEndpoint(
        sequence(completion("ab", token_ids=[7, 8], completion_tokens=2, finish_reason="length"))
    ) as server:
        reply = call(server.base_url, lambda e: e.complete([1, 2, 3], GREEDY, seed=0))
    assert reply == Completion("ab", (7, 8), "length", 1, 2)
    body = server.requests[0].json
    assert (body["prompt"], body["return_token_ids"], body["seed"]) == ([1, 2, 3], True, 0)


def test_tokenize_and_detokenize_speak_to_the_server_root() -> None:
    """vLLM keeps /tokenize and /detokenize beside /v1, not under it."""

    def script(path: str, body: Any) -> Reply:
        return ok({"prompt": "hi"} if path == "/detokenize" else {"tokens": [1, 2], "count": 2})

    async def use(endpoint: Endpoint) -> tuple[list[int], list[int], str]:
        return (
            await endpoint.tokenize("hi"),
            await endpoint.tokenize_chat(ASK, enable_thinking=False),
            await endpoint.detokenize([1, 2]),
        )

    with FakeEndpoint(script) as server:
        assert call(server.base_url, use) == ([1, 2], [1, 2], "hi")
    assert [r.path for r in server.requests] == ["/tokenize", "/tokenize", "/detokenize"]
    text, conversation, _ = (r.json for r in server.requests)
    assert text == {"model": "fake", "prompt": "hi", "add_special_tokens": False}
    assert conversation["messages"] == ASK
    assert conversation["chat_template_kwargs"] == {"enable_thinking": False}


def test_thoughts_that_the_server_split_off_are_kept() -> None:
    """A reasoning parser's half of the reply is not lost, and a null content is an empty text."""
    message = {"role": "assistant", "content": None, "reasoning": "hmm"}
    body = {"choices": [{"message": message, "finish_reason": "length"}], "usage": usage(1, 1)}
    with FakeEndpoint(sequence(ok(body))) as server:
        reply = call(server.base_url)
    assert (reply.text, reply.reasoning) == ("", "hmm")


# -- preflight ------------------------------------------------------------------------------------


def test_check_returns_the_models_of_a_good_server() -> None:
    with FakeEndpoint(sequence(error(500)), models=models("fake", "other")) as server:
        assert call(server.base_url, Endpoint.check) == ("fake", "other")


@pytest.mark.parametrize(
    ("reply", "kind", "in_remedy"),
    [
        (models("a", "b"), "model_not_found", "a, b"),
        (error(401), "unauthorized", "OPENAI_API_KEY is not set"),
        (error(404, "Not Found"), "bad_request", "/v1"),
        (Reply(b"<html>hello</html>"), "bad_reply", "OpenAI-compatible"),
        (Reply(b"", 307, {"Location": "/elsewhere"}), "bad_request", "/v1"),
        (error(503), "server_error", "log"),
        (Reply(stall=True), "timeout", "timeout"),
    ],
)
def test_check_says_what_is_wrong_and_what_to_do(reply: Reply, kind: str, in_remedy: str) -> None:
    """A preflight makes one request, and its error tells the user what to change."""
    with FakeEndpoint(sequence(chat("no")), models=reply) as server:
        caught = failure(server.base_url, Endpoint.check, timeout=patience(reply))
    assert caught.kind == kind
    assert in_remedy in (caught.remedy or "")
    assert len(server.requests) == 1


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_is_down_is_unreachable() -> None:
    caught = failure(f"http://127.0.0.1:{closed_port()}/v1", Endpoint.check)
    assert (caught.kind, caught.retryable) == ("unreachable", True)
    assert "tirgen up" in (caught.remedy or "")


# -- failures of calls ----------------------------------------------------------------------------

MISSING_MODEL = error(404, "The model `fake` does not exist.")
OVERFLOW = error(400, "This model's maximum context length is 4096 tokens. However, you requested")
NO_CREDIT = error(429, "You exceeded your current quota", code="insufficient_quota")


@pytest.mark.parametrize(
    ("reply", "kind", "retryable", "requests"),
    [
        (error(401), "unauthorized", False, 1),
        (error(403), "unauthorized", False, 1),
        (MISSING_MODEL, "model_not_found", False, 1),
        (error(404, "Not Found"), "bad_request", False, 1),
        (OVERFLOW, "context_overflow", False, 1),
        (error(422, "temperature must be positive"), "bad_request", False, 1),
        (NO_CREDIT, "rate_limited", False, 1),
        (error(429), "rate_limited", True, 3),
        (error(500), "server_error", True, 3),
        (error(503), "server_error", True, 3),
        (error(408), "timeout", True, 3),
        (Reply(reset=True), "unreachable", True, 3),
        (Reply(stall=True), "timeout", True, 3),
        (Reply(chunks=itertools.repeat(b" "), pause=0.02), "timeout", True, 3),
    ],
)
def test_each_failure_has_its_kind_and_only_transient_ones_are_sent_again(
    reply: Reply, kind: str, retryable: bool, requests: int
) -> None:
    """max_retries=2: three requests for what may pass, one for what cannot."""
    with FakeEndpoint(sequence(reply)) as server:
        caught = failure(server.base_url, timeout=patience(reply))
    assert (caught.kind, caught.retryable) == (kind, retryable)
    assert len(server.requests) == requests


def of_message(message: object, **fields: object) -> Reply:
    choice = {"message": message, "finish_reason": "stop"}
    return ok({"choices": [choice], "usage": usage(1, 1)} | fields)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"<html>502</html>"),
        Reply(b""),
        Reply(b'{"choices": ['),
        Reply(b"\xff\xfe"),
        Reply(b"[" * 100_000),
        ok([]),
        ok({"error": "overloaded"}),
        ok({"choices": [], "usage": usage(1, 1)}),
        ok({"usage": usage(1, 1)}),
        of_message({"content": 5}),
        of_message({}),
        of_message("text"),
        of_message({"content": "x"}, usage=None),
        of_message({"content": "x"}, usage={"prompt_tokens": -1, "completion_tokens": 1}),
        of_message({"content": "x"}, usage={"prompt_tokens": 1, "completion_tokens": 10**30}),
        of_message({"content": "x"}, usage={"prompt_tokens": "1", "completion_tokens": 1}),
        Reply(gzip.compress(b" " * 10**7), headers={"Content-Encoding": "gzip"}),
    ],
)
def test_a_reply_that_is_none_is_a_bad_reply(reply: Reply) -> None:
    """A 200 that breaks the API's promise is never a Completion, and no other exception."""
    with FakeEndpoint(sequence(reply)) as server:
        caught = failure(server.base_url)
    assert (caught.kind, caught.retryable) == ("bad_reply", True)
    assert len(server.requests) == 1


def test_the_raw_text_of_a_bad_reply_is_kept_and_capped() -> None:
    with FakeEndpoint(sequence(Reply("é".encode() * 10_000))) as server:
        raw = failure(server.base_url).raw
    assert raw == "é" * 2048  # 4096 bytes


@pytest.mark.parametrize("chunk", [b" " * 2**16, b"  "], ids=["large chunks", "tiny chunks"])
def test_a_reply_that_floods_is_cut_off_by_its_size(chunk: bytes) -> None:
    """Memory is bounded, not only time; the control: an unbounded reader would take it all."""
    held = len(chunk) + 33  # what a chunk costs Python at least
    flood = 2 * MAX_REPLY_BYTES // held
    taken = itertools.count()
    chunks = (chunk for _ in zip(range(flood), taken, strict=False))
    with FakeEndpoint(sequence(Reply(chunks=chunks))) as server:
        caught = failure(server.base_url, timeout=20.0)
    assert caught.kind == "bad_reply"
    assert "longer than" in caught.what
    assert next(taken) < flood


def test_text_that_no_json_can_carry_is_a_bad_request() -> None:
    """A lone surrogate in a message fails as an EndpointError, before anything is sent."""
    with FakeEndpoint(sequence(chat("no"))) as server:
        bad = [{"role": "user", "content": "\ud800"}]
        caught = failure(server.base_url, lambda e: e.chat(bad, GREEDY))
    assert (caught.kind, caught.retryable) == ("bad_request", False)
    assert server.requests == []


# -- retries and deadlines ------------------------------------------------------------------------


def test_a_storm_of_429_that_ends_is_survived_and_retry_after_is_honoured() -> None:
    """No request comes sooner than the server asked for."""
    storm = error(429, headers={"Retry-After": "0.2"})
    with FakeEndpoint(sequence(storm, storm, chat("two"))) as server:
        assert call(server.base_url).text == "two"
    first, second, third = (r.at for r in server.requests)
    assert second - first >= 0.2
    assert third - second >= 0.2


def test_a_retry_after_beyond_the_deadline_fails_at_once() -> None:
    """Nobody sleeps for an hour to fail then: the error comes while the deadline is far away."""
    with FakeEndpoint(sequence(error(429, headers={"Retry-After": "3600"}))) as server:
        caught = failure(server.base_url, deadline=1000.0)  # pytest's own timeout is 60 s
    assert caught.kind == "rate_limited"
    assert len(server.requests) == 1


def test_the_deadline_ends_retries_that_have_tries_left() -> None:
    """Each try times out at 0.2 s and 1 000 retries are allowed: 0.5 s hold three at most."""
    with FakeEndpoint(sequence(Reply(stall=True))) as server:
        caught = failure(server.base_url, timeout=0.2, deadline=0.5, max_retries=1000)
    assert caught.kind == "timeout"
    assert 1 <= len(server.requests) <= 3


def test_retry_after_is_read_as_seconds_or_date_and_nonsense_is_ignored() -> None:
    def refused(header: str) -> EndpointError:
        response = httpx2.Response(
            429, headers={"Retry-After": header}, request=httpx2.Request("POST", "http://x/v1")
        )
        caught = EndpointError("no", kind="rate_limited", retryable=True)
        caught.__cause__ = openai.RateLimitError("no", response=response, body=None)
        return caught

    assert retry_after(refused("7")) == 7.0
    assert 50 < retry_after(refused(formatdate(time.time() + 60, usegmt=True))) <= 60
    for nonsense in ("-5", "nan", "inf", "soon", "", formatdate(0, usegmt=True), "9" * 400):
        assert retry_after(refused(nonsense)) == 0.0


# -- usage ----------------------------------------------------------------------------------------


def test_usage_counts_every_request_and_every_reported_token() -> None:
    """Two calls, one retried twice: what the server sent is what the meter says."""
    replies = sequence(
        error(500),
        error(429),
        chat("a", prompt_tokens=10, completion_tokens=4),
        chat("b", prompt_tokens=20, completion_tokens=5),
    )
    meter = Usage()

    async def use(endpoint: Endpoint) -> None:
        await endpoint.chat(ASK, GREEDY, meter=meter)
        await endpoint.chat(ASK, GREEDY, meter=meter)

    with FakeEndpoint(replies) as server:
        call(server.base_url, use)
    assert (meter.requests, meter.retries, meter.failures) == (4, 2, 0)
    assert (meter.prompt_tokens, meter.completion_tokens) == (30, 9)
    assert len(server.requests) == 4
    assert meter.seconds > 0


def test_usage_of_failed_calls_is_counted() -> None:
    """A call that gives up counts its requests; a useless reply still counts its tokens."""
    meter = Usage()
    with FakeEndpoint(sequence(error(500))) as server:
        failure(server.base_url, lambda e: e.chat(ASK, GREEDY, meter=meter))
    assert (meter.requests, meter.retries, meter.failures) == (3, 2, 1)

    meter = Usage()
    with FakeEndpoint(sequence(ok({"choices": [], "usage": usage(6, 7)}))) as server:
        failure(server.base_url, lambda e: e.chat(ASK, GREEDY, meter=meter))
    assert (meter.requests, meter.retries, meter.failures) == (1, 0, 1)
    assert (meter.prompt_tokens, meter.completion_tokens) == (6, 7)


# -- config and key -------------------------------------------------------------------------------


def test_the_key_is_sent_and_appears_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a server that echoes the key cannot bring it into an error, its text or the config."""
    key = "sk-very-secret"
    monkeypatch.setenv("MY_KEY", key + "\n")
    with FakeEndpoint(sequence(error(401, f"bad key {key}"))) as server:
        caught = failure(server.base_url, api_key_env="MY_KEY")
        assert key not in repr(config(server.base_url, api_key_env="MY_KEY"))
    assert server.requests[0].headers["authorization"] == f"Bearer {key}"
    assert "MY_KEY" in (caught.remedy or "")
    assert key not in f"{caught} {caught!r} {caught.raw}"
    assert "bad key [API key]" in (caught.raw or "")


def test_a_key_that_no_header_can_carry_fails_before_any_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-“quoted”")
    with pytest.raises(ConfigError) as caught:
        Endpoint(config("http://127.0.0.1:1/v1"))
    assert "OPENAI_API_KEY" in (caught.value.where or "")
    assert "quoted" not in str(caught.value)


def test_a_proxy_of_the_environment_does_not_take_loopback_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packaged server is on this machine; a proxy (here: a closed port) cannot reach it."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with FakeEndpoint(sequence(chat("two"))) as server:
        assert call(server.base_url).text == "two"


@pytest.mark.parametrize(
    "fields",
    [
        {"base_url": "127.0.0.1:8000/v1"},
        {"base_url": "ftp://host/v1"},
        {"base_url": "http://user:secret@host/v1"},
        {"concurrency": 0},
        {"timeout": 3600.0, "deadline": 60.0},
        {"api_key_env": "sk-abc"},
        {"modle": "typo"},
    ],
)
def test_a_bad_config_is_refused_when_it_is_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EndpointConfig(**{"base_url": "http://host/v1", "model": "m"} | fields)


def test_a_config_survives_its_own_json() -> None:
    """Fingerprints and stored runs depend on it."""
    one = config("http://host/v1/")
    assert EndpointConfig.model_validate(json.loads(one.model_dump_json())) == one
    assert one.base_url == "http://host/v1"
    assert one.root_url == "http://host"
