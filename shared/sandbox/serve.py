"""Our sandbox behind SandboxFusion's `/run_code`, for trainers that speak to that.

What always holds:
- Without a token it listens on loopback only, answers only to loopback names (so that no web page
  reaches it under a name of its own), and takes only application/json (so that none posts a form).
- With one, every request but `/v1/ping` needs it: `Authorization: Bearer TOKEN`, or as the password
  of the URL (`http://any:TOKEN@host:port/run_code`), which needs no change in a client.
- A request is at most MAX_BODY bytes; at most `zygotes` run, MAX_WAITING wait, more get 503.
- A client that leaves takes its run with it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import json
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import Response
from pydantic import ValidationError

from shared.errors import ConfigError, SandboxError
from shared.sandbox.fusion import RunCodeRequest, reply_body
from shared.sandbox.limits import Limits
from shared.sandbox.pool import Sandbox
from shared.sandbox.result import RunResult
from shared.sandbox.stdin import with_stdin

MAX_BODY = 4 << 20  # bytes
MAX_WAITING = 1024
MIN_TOKEN = 16  # characters


@dataclass(frozen=True)
class ServedLimits(Limits):
    """Clients of this protocol give up some 10 s after `run_timeout` (verl): be done by then."""

    def wall(self, timeout: float) -> float:
        return timeout + 5.0


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    sandbox: Sandbox,
    host: str,
    port: int,
    token: str | None,
    announce: Callable[[str], None],
) -> None:
    """Serve an open sandbox until SIGTERM or SIGINT; `announce` is given the URL when it listens.

    Raises ConfigError for an address that needs a token and has none, or cannot be listened on.
    """
    if token is None and not is_loopback(host):
        raise ConfigError(
            "A sandbox that others can reach needs a token.",
            where=f"--host {host}",
            remedy="set TIRGEN_SANDBOX_TOKEN, for instance to the output of "
            "`python -c 'import secrets; print(secrets.token_urlsafe())'`",
        )
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or " " in token):
        raise ConfigError(
            f"The token must have at least {MIN_TOKEN} ASCII characters and no space.",
            where="TIRGEN_SANDBOX_TOKEN or --token",
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen: {error}", where=f"{host}:{port}", remedy="choose another --port"
        ) from error
    with listener:
        bound = listener.getsockname()[1]
        announce(f"http://{f'[{host}]' if ':' in host else host}:{bound}")
        config = uvicorn.Config(
            create_app(sandbox, token), log_level="warning", timeout_graceful_shutdown=5
        )
        uvicorn.Server(config).run(sockets=[listener])


def create_app(sandbox: Sandbox, token: str | None = None) -> FastAPI:
    """The routes, over a sandbox that is open."""
    app = FastAPI(title="tirgen sandbox", docs_url=None, redoc_url=None, openapi_url=None)
    under_way = 0

    def guard(request: Request) -> None:
        if token is None:
            if not is_loopback(request.url.hostname or ""):
                raise HTTPException(403, "without a token this server is for loopback names only")
        elif not secrets.compare_digest(_given_token(request).encode(), token.encode()):
            raise HTTPException(401, "wrong or missing token", {"WWW-Authenticate": "Bearer"})

    @app.post("/run_code", dependencies=[Depends(guard)])
    async def run_code(request: Request) -> Response:
        nonlocal under_way
        asked = _parse(request, await _body(request))
        if under_way >= sandbox.zygotes + MAX_WAITING:
            raise HTTPException(503, "too many runs are waiting", {"Retry-After": "1"})
        under_way += 1
        try:
            code = with_stdin(asked.code, asked.stdin)
            result = await _unless_gone(
                request, sandbox.arun(code, seed=asked.seed, timeout=asked.run_timeout)
            )
        except SandboxError as error:
            raise HTTPException(503, str(error)) from error
        finally:
            under_way -= 1
        return _json(reply_body(result))

    @app.get("/health", dependencies=[Depends(guard)])
    async def health() -> Response:
        return _json({"status": "ok", "tier": sandbox.tier, "zygotes": sandbox.zygotes,
                      "under_way": under_way})  # fmt: skip

    @app.get("/v1/ping")
    async def ping() -> str:
        return "pong"

    return app


def _json(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body), media_type="application/json")  # ASCII, whatever a run wrote


def _given_token(request: Request) -> str:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(value).decode().partition(":")[2]
    return ""


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY} bytes")
    return bytes(body)


def _parse(request: Request, body: bytes) -> RunCodeRequest:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send Content-Type: application/json")
    try:
        asked = RunCodeRequest.model_validate(json.loads(body))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()]
        raise HTTPException(422, "; ".join(wrong)) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    if (missing := asked.unsupported()) is not None:
        raise HTTPException(422, missing)
    return asked


async def _unless_gone(request: Request, running: Any) -> RunResult:
    """The result; if the client disconnects first, the run is cancelled, which kills it."""
    work, leaving = asyncio.create_task(running), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(499, "the client has gone")
        result: RunResult = work.result()
        return result
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
