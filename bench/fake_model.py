"""A model server that costs almost nothing, for benchmarks of its clients: asyncio, no framework.

    python bench/fake_model.py --slots 256 --latency 1.0 [--failures 0.05]   prints its port

`slots` requests are served at a time, each in `latency` seconds on average; the others wait in
order and never hear a 429. `failures` is the share that is answered 500, at once. Every text is the
same: one step with a python block, then an answer, so that a whole trajectory can be made of it.
Tokens are the bytes of UTF-8. GET /counts tells what was served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import deque

STEP = "The product is needed.\n```python\nprint(6 * 7)\n```\n"
ANSWER = "So the answer is \\boxed{42}."
CHAT = "First add the two numbers, then multiply by three. " * 20


def http(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def reply(fields: dict[str, object], text: str) -> bytes:
    usage = {"prompt_tokens": 500, "completion_tokens": 250, "total_tokens": 750}
    choice = {"index": 0, "finish_reason": "stop", **fields}
    body = {"id": "x", "object": text, "created": 1, "model": "fake", "choices": [choice]}
    return http(json.dumps({**body, "usage": usage}).encode())


CHATTED = reply({"message": {"role": "assistant", "content": CHAT}}, "chat.completion")
STEPPED = reply({"text": STEP, "logprobs": None}, "text_completion")
ANSWERED = reply({"text": ANSWER, "logprobs": None}, "text_completion")
MODELS = http(json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}).encode())
BROKEN = http(b'{"error": {"message": "broken"}}', "500 Internal Server Error")


class Model:
    def __init__(self, slots: int, latency: float, failures: float) -> None:
        self.slots, self.latency, self.failures = slots, latency, failures
        self.served = self.busy = self.most = 0
        self.waiting: deque[tuple[Connection, bytes]] = deque()
        self.draw = random.Random(1)

    def ask(self, to: Connection, answer: bytes) -> None:
        if self.failures and self.draw.random() < self.failures:
            to.send(BROKEN)
        elif not self.latency:
            self.served += 1
            to.send(answer)
        elif self.busy < self.slots:
            self.busy += 1
            self.most = max(self.most, self.busy)
            seconds = self.latency * self.draw.uniform(0.5, 1.5)  # else all come and go as one
            asyncio.get_running_loop().call_later(seconds, self.done, to, answer)
        else:
            self.waiting.append((to, answer))

    def done(self, to: Connection, answer: bytes) -> None:
        self.busy -= 1
        self.served += 1
        to.send(answer)
        if self.waiting:
            self.ask(*self.waiting.popleft())


class Connection(asyncio.Protocol):
    def __init__(self, model: Model) -> None:
        self.model, self.held = model, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.held += data
        while (end := self.held.find(b"\r\n\r\n")) >= 0:
            head = self.held[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.held) < end + 4 + length:
                return
            body = self.held[end + 4 : end + 4 + length]
            path = self.held.split(b" ", 2)[1]
            self.held = self.held[end + 4 + length :]
            self.answer(path, body)

    def answer(self, path: bytes, body: bytes) -> None:
        if path.endswith(b"/chat/completions"):
            self.model.ask(self, CHATTED)
        elif path.endswith(b"/completions"):
            # The response so far holds an output fence once the step has been run.
            ids = json.loads(body)["prompt"]
            text = ids if isinstance(ids, str) else bytes(ids).decode(errors="replace")
            self.model.ask(self, ANSWERED if "```output" in text else STEPPED)
        elif path.endswith(b"/detokenize"):
            text = bytes(json.loads(body)["tokens"]).decode(errors="replace")
            self.send(http(json.dumps({"prompt": text}).encode()))
        elif path.endswith(b"/tokenize"):
            asked = json.loads(body)
            text = asked.get("prompt") or asked["messages"][0]["content"]
            text = text.replace("```output", "")  # the prompt may speak of it
            if "prompt" in asked:
                text = asked["prompt"]
            self.send(http(json.dumps({"tokens": list(text.encode())}).encode()))
        elif path.endswith(b"/models"):
            self.send(MODELS)
        else:
            model = self.model
            counts = {"served": model.served, "busy": model.busy, "most": model.most}
            self.send(http(json.dumps({**counts, "waiting": len(model.waiting)}).encode()))


async def serve(slots: int, latency: float, failures: float) -> None:
    model = Model(slots, latency, failures)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(model), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument("--failures", type=float, default=0.0, help="share of the requests")
    args = parser.parse_args()
    asyncio.run(serve(args.slots, args.latency, args.failures))
