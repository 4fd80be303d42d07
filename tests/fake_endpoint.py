"""A scripted OpenAI-compatible server for tests: real HTTP on loopback, in threads.

    with FakeEndpoint(sequence(error(429), chat("hello"))) as server:
        ...EndpointConfig(base_url=server.base_url, model="fake")...
    assert len(server.requests) == 2

A script maps (path, JSON body) to a Reply. It runs in the thread of its connection, so it may
block, and it must be thread-safe; `server.requests` holds what came, in order.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self, cast


@dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    `body` is sent whole. If `chunks` is given it is sent instead, chunk by chunk, until it ends or
    the client leaves. `stall` sends the head and nothing more; `reset` breaks the connection.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    chunks: Iterable[bytes] | None = None
    pause: float = 0.0
    """Seconds between chunks."""
    stall: bool = False
    reset: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    json: Any
    """The body; bytes, where it was sent as something else."""
    headers: Mapping[str, str]
    """Names in lower case."""
    at: float
    """time.monotonic() of its arrival."""


Script = Callable[[str, Any], Reply]


def ok(body: object) -> Reply:
    return Reply(json.dumps(body).encode())


def error(
    status: int, message: str = "no", headers: Mapping[str, str] | None = None, **fields: object
) -> Reply:
    body = {"error": {"message": message, "type": "error", "code": status} | fields}
    return Reply(json.dumps(body).encode(), status, headers or {})


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat(
    text: str, *, prompt_tokens: int = 1, completion_tokens: int = 1, finish_reason: str = "stop"
) -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return ok({"choices": [choice], "usage": usage(prompt_tokens, completion_tokens)})


def completion(
    text: str,
    *,
    token_ids: list[int] | None = None,
    prompt_tokens: int = 1,
    completion_tokens: int = 1,
    finish_reason: str = "stop",
) -> Reply:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "token_ids": token_ids}
    return ok({"choices": [choice], "usage": usage(prompt_tokens, completion_tokens)})


def models(*names: str) -> Reply:
    return ok({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def sequence(*replies: Reply) -> Script:
    """The replies in order; the last one again for every later request."""
    lock, left = threading.Lock(), list(replies)

    def script(path: str, body: Any) -> Reply:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return script


class FakeEndpoint:
    """Context manager of the server. GET /v1/models answers `models`, all else the script."""

    def __init__(
        self,
        script: Script,
        *,
        models: Reply = models("fake"),
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.script, self.models = script, models
        self.requests: list[Request] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.closing = threading.Event()
        self.changed = threading.Condition()
        """Guards the three counts; notified when one changes."""
        self._server = _Server(self, address)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def wait_for(self, holds: Callable[[], bool], timeout: float = 20.0) -> None:
        """Block until `holds()`; in an event loop call it through asyncio.to_thread."""
        with self.changed:
            assert self.changed.wait_for(holds, timeout), "the awaited state was never reached"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a thread may wait on a keep-alive connection of a test's client
    request_queue_size = 512

    def __init__(self, owner: FakeEndpoint, address: tuple[str, int]) -> None:
        self.owner = owner
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave in the middle: that is what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 2**16  # head and body in one segment

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        raw = self.rfile.read(length)
        is_json = self.headers.get("content-type", "").startswith("application/json")
        self._answer(json.loads(raw) if is_json else raw)

    def _answer(self, body: Any) -> None:
        owner = cast(_Server, self.server).owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, body, headers, time.monotonic())
        with owner.changed:
            owner.requests.append(request)
            owner.in_flight += 1
            owner.max_in_flight = max(owner.max_in_flight, owner.in_flight)
            owner.changed.notify_all()
        try:
            listing = self.command == "GET" and self.path == "/v1/models"
            reply = owner.models if listing else owner.script(self.path, body)
        finally:
            # Before the reply is out: else its client's next request could be counted beside it.
            with owner.changed:
                owner.in_flight -= 1
                owner.changed.notify_all()
        self._send(owner, reply)

    def _send(self, owner: FakeEndpoint, reply: Reply) -> None:
        if reply.reset:
            linger = struct.pack("ii", 1, 0)  # close() sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        if reply.chunks is not None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(100 if reply.stall else len(reply.body)))
        self.end_headers()
        if reply.stall:
            self.wfile.flush()
            owner.closing.wait()
            self.close_connection = True
        elif reply.chunks is not None:
            for chunk in reply.chunks:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.flush()
                if owner.closing.wait(reply.pause):
                    break
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `requests` instead."""
