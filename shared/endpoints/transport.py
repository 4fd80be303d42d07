"""An HTTP client whose replies are bounded in memory, and whose cost does not grow with its load.

Neither httpx nor the openai library bounds a body that it reads whole, and a compressed one may
grow a thousandfold while it is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from shared.endpoints.config import EndpointConfig, is_loopback

MAX_REPLY_BYTES = 8 * 2**20
"""Forty times a reply of 32 768 tokens with their ids."""

# uvicorn (vLLM, nano) drops an idle connection after 5 s: be first, or a request goes out on a
# connection that is being closed.
KEEPALIVE = 4.0

_CHUNK_OVERHEAD = 64  # bytes that Python spends on a chunk: a reply of tiny chunks is bounded too


class UnreadableReplyError(httpx2.TransportError):
    """The body is longer than MAX_REPLY_BYTES, or encoded although we asked for it plain."""


class BoundedClient(httpx2.AsyncClient):
    """`httpx2.AsyncClient` that reads at most MAX_REPLY_BYTES of a reply.

    It has a connection for every request in flight: whatever its limit, nothing is queued here.
    Proxies of the environment are honoured, except for a server on this machine.
    """

    def __init__(self, config: EndpointConfig, url: str) -> None:
        trust_env = not is_loopback(url)
        proxied = trust_env and _is_proxied(url)
        super().__init__(
            transport=None if proxied else _Lanes(url),
            limits=httpx2.Limits(
                max_connections=config.concurrency,
                max_keepalive_connections=config.concurrency,
                keepalive_expiry=KEEPALIVE,
            ),
            timeout=httpx2.Timeout(config.timeout, connect=config.connect_timeout, pool=None),
            headers={"Accept-Encoding": "identity"},
            trust_env=trust_env,
        )

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, **kwargs: Any
    ) -> httpx2.Response:
        response = await super().send(request, stream=True, **kwargs)
        try:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise UnreadableReplyError("the reply is compressed, which was not asked for")
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Bounded(response.stream)
            if not stream:
                await response.aread()
        except BaseException:
            await response.aclose()
            raise
        return response


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        held = 0
        async for chunk in self._stream:
            held += len(chunk) + _CHUNK_OVERHEAD
            if held > MAX_REPLY_BYTES:
                raise UnreadableReplyError(f"the reply is longer than {MAX_REPLY_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Lanes(httpx2.AsyncBaseTransport):
    """A pool of one connection for each request in flight; the one that was used last goes first.

    httpcore's pool looks at all of its connections whenever one is asked for or given back: with
    256 in flight that was most of what a call cost (bench/service.py).
    """

    def __init__(self, url: str) -> None:
        # Made once, and without certificates where none is looked at: they take 0.1 s to read.
        self._context = httpx2.create_ssl_context(verify=urlsplit(url).scheme == "https")
        self._limits = httpx2.Limits(
            max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE
        )
        self._idle: list[httpx2.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self._idle:
            lane = self._idle.pop()
        else:
            lane = httpx2.AsyncHTTPTransport(verify=self._context, limits=self._limits)
        try:
            response = await lane.handle_async_request(request)
        except BaseException:
            await lane.aclose()
            raise
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Lent(response.stream, lambda: self._idle.append(lane))
        return response

    async def aclose(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()


class _Lent(httpx2.AsyncByteStream):
    """A reply's body; once it is closed, its connection may be used again."""

    def __init__(self, stream: httpx2.AsyncByteStream, give_back: Callable[[], None]) -> None:
        self._stream, self._give_back = stream, give_back
        self._closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._stream.aclose()
        self._give_back()


def _is_proxied(url: str) -> bool:
    parts, proxies = urlsplit(url), getproxies()
    known = parts.scheme in proxies or "all" in proxies
    return known and not proxy_bypass(parts.hostname or "")
