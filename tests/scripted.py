"""A model server in a few lines for tests of the graph: scripted words, a real tokenizer's traps.

Tokens are the bytes of UTF-8 (so a cut can fall inside a character), chat marks are ids above them.
`Server` answers the requests of vLLM's API; `InMemory` is an Endpoint on it without a network, and
`http(server)` is the script of a FakeEndpoint for the real one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from shared.endpoints import Endpoint, EndpointConfig, Usage
from shared.sandbox.load import Load
from shared.sandbox.result import Outcome, RunResult, Tier
from tests.fake_endpoint import Reply, ok, usage

USER, ASSISTANT = 256, 257
R = TypeVar("R", bound=BaseModel)

Continue = Callable[[str, str, int], str]
"""(user message, response so far, seed) -> what the reasoner says from here to its end."""
Answer = Callable[[str, int], "str | tuple[str, str]"]
"""(user message, seed) -> the reply, or (reply, finish reason)."""


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: list[int]) -> str:
    marks = {USER: b"<|user|>", ASSISTANT: b"<|assistant|>"}
    return b"".join(marks.get(i) or bytes([i]) for i in ids).decode("utf-8", "replace")


class Server:
    def __init__(
        self,
        reasoner: Continue = lambda user, response, seed: "",
        chat: Answer = lambda user, seed: "",
        header_tail: str = "",
    ) -> None:
        self.reasoner, self.chat, self.header_tail = reasoner, chat, header_tail
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.spoken: list[str] = []  # the text of every completion

    def sent(self, path: str) -> list[dict[str, Any]]:
        return [body for where, body in self.requests if where == path]

    def chats(self) -> list[str]:
        """Every user message of a chat, in order."""
        return [body["messages"][0]["content"] for body in self.sent("/chat/completions")]

    def drafted(self) -> list[tuple[str, int]]:
        """(response so far, seed) of every completion, in order."""
        sent = self.sent("/completions")
        return [(split(body["prompt"])[1], body["seed"]) for body in sent]

    def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((path, body))
        if path == "/tokenize":
            if "prompt" in body:
                return {"tokens": encode(body["prompt"])}
            user = encode(body["messages"][0]["content"])
            return {"tokens": [USER, *user, ASSISTANT, *encode(self.header_tail)]}
        if path == "/detokenize":
            return {"prompt": decode(body["tokens"])}
        if path == "/chat/completions":
            reply = self.chat(body["messages"][0]["content"], body["seed"])
            text, finish = (reply, "stop") if isinstance(reply, str) else reply
            return choice({"message": {"content": text}}, finish)
        assert path == "/completions"
        text = self.reasoner(*split(body["prompt"]), body["seed"])
        ends = [text.find(mark) + len(mark) for mark in body.get("stop", ()) if mark in text]
        said = text[: min(ends, default=len(text))].encode()
        fits = len(said) <= body["max_tokens"]
        cut = said[: body["max_tokens"]].decode("utf-8", "ignore")
        self.spoken.append(said.decode() if fits else cut)
        return choice({"text": self.spoken[-1]}, "stop" if fits else "length")


def split(prompt: list[int]) -> tuple[str, str]:
    """(user message, response so far) of token ids."""
    assert prompt[0] == USER
    at = prompt.index(ASSISTANT)
    return decode(prompt[1:at]), decode(prompt[at + 1 :])


def choice(fields: Mapping[str, object], finish: str) -> dict[str, Any]:
    return {"choices": [{**fields, "finish_reason": finish}], "usage": usage(1, 1)}


def http(server: Server) -> Callable[[str, Any], Reply]:
    return lambda path, body: ok(server(path.removeprefix("/v1"), body))


class InMemory(Endpoint):
    """The real client's requests and replies, handed over without a socket."""

    def __init__(
        self, server: Server, wait: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
    ) -> None:
        self.server, self.wait = server, wait
        self.config = EndpointConfig(base_url="http://memory/v1", model="scripted")

    async def _post(
        self, path: str, fields: Mapping[str, object], reply: type[R], meter: Usage | None = None
    ) -> R:
        await self.wait()
        body = {name: value for name, value in fields.items() if value is not None}
        said = self.server(path.removeprefix("http://memory"), body)
        if meter is not None:
            meter.requests += 1
        return reply.model_validate_json(json.dumps(said))


def speech(*steps: str) -> Continue:
    """A reasoner that says `steps` one after the other, a blank line after each, and then ends.

    It goes by the first words that it finds in its own response, not by how often it was asked:
    the first word of every step must be its own, and survive the extractor.
    """

    def reasoner(user: str, response: str, seed: int) -> str:
        said = sum(step.split()[0] in response for step in steps)
        if said:
            now = response[response.rindex(steps[said - 1].split()[0]) :]
            rest = "\n\n".join(steps[said - 1 :])
            if rest.startswith(now):
                return rest[len(now) :]
        return "\n\n".join(steps[said:])

    return reasoner


def calculator(user: str, seed: int) -> str:
    """An extractor (compact, one call) to which a step with the word CALC is computable."""
    step = user.partition("\n")[2]
    if "CALC" not in step:
        return json.dumps({"solvable": False})
    logic = " ".join(word for word in step.split() if word != "CALC")
    return json.dumps({"solvable": True, "logic": logic, "code": f"run({step.split()[0]!r})"})


def ran(outcome: Outcome, stdout: str = "", stderr: str = "") -> RunResult:
    return RunResult(outcome, stdout, stderr, None, Tier.B, 0.1, 0.1, 1000, 0)


def prints_its_code(code: str, seed: int) -> RunResult:
    return ran(Outcome.OK, f"ran {code}\n")


class ScriptedSandbox:
    """(code, seed) -> result, in place of `Sandbox.arun`; `runs` holds what was run."""

    tier = Tier.B

    def __init__(self, script: Callable[[str, int], RunResult] = prints_its_code) -> None:
        self.script, self.load = script, Load(2)
        self.runs: list[tuple[str, int]] = []

    async def arun(self, code: str, *, seed: int, timeout: float) -> RunResult:
        with self.load.one():
            await asyncio.sleep(0)
            self.runs.append((code, seed))
            return self.script(code, seed)
