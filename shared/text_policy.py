"""A policy behind a server that knows texts only: the ids of `shared/episode.py` are code points.

For evaluation. The server continues a plain text (/v1/completions): the `policy` prompt, and after
it all that was said. It is not asked to stop at fences, because most servers do not tell a stop
string from the end of a turn; what comes after one is cut off here. So budgets and L_suf count
characters, there are no log-probabilities, and tokens beyond a fence are paid for.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.endpoints import Endpoint, Sampling
from shared.fences import observation
from shared.policy import Finish, Generated
from shared.prompts import Profile, render
from shared.segments import Kind, Segment

EOS = 0x110000  # one more than the last code point


class TextCodec:
    """`shared.policy.Codec` of code points."""

    eos = EOS

    def __init__(self, prompts: Profile) -> None:
        self.prompts = prompts

    def prompt(self, problem: str) -> Segment:
        return Segment(Kind.PROMPT, _ids(render(self.prompts, "policy", problem=problem) + "\n"))

    def observation(self, output: str) -> Segment:
        return Segment(Kind.OBSERVATION, _ids(observation(output)))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i != EOS)

    def split(
        self, ids: Sequence[int], thought: int, logprobs: Sequence[float] | None = None
    ) -> list[Segment]:
        parts = ((Kind.THOUGHT, ids[:thought]), (Kind.CODE, ids[thought:]))
        return [Segment(kind, tuple(part)) for kind, part in parts if part]


class TextEngine:
    """`shared.policy.Engine` over /v1/completions. Raises EndpointError."""

    version = 0

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        """At most sampling.max_tokens characters, which are at least as many as tokens."""
        plain = sampling.model_copy(update={"stop": (), "include_stop": False})
        text = "".join(map(chr, ids))
        reply = await self.endpoint.complete(text, plain, seed=seed, return_token_ids=None)
        said, finish = _cut(reply.text, sampling.stop)
        if finish is None:
            finish = "length" if reply.finish_reason == "length" and said else "eos"
        made = [*_ids(said), *([EOS] if finish == "eos" else [])]
        if sampling.max_tokens is not None and len(made) > sampling.max_tokens:
            made, finish = made[: sampling.max_tokens], "length"
        return Generated(tuple(made), None, finish, self.version)

    async def release(self, key: str) -> None:
        """A server that is sent whole texts keeps nothing for us."""


def _cut(text: str, stops: Sequence[str]) -> tuple[str, Finish | None]:
    """Up to and with the first stop string, if there is one."""
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(ends)], "stop") if ends else (text, None)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))
