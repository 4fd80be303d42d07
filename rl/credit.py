"""Who gets credit: rewards of a group -> advantages, and what is left out, counted by reason.

Both levels of THOR are the same function here. They differ in what a member of a group is:

    episode level   G whole solutions of one question; reward 1[answer correct]
    step level      G regenerations of one thought suffix and action; reward 1[the action executes]

    A_i = (R_i - mean R) / (std R + eps)        over the survivors of the group (method.md 4.1, 9.1)

In this order: members are left out for what happened to them, then groups with too few survivors,
then groups whose rewards do not differ (method.md 9.2 no. 27). Everything is a pure function of its
arguments; axis suffixes: `_G` members of a group.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from shared.trajectory import Outcome

# keep: it trains like any other. mask: its reward counts for mean and std, but it has no gradient.
# drop: it is left out before mean and std are taken.
Treatment = Literal["keep", "mask", "drop"]


_WORST_FIRST: tuple[Treatment, ...] = ("drop", "mask")
NO_FAULT = (Outcome.OK, Outcome.INFRASTRUCTURE_ERROR)  # of the policy


class Drop(StrEnum):
    """Why a member (or, the last two, a whole group) gives no gradient."""

    INFRASTRUCTURE = "infrastructure"  # a tool call failed through no fault of the policy
    UNDECIDED = "undecided"  # no reward: the grader could not decide, or it is not a number
    FAILED_CALL = "failed_call"  # episode level: an action failed
    OVERLONG = "overlong"  # episode level: cut by a length budget
    VOID_TURN = "void_turn"  # episode level: a turn with neither an action nor an answer
    NO_ACTION = "no_action"  # step level: nothing was executed
    FEW_SURVIVORS = "few_survivors"
    EQUAL_REWARDS = "equal_rewards"


@dataclass(frozen=True, slots=True)
class CreditSettings:
    """The choices that the paper leaves open (method.md 9.2). Defaults are the preset `paper`.

    std: "unbiased" divides by G - 1, as the authors' code does; "population" by G.
    eps: added to std; the authors' 1e-6.
    min_survivors: share of the group, rounded up, that must survive; never fewer than two members.
    failed_call: the execution-failure filter, applied before advantages (no. 5: any failed call).
    overlong, void_turn: the same switches; the paper knows no void turns.
    no_action: of the step level (no. 7). "exclude", or "zero": reward 0. Never a reward of 1.
    equal_rewards: "drop" such groups (DAPO), or "keep" them with advantages of exactly zero.
    """

    std: Literal["unbiased", "population"] = "unbiased"
    eps: float = 1e-6
    min_survivors: float = 0.5
    failed_call: Treatment = "drop"
    overlong: Treatment = "drop"
    void_turn: Treatment = "keep"
    no_action: Literal["exclude", "zero"] = "exclude"
    equal_rewards: Literal["drop", "keep"] = "drop"

    def treatment(self, reason: Drop) -> Treatment:
        """What becomes of a member with this against it. What has no switch is left out."""
        match reason:
            case Drop.FAILED_CALL:
                return self.failed_call
            case Drop.OVERLONG:
                return self.overlong
            case Drop.VOID_TURN:
                return self.void_turn
            case _:
                return "drop"


@dataclass(frozen=True, slots=True)
class Member:
    """One rollout of a group: its reward (None: it has none) and what is to be said against it."""

    reward: float | None
    against: frozenset[Drop] = frozenset()


@dataclass(frozen=True, slots=True)
class Credit:
    """A group's advantages_G, in the order of its members; None gives no training row.

    `against` counts every remark on a member, kept or not (the rates of the run); `dropped` counts
    each member without a row once, under the first reason that took its row.
    """

    advantages_G: tuple[float | None, ...]
    against: Counter[Drop]
    dropped: Counter[Drop]

    @property
    def trains(self) -> bool:
        return any(a is not None for a in self.advantages_G)


def episode(
    reward: float | None,
    outcomes: Sequence[Outcome] = (),
    *,
    overlong: bool = False,
    void_turn: bool = False,
) -> Member:
    """A member of an episode-level group. `outcomes`: of the calls that stand in the trajectory."""
    if reward is not None and not math.isfinite(reward):
        reward = None
    remarks = {
        Drop.INFRASTRUCTURE: Outcome.INFRASTRUCTURE_ERROR in outcomes,
        Drop.UNDECIDED: reward is None,
        Drop.FAILED_CALL: any(o not in NO_FAULT for o in outcomes),
        Drop.OVERLONG: overlong,
        Drop.VOID_TURN: void_turn,
    }
    return Member(reward, frozenset(reason for reason, holds in remarks.items() if holds))


def step(outcome: Outcome | None, settings: CreditSettings) -> Member:
    """A member of a step-level group: r' = 1[â executes]. `outcome` None: it took no action."""
    if outcome is None:
        zero = settings.no_action == "zero"
        return Member(0.0) if zero else Member(None, frozenset({Drop.NO_ACTION}))
    if outcome is Outcome.INFRASTRUCTURE_ERROR:
        return Member(None, frozenset({Drop.INFRASTRUCTURE}))
    return Member(float(outcome is Outcome.OK))


def credit(group: Sequence[Member], settings: CreditSettings) -> Credit:
    """Advantages of one group of G rollouts (G = len(group), survivors or not).

    A group of one has no advantage: it is dropped, never trained on with A = R.
    """
    treated = [_treated(member, settings) for member in group]
    survivors = [i for i, (treatment, _) in enumerate(treated) if treatment != "drop"]
    trained = [i for i in survivors if treated[i][0] == "keep"]
    dropped = Counter(reason for _, reason in treated if reason is not None)

    rewards = [r for i in survivors if (r := group[i].reward) is not None]
    advantages: list[float | None] = [None] * len(group)
    least = math.ceil(settings.min_survivors * len(group) - 1e-9)  # 0.55 * 20 is 11.000000000000002
    if len(rewards) < max(2, least):
        dropped[Drop.FEW_SURVIVORS] += len(trained)
    elif settings.equal_rewards == "drop" and max(rewards) == min(rewards):
        dropped[Drop.EQUAL_REWARDS] += len(trained)
    else:
        for i, advantage in zip(survivors, advantages_of(rewards, settings), strict=True):
            advantages[i] = advantage if i in trained else None
    against = Counter(reason for member in group for reason in member.against)
    return Credit(tuple(advantages), against, +dropped)


def _treated(member: Member, settings: CreditSettings) -> tuple[Treatment, Drop | None]:
    """The worst that is done to a member, and the first reason for it."""
    for treatment in _WORST_FIRST:
        for reason in Drop:
            if reason in member.against and settings.treatment(reason) == treatment:
                return treatment, reason
    return "keep", None


def advantages_of(rewards_G: Sequence[float], settings: CreditSettings) -> list[float]:
    """(R - mean) / (std + eps), in float64; all zero where rewards are equal.

    Equal is `max == min`: the mean of equal floats may differ from them by a rounding error, which
    a division by its own size would turn into an advantage (seven times 0.1: up to 0.8).
    """
    if max(rewards_G) == min(rewards_G):
        return [0.0] * len(rewards_G)
    mean = statistics.fmean(rewards_G)
    std = (
        statistics.stdev(rewards_G) if settings.std == "unbiased" else statistics.pstdev(rewards_G)
    )
    return [(reward - mean) / (std + settings.eps) for reward in rewards_G]


def refill(wanted: int, kept: int, sampled: int, cap: float) -> int:
    """How many more groups to sample so that `wanted` train, of at most cap * wanted in all.

    As many as are missing, at the rate at which groups were kept so far. 0: enough, or at the cap.
    """
    rate = kept / sampled if kept else 1.0
    left = math.floor(cap * wanted) - sampled
    return max(0, min(math.ceil((wanted - kept) / rate), left))
