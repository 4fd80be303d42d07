"""The step level of THOR: which failed steps are tried again, and from where (method.md 4.1).

    D_step = { pref(tau, t) : a^t in A_err },  pref = (q, r^1, a^1, o^1, ..., r^t without its last
    L_suf tokens)

The prefix is cut on the ids that were sampled, inside r^t only: never into the observation before
it (the released code did), never into the prompt. From there G regenerations of one thought suffix
and one action are sampled; a regeneration's row is the prefix as its prompt, then its own thought
and code. No EOS follows: the policy did not end its turn there, and shall not learn to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from rl.credit import NO_FAULT
from shared.segments import Kind, Segment
from shared.trajectory import Outcome


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The choices of the step level (method.md 9.2 no. 4 and 8). Defaults are the preset `paper`.

    failed: "all" failed steps of a trajectory are eligible; "first" only, as in the authors' code,
        which aborts a trajectory there.
    l_suf: tokens of r^t that are sampled anew: 100 without thinking, 500 with.
    share: step groups are at most this share of the episode groups.
    """

    failed: Literal["all", "first"] = "all"
    l_suf: int = 100
    share: float = 1.0


@dataclass(frozen=True, slots=True, order=True)
class FailedStep:
    """Action number `action` (from 0) of rollout `rollout` of `question`, which failed."""

    question: str
    rollout: str
    action: int


def failed_steps(
    question: str, rollout: str, outcomes: Sequence[Outcome], settings: StepSettings
) -> list[FailedStep]:
    """The eligible steps of one rollout. `outcomes`: of its actions, in order.

    An infrastructure error is not the policy's: there is nothing to do better.
    """
    failed = [FailedStep(question, rollout, i) for i, o in enumerate(outcomes) if o not in NO_FAULT]
    return failed[:1] if settings.failed == "first" else failed


def choose(failed: Iterable[FailedStep], limit: int, seed: int) -> list[FailedStep]:
    """At most `limit` of them, spread over the questions as evenly as there are steps.

    Questions take turns, in a random order, each with its own steps in a random order. Depends on
    the set of steps and the seed alone, not on the order in which rollouts came back.
    """
    random = Random(seed)
    queues: dict[str, list[FailedStep]] = defaultdict(list)
    for one in sorted(failed):
        queues[one.question].append(one)
    for queue in queues.values():
        random.shuffle(queue)
    order = list(queues.values())
    random.shuffle(order)
    rounds = ([q[n] for q in order if n < len(q)] for n in range(max(map(len, order), default=0)))
    return [one for turn in rounds for one in turn][:limit]


@dataclass(frozen=True, slots=True)
class Prefix:
    """pref(tau, t) as one prompt. Its last `begun` ids are what is kept of r^t."""

    segment: Segment
    begun: int


def prefix(rollout: Sequence[Segment], action: int, l_suf: int) -> Prefix:
    """pref(tau, t): all before r^t, and r^t without its last `l_suf` tokens.

    r^t is the thought right before the action, however many segments it was sampled in. Where it
    is shorter than `l_suf`, all of it is dropped and no more.
    """
    at = [i for i, segment in enumerate(rollout) if segment.kind is Kind.CODE][action]
    start = at
    while start and rollout[start - 1].kind is Kind.THOUGHT:
        start -= 1
    before = [i for segment in rollout[:start] for i in segment.ids]
    thought = [i for segment in rollout[start:at] for i in segment.ids]
    kept = thought[: max(0, len(thought) - l_suf)]
    return Prefix(Segment(Kind.PROMPT, (*before, *kept)), len(kept))
