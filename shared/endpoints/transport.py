"""An HTTP client whose replies are bounded in memory.

Neither httpx nor the openai library bounds a body that it reads whole, and a compressed one may
grow a thousandfold while it is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2

from shared.endpoints.config import EndpointConfig, is_loopback

MAX_REPLY_BYTES = 8 * 2**20
"""Forty times a reply of 32 768 tokens with their ids."""

_CHUNK_OVERHEAD = 64  # bytes that Python spends on a chunk: a reply of tiny chunks is bounded too


class UnreadableReplyError(httpx2.TransportError):
    """The body is longer than MAX_REPLY_BYTES, or encoded although we asked for it plain."""


class BoundedClient(httpx2.AsyncClient):
    """`httpx2.AsyncClient` that reads at most MAX_REPLY_BYTES of a reply.

    It has a connection for every request that a server may ever have in flight, so that its pool
    never queues one.
    Proxies of the environment are honoured, except for a server on this machine.
    """

    def __init__(self, config: EndpointConfig, url: str) -> None:
        super().__init__(
            limits=httpx2.Limits(
                max_connections=config.concurrency,
                max_keepalive_connections=config.concurrency,
                # uvicorn (vLLM, nano) drops an idle connection after 5 s: be first, or a request
                # goes out on a connection that is being closed.
                keepalive_expiry=4.0,
            ),
            timeout=httpx2.Timeout(config.timeout, connect=config.connect_timeout, pool=None),
            headers={"Accept-Encoding": "identity"},
            trust_env=not is_loopback(url),
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
