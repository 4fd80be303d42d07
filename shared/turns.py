"""One turn: what a policy writes between two injected texts, as sampled ids and as text.

The engine stops at every "```" and keeps it, so that a fence costs one call. Which fences open and
close what is decided on the text of the turn (`shared/fences.py`); what is kept are the ids that
were sampled, never text that was tokenised again.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

from shared import seeds
from shared.endpoints.config import Sampling
from shared.errors import EndpointError
from shared.fences import Block, parse
from shared.fences import Kind as Fence
from shared.policy import Codec, Engine
from shared.segments import Kind, Segment

STOP = "```"


class Wrote(StrEnum):
    """How a turn ended."""

    ACTION = "action"  # a python block was closed
    OWN_BLOCK = "own_block"  # an output block of the policy's own, or code that was never closed
    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Turn:
    """ids (T,) and logprobs (T,) as sampled; `text` is their text.

    After an ACTION, the ids end with the token that holds the last character of the closing
    fence. `thought`: how many characters of the text are r_t. `eos` is the token after the ids,
    where the policy ended its turn.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    text: str
    wrote: Wrote
    thought: int
    code: str | None = None
    eos: Segment | None = None

    def all_thought(self) -> tuple[Segment, ...]:
        """The turn without an action that counts: one thought and, if there is one, the EOS."""
        said = (Segment(Kind.THOUGHT, self.ids, self.logprobs),) if self.ids else ()
        return said + ((self.eos,) if self.eos else ())


class Writer:
    """Has one sequence (`key`) of an engine written, and keeps count of what that took."""

    def __init__(self, engine: Engine, codec: Codec, sampling: Sampling, key: str) -> None:
        self.engine, self.codec, self.sampling, self.key = engine, codec, sampling, key
        self.n_generated = 0  # every token that was sampled, kept or not
        self.seconds = 0.0
        self.versions: set[int] = set()

    async def write(
        self,
        context: Sequence[int],
        begun: Segment,
        limit: int,
        *,
        seed: int,
        actions: bool = True,
        stops: bool = True,
    ) -> Turn:
        """A turn after `context` that starts with the ids of `begun` and has at most `limit` ids.

        `actions`: whether a closed python block ends it. `stops`: whether the engine stops at
        fences at all. Raises what the engine raises.
        """
        ids, logprobs = list(begun.ids), begun.logprobs
        for number in count():
            room = limit - len(ids)
            if room <= 0:
                break
            sampling = self.sampling.model_copy(
                update={
                    "max_tokens": room,
                    "stop": (STOP,) if stops else (),
                    "include_stop": stops,
                }
            )
            started = time.monotonic()
            made = await self.engine.generate(
                [*context, *ids], sampling, seed=seeds.derive(seed, number), key=self.key
            )
            self.seconds += time.monotonic() - started
            if not 0 < len(made.ids) <= room:
                raise EndpointError(
                    f"The engine sampled {len(made.ids)} tokens where 1 to {room} were asked for.",
                    kind="bad_reply",
                    retryable=True,
                )
            self.n_generated += len(made.ids)
            self.versions.add(made.version)
            ids += made.ids
            same = logprobs is not None and made.logprobs is not None
            logprobs = (*logprobs, *made.logprobs) if same else None  # type: ignore[misc]
            turn = self._read(ids, logprobs, ended=made.finish == "eos", actions=actions)
            if turn.wrote is not Wrote.LENGTH or made.finish == "length":
                return turn
        return self._read(ids, logprobs, ended=False, actions=actions)

    def _read(
        self,
        ids: Sequence[int],
        logprobs: tuple[float, ...] | None,
        *,
        ended: bool,
        actions: bool,
    ) -> Turn:
        """The turn so far; LENGTH where the policy would go on."""
        eos = None
        if ended:
            eos = Segment(Kind.EOS, (ids[-1],), None if logprobs is None else logprobs[-1:])
            ids = ids[:-1]
        kept = len(ids)
        text = self.codec.decode(ids)
        wrote, code, thought = Wrote.EOS if ended else Wrote.LENGTH, None, len(text)
        at = 0
        for block in parse(text):
            if block.kind is Fence.OUTPUT or (ended and _unfinished(block)):
                wrote = Wrote.OWN_BLOCK
                break
            if actions and block.kind is Fence.PYTHON and block.closed:
                wrote, code, eos = Wrote.ACTION, block.body, None
                thought = at - (text[at - 1 : at] == "\n")  # this newline is the action's
                # What came after the fence, without a stop in between, was sampled for nothing.
                kept = self._holding(ids, at + len(block.raw.rstrip()))
                break
            at += len(block.raw)
        if kept < len(ids):
            text = self.codec.decode(ids[:kept])
        return Turn(
            ids=tuple(ids[:kept]),
            logprobs=None if logprobs is None else logprobs[:kept],
            text=text,
            wrote=wrote,
            thought=thought,
            code=code,
            eos=eos,
        )

    def _holding(self, ids: Sequence[int], characters: int) -> int:
        """How many of the ids hold the first `characters` of their text."""
        prefixes = range(len(ids) + 1)
        return bisect_left(prefixes, characters, key=lambda n: len(self.codec.decode(ids[:n])))


def _unfinished(block: Block) -> bool:
    return block.kind is Fence.PYTHON and not block.closed
