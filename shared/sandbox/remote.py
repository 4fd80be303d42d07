"""A sandbox behind HTTP: SandboxFusion's `/run_code`, or ours (`tirgen sandbox serve`).

Same calls and outcomes as `Sandbox`, but no sessions. What always holds:
- A server that cannot be reached, hangs, or replies with nonsense is an infrastructure error that
  says so. A lost connection and 502, 503, 504 are tried again, at most TRIES times: to run the same
  code twice harms nobody.
- A reply costs at most MAX_REPLY bytes of memory.
- The token is in no error and no repr.
One thread of its own has the connections, so any thread and any event loop of the process may use
it; open it after a fork.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx2
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from shared.errors import ConfigError, SandboxError
from shared.sandbox.fusion import MAX_TIMEOUT, ReplyError, request_body, result_of
from shared.sandbox.limits import Limits
from shared.sandbox.load import Load
from shared.sandbox.result import CodeError, Outcome, RunResult, Tier

T = TypeVar("T")

TRIES = 3
MAX_REPLY = 16 << 20  # bytes
PATIENCE = 120.0  # seconds that a run may wait for its turn at the server
TOKEN = "TIRGEN_SANDBOX_TOKEN"
_CONNECT = 5.0
_CHECK = 10.0
_AGAIN = {502, 503, 504}
_BACKOFF = wait_random_exponential(multiplier=0.2, max=5.0)


class _TransientError(Exception):
    """Worth another try."""


class RemoteSandbox:
    """A backend at `url` (with or without the final /run_code).

    Opening asks the server who it is. One of ours tells its tier, which must reach `minimum_tier`;
    another's runs are recorded under tier `remote`. `token` is read from TIRGEN_SANDBOX_TOKEN.
    Raises ConfigError for what is no URL, SandboxError where the server does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        minimum_tier: Tier = Tier.B,
        token: str | None = None,
        limits: Limits | None = None,
        concurrency: int = 256,
        patience: float = PATIENCE,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{url!r} is not an http(s) URL.", where="sandbox_url",
                remedy="for instance http://127.0.0.1:8080",
            )  # fmt: skip
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                "The URL must not carry credentials, a query or a fragment.",
                where="sandbox_url", remedy=f"put the token into {TOKEN}",
            )  # fmt: skip
        self.url = url.rstrip("/").removesuffix("/run_code")
        self.minimum_tier, self.limits, self.patience = minimum_tier, limits or Limits(), patience
        self.tier: Tier | None = None
        self.load = Load(concurrency)
        self._token = token or os.environ.get(TOKEN, "").strip()
        self._concurrency = concurrency
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner: int | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx2.AsyncClient | None = None

    # ---- life ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, and learn the server's tier."""
        if self._owner is not None:
            raise SandboxError("This sandbox was opened before.", remedy="make another one")
        self._loop, self._owner = asyncio.new_event_loop(), os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="remote")
        self._thread.start()
        try:
            self.tier = self._submit(self._ask()).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every run. In a forked copy of the owner: does nothing."""
        if self._owner != os.getpid() or self._loop is None or self._thread is None:
            return
        self._owner = -1
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.open)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    # ---- runs ------------------------------------------------------------------------------------

    def run(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult:
        """Run a whole program there; as `Sandbox.run`. SandboxFusion counts wall time and does not
        know the seed."""
        with self.load.one():
            future = self._submit(self._run(code, seed, timeout))
            try:
                return future.result()
            except BaseException:
                future.cancel()
                raise

    async def arun(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult:
        """`run` for an event loop; cancelling it closes the connection, and ours kills the run."""
        with self.load.one():
            return await asyncio.wrap_future(self._submit(self._run(code, seed, timeout)))

    async def _run(self, code: str, seed: int, timeout: float) -> RunResult:
        if not 0 < timeout <= MAX_TIMEOUT:
            raise ValueError(f"timeout={timeout}: not within 0 and {MAX_TIMEOUT:g} s")
        body = json.dumps(request_body(code, seed, timeout)).encode()
        ends = self.limits.wall(timeout) + self.patience
        try:
            reply = await self._patiently("POST", "/run_code", ends, body)
            return self._cut(result_of(reply))
        except (ReplyError, SandboxError) as error:
            return self._infrastructure_error(str(error))

    def _cut(self, result: RunResult) -> RunResult:
        """A foreign server may keep more than we do."""
        out, lost_out = _first_bytes(result.stdout, self.limits.output)
        err, lost_err = _first_bytes(result.stderr, self.limits.output)
        cut = result.bytes_cut + lost_out + lost_err
        return replace(result, stdout=out, stderr=err, bytes_cut=cut)

    def _infrastructure_error(self, reason: str) -> RunResult:
        error = CodeError("Infrastructure", reason, None, "")
        tier = self.tier or Tier.REMOTE
        return RunResult(Outcome.INFRASTRUCTURE_ERROR, "", reason, error, tier, 0.0, 0.0, 0, 0)

    # ---- HTTP, all of it on the own thread's loop ------------------------------------------------

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None or self._owner != os.getpid():
            work.close()
            raise SandboxError("The sandbox is not open.", remedy="use it in a `with` block")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _ask(self) -> Tier:
        host = urlsplit(self.url).hostname or ""
        self._client = httpx2.AsyncClient(
            limits=httpx2.Limits(
                max_connections=self._concurrency,
                max_keepalive_connections=self._concurrency,
                keepalive_expiry=4.0,  # before uvicorn drops it, after 5 s
            ),
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._token}"} if self._token else {}),
            trust_env=host not in ("127.0.0.1", "::1", "localhost"),
        )
        try:
            told = await self._patiently("GET", "/health", _CHECK)
        except ReplyError:  # no such page: not one of ours
            await self._foreign()
            return Tier.REMOTE
        if not isinstance(told, dict) or told.get("tier") not in set(Tier):
            return Tier.REMOTE
        tier = Tier(told["tier"])
        if tier is not Tier.REMOTE and tier > self.minimum_tier:
            raise SandboxError(
                f"The sandbox server has tier {tier}, and {self.minimum_tier} is the minimum.",
                where=self.url, remedy=f"accept minimum_tier={tier}, or see `tirgen doctor` there",
            )  # fmt: skip
        return tier

    async def _foreign(self) -> None:
        try:
            await self._patiently("GET", "/v1/ping", _CHECK)
        except ReplyError as error:
            raise SandboxError(
                f"This is no sandbox server: {error}", where=self.url,
                remedy="it should speak SandboxFusion's /run_code; `tirgen sandbox serve` does",
            ) from error  # fmt: skip

    async def _patiently(
        self, method: str, path: str, seconds: float, body: bytes | None = None
    ) -> object:
        """The decoded reply. Raises SandboxError for a server that does not answer or refuses us,
        ReplyError for one that answers otherwise."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, _TransientError)),
            wait=_BACKOFF, stop=stop_after_attempt(TRIES), reraise=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(seconds):
                return await retrying(self._once, method, path, body)
        except TimeoutError as error:
            raise SandboxError(
                f"The sandbox server did not answer within {seconds:g} s.", where=self.url,
                remedy="look whether it is overloaded or hangs",
            ) from error  # fmt: skip
        except _TransientError as error:
            raise SandboxError(
                f"The sandbox server cannot be used: {error}", where=self.url,
                remedy="start it (`tirgen sandbox serve`), or correct sandbox_url",
            ) from error  # fmt: skip

    async def _once(self, method: str, path: str, body: bytes | None) -> object:
        assert self._client is not None
        timeout = httpx2.Timeout(None, connect=_CONNECT)  # the whole is timed by the caller
        try:
            async with self._client.stream(
                method, self.url + path, content=body, timeout=timeout
            ) as response:
                text = bytearray()
                async for chunk in response.aiter_raw():
                    text += chunk
                    if len(text) > MAX_REPLY:
                        raise ReplyError(f"the reply is longer than {MAX_REPLY} bytes")
        except httpx2.TransportError as error:
            raise _TransientError(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
        except httpx2.HTTPError as error:
            raise ReplyError(f"{type(error).__name__}: {error}") from error
        said = text[:500].decode("utf-8", "replace")
        match response.status_code:
            case 200:
                return _decoded(bytes(text))
            case 401 | 403:
                raise SandboxError(
                    f"The sandbox server refuses us: {said}", where=self.url,
                    remedy=f"set {TOKEN} to the server's token",
                )  # fmt: skip
            case status if status in _AGAIN:
                raise _TransientError(f"HTTP {status}: {said}")
            case status:
                raise ReplyError(f"HTTP {status}: {said}")

    async def _end(self) -> None:
        others: Callable[[asyncio.Task[Any]], bool] = lambda t: t is not asyncio.current_task()  # noqa: E731
        tasks = list(filter(others, asyncio.all_tasks()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()


def _decoded(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = text[:200].decode("utf-8", "replace")
        raise ReplyError(f"the reply is not JSON: {said!r}") from error


def _first_bytes(text: str, keep: int) -> tuple[str, int]:
    """At most `keep` bytes of `text`, and how many more there were."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) <= keep:
        return raw.decode("utf-8", "replace"), 0
    return raw[:keep].decode("utf-8", "replace"), len(raw) - keep
