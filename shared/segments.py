"""A policy's tokens by kind: what masks are made of, in rollouts, training and evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    PROMPT = "prompt"  # everything before the first sampled token
    THOUGHT = "thought"  # r_t
    CODE = "code"  # a_t, from its opening fence (or tool call mark) to the closing one
    OBSERVATION = "observation"  # o_t with all that is injected around it
    EOS = "eos"  # the token that ends the policy's turn


SAMPLED = frozenset({Kind.THOUGHT, Kind.CODE, Kind.EOS})  # I(s,t) = 1: the policy generated it


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one kind: ids (T,); for what a rollout sampled also the engine's logprobs (T,).

    Raises ValueError where the two differ in length.
    """

    kind: Kind
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids with {len(self.logprobs)} logprobs")
