"""A policy in a few lines for tests of the episode loop: scripted words, byte tokens, a log.

Ids 0 to 255 are the bytes of UTF-8; `EOS` ends a turn; from `WORDS` on each id is a whole string,
so that a script decides where tokens end: "…\n```\n" may be one of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from shared.endpoints import Sampling
from shared.fences import observation
from shared.policy import Generated
from shared.segments import Kind, Segment

EOS, HEADER, WORDS = 256, 257, 300


class ByteCodec:
    """`words` are tokens of several characters, longest first; everything else is bytes."""

    def __init__(self, *words: str, header: str = "") -> None:
        self.eos = EOS
        self.words = sorted(words, key=len, reverse=True)
        self.header = header  # what the chat template writes before the policy speaks

    def encode(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        while text:
            word = next((w for w in self.words if text.startswith(w)), None)
            ids += [WORDS + self.words.index(word)] if word else list(text[0].encode())
            text = text[len(word or text[0]) :]
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        marks = {EOS: b"<eos>", HEADER: b"<assistant>"}
        return b"".join(
            self.words[i - WORDS].encode() if i >= WORDS else marks.get(i) or bytes([i])
            for i in ids
        ).decode("utf-8", "replace")

    def prompt(self, problem: str) -> Segment:
        return Segment(Kind.PROMPT, (*self.encode(problem), HEADER, *self.encode(self.header)))

    def observation(self, output: str) -> Segment:
        return Segment(Kind.OBSERVATION, self.encode(observation(output)))

    def split(
        self, ids: Sequence[int], thought: int, logprobs: Sequence[float] | None = None
    ) -> list[Segment]:
        """By going through all cuts, where the renderer halves them."""
        fits = [n for n in range(len(ids) + 1) if len(self.decode(ids[:n])) <= thought]
        at = max(fits)
        parts = ((Kind.THOUGHT, slice(at)), (Kind.CODE, slice(at, None)))
        return [
            Segment(kind, tuple(ids[part]), None if logprobs is None else tuple(logprobs[part]))
            for kind, part in parts
            if ids[part]
        ]


@dataclass
class Call:
    ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    key: str
    made: Generated


Script = Callable[[str, int], str]
"""(text after the header, seed) -> what the policy would say from there to the end of its turn."""


@dataclass
class ScriptedEngine:
    """Says what the script says, token by token, until a stop string, a limit or the end.

    Logprobs tell a token apart from all others: a function of its seed and place.
    """

    codec: ByteCodec
    script: Script
    wait: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
    version: int = 0
    calls: list[Call] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        version = self.version
        await self.wait()
        said = self.codec.decode(ids[list(ids).index(HEADER) + 1 :])
        said = said.removeprefix(self.codec.header)
        wanted = [*self.codec.encode(self.script(said, seed)), EOS]
        made: list[int] = []
        finish = "length"
        while len(made) < sampling.max_tokens:
            made.append(wanted[len(made)])
            if made[-1] == EOS:
                finish = "eos"
                break
            if any(stop in self.codec.decode(made) for stop in sampling.stop):
                finish = "stop"
                break
        draw = Random(seed)
        logprobs = tuple(-draw.random() for _ in made)
        generated = Generated(tuple(made), logprobs, finish, version)  # type: ignore[arg-type]
        self.calls.append(Call(tuple(ids), sampling, seed, key, generated))
        return generated

    async def release(self, key: str) -> None:
        self.released.append(key)
