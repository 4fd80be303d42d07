"""What the loop of `shared/episode.py` asks of a policy: token ids in, token ids out.

`rl.rollout` has the engines (vLLM and nano over HTTP, torch in process), `rl.render.Renderer` is
the codec of a Hugging Face tokenizer. A server that knows texts only fits as well, with Unicode
code points as ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from shared.endpoints.config import Sampling
from shared.sandbox.result import RunResult
from shared.segments import Segment

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Generated:
    """One reply of an engine.

    ids: what was sampled, T >= 1, with the EOS or all tokens of the stop string if it ended so.
    logprobs: of each (T,), under the distribution that it was drawn from (temperature and
        truncation applied); None from an engine that cannot tell.
    version: of the weights that sampled it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish
    version: int


class Engine(Protocol):
    """Samples continuations. Calls of different keys may be under way at once."""

    @property
    def version(self) -> int: ...

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        """Continue `ids`, the whole context, by at most sampling.max_tokens tokens.

        `key` names the sequence (one episode), of which only one call is under way at a time: an
        engine may keep what it computed of it. The reply depends on the weights, the arguments
        and the earlier calls of the same key, where the engine can promise as much.
        """
        ...

    async def release(self, key: str) -> None:
        """Nobody continues `key` any more. Unknown keys are fine."""
        ...


class Codec(Protocol):
    """Text and token ids of the paper's format (method.md 2)."""

    eos: int

    def prompt(self, problem: str) -> Segment:
        """The chat up to where the policy speaks."""
        ...

    def observation(self, output: str) -> Segment:
        """What is injected after a closing fence, up to where the policy speaks again."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def split(
        self, ids: Sequence[int], thought: int, logprobs: Sequence[float] | None = None
    ) -> list[Segment]:
        """r_t, the first `thought` characters, and a_t, which a straddling token belongs to."""
        ...


class Tool(Protocol):
    """The part of a sandbox (`shared.sandbox.backend.Backend`) that the loop needs."""

    async def arun(self, code: str, *, seed: int, timeout: float) -> RunResult: ...
