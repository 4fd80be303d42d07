"""Advantages, group filters and the step level, against hand values and plain loops."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.credit import (
    Credit,
    CreditSettings,
    Drop,
    Member,
    advantages_of,
    credit,
    episode,
    refill,
    step,
)
from rl.steps import FailedStep, StepSettings, choose, failed_steps, prefix
from shared.segments import Kind, Segment
from shared.trajectory import Outcome
from tests.fuzz import fuzz

OK, ERROR, TIMEOUT, SILENT, INFRA = (
    Outcome.OK, Outcome.MODEL_ERROR, Outcome.TIMEOUT, Outcome.NO_OUTPUT,
    Outcome.INFRASTRUCTURE_ERROR,
)  # fmt: skip
PAPER = CreditSettings()
POPULATION = replace(PAPER, std="population")
BINARY = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16)
REWARDS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=16)


def group(*rewards: float | None) -> list[Member]:
    return [episode(reward) for reward in rewards]


def rounded(result: Credit) -> list[float | None]:
    return [None if a is None else round(a, 3) for a in result.advantages_G]


# ---- advantages -----------------------------------------------------------------------------

HAND = [
    ([1, 0, 0, 0], "unbiased", [1.5, -0.5, -0.5, -0.5]),
    ([1, 0, 0, 0], "population", [1.732051, -0.577350, -0.577350, -0.577350]),
    ([1] * 7 + [0], "unbiased", [0.353553] * 7 + [-2.474874]),
    ([1] * 7 + [0], "population", [0.377964] * 7 + [-2.645751]),
]


@pytest.mark.parametrize(("rewards", "std", "expected"), HAND)
def test_advantages_by_hand(rewards: list[float], std: str, expected: list[float]) -> None:
    settings = CreditSettings(std=std, eps=0.0)  # type: ignore[arg-type]
    assert advantages_of(rewards, settings) == pytest.approx(expected, abs=5e-7)
    with_eps = advantages_of(rewards, replace(settings, eps=1e-6))
    assert with_eps == pytest.approx(expected, rel=1e-5)


@fuzz
@given(REWARDS)
def test_advantages_are_the_definition(rewards: list[float]) -> None:
    """A plain loop over exact sums; mean zero follows."""
    got = advantages_of(rewards, PAPER)
    if max(rewards) == min(rewards):
        assert got == [0.0] * len(rewards)
        return
    mean = math.fsum(rewards) / len(rewards)
    square = math.fsum((r - mean) ** 2 for r in rewards)
    std = math.sqrt(square / (len(rewards) - 1))
    assert got == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], rel=1e-6, abs=1e-6)
    assert sum(got) == pytest.approx(0, abs=1e-6 * len(got))


@pytest.mark.parametrize("settings", [PAPER, POPULATION, replace(PAPER, eps=1e-9)])
def test_equal_rewards_give_exactly_nothing(settings: CreditSettings) -> None:
    """Seven times 0.1 in float32: a mean and a std of rounding errors are no signal."""
    rewards = [0.10000000149011612] * 7
    assert advantages_of(rewards, settings) == [0.0] * 7
    kept = credit(group(*rewards), replace(settings, equal_rewards="keep"))
    assert kept.advantages_G == (0.0,) * 7

    total = np.float32(0)  # control: float32, summed in order, and a small eps make one of it
    for reward in rewards:
        total += np.float32(reward)
    residue = np.float32(rewards[0]) - total / np.float32(7)
    assert abs(residue / (math.sqrt(7 / 6) * abs(residue) + 1e-9)) > 0.5


@fuzz
@given(BINARY, st.randoms(use_true_random=False))
def test_order_does_not_matter(rewards: list[float], rng: random.Random) -> None:
    order = list(range(len(rewards)))
    rng.shuffle(order)
    straight = credit(group(*rewards), PAPER).advantages_G
    shuffled = credit(group(*(rewards[i] for i in order)), PAPER).advantages_G
    assert shuffled == tuple(straight[i] for i in order)


@fuzz
@given(BINARY, st.sampled_from([-4.0, -1.0, 0.5, 8.0]))
def test_a_constant_added_to_rewards_changes_nothing(rewards: list[float], c: float) -> None:
    """So ToRL's +-1 and THOR's 0/1 differ by the scale alone."""
    plain = credit(group(*rewards), PAPER)
    moved = credit(group(*(r + c for r in rewards)), PAPER)
    assert moved.trains is plain.trains
    if plain.trains:
        assert moved.advantages_G == pytest.approx(plain.advantages_G, rel=1e-9)


# ---- who is left out ------------------------------------------------------------------------


def test_a_failed_execution_is_filtered_before_the_mean_is_taken() -> None:
    members = [episode(1, [OK]), episode(0, [OK]), episode(1, [OK, ERROR]), episode(0, [])]
    got = credit(members, PAPER)
    assert rounded(got) == [1.155, -0.577, None, -0.577]
    assert got.dropped == {Drop.FAILED_CALL: 1}
    late = credit(members, replace(PAPER, failed_call="mask"))  # control: filtered afterwards
    assert rounded(late) == [0.866, -0.866, None, -0.866]


@pytest.mark.parametrize("outcome", [ERROR, TIMEOUT, SILENT])
def test_every_failure_of_the_policy_is_a_failed_call(outcome: Outcome) -> None:
    assert episode(1, [OK, outcome]).against == {Drop.FAILED_CALL}


def test_infrastructure_errors_are_excluded_and_never_a_reward() -> None:
    """At either level, with any switch: a broken sandbox says nothing of the policy."""
    everything = CreditSettings(
        failed_call="keep", overlong="keep", void_turn="keep", no_action="zero"
    )
    members = [episode(1), episode(0), episode(0, [INFRA]), episode(0)]
    assert episode(0, [INFRA]).against == {Drop.INFRASTRUCTURE}
    assert rounded(credit(members, everything)) == [1.155, -0.577, None, -0.577]
    tries = [step(o, everything) for o in (OK, ERROR, INFRA)]
    assert [t.reward for t in tries] == [1.0, 0.0, None]
    assert credit(tries, everything).advantages_G[2] is None


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_missing_reward_does_not_poison_its_group(nothing: float | None) -> None:
    got = credit(group(1, 0, nothing, 0), PAPER)
    assert rounded(got) == [1.155, -0.577, None, -0.577]
    assert got.dropped == {Drop.UNDECIDED: 1}


@pytest.mark.parametrize("what", ["overlong", "void_turn"])
def test_overlong_and_void_turns_have_three_switches(what: str) -> None:
    """Counted whatever the switch says."""
    members = [*group(1, 0, 0), episode(1, **{what: True})]  # type: ignore[arg-type]
    expected = {
        "keep": [0.866, -0.866, -0.866, 0.866],
        "mask": [0.866, -0.866, -0.866, None],  # no gradient, but in the baseline
        "drop": [1.155, -0.577, -0.577, None],
    }
    for switch, advantages in expected.items():
        got = credit(members, replace(PAPER, **{what: switch}))
        assert rounded(got) == advantages
        assert got.against == {Drop(what): 1}
        assert got.dropped == ({} if switch == "keep" else {Drop(what): 1})


def test_a_drop_wins_over_a_mask_and_is_counted_once() -> None:
    both = episode(0, [ERROR], overlong=True, void_turn=True)
    settings = replace(PAPER, failed_call="mask", void_turn="mask", overlong="drop")
    got = credit([*group(1, 0), both], settings)
    assert got.dropped == {Drop.OVERLONG: 1}
    assert got.against == {Drop.FAILED_CALL: 1, Drop.OVERLONG: 1, Drop.VOID_TURN: 1}


def test_half_of_a_group_must_survive() -> None:
    """ceil(G/2) of G, not of the survivors."""
    lost = [episode(1, [ERROR])] * 8
    assert credit([*group(1, *[0] * 7), *lost], PAPER).trains
    short = credit([*group(1, *[0] * 6), *lost, *lost[:1]], PAPER)
    assert not short.trains
    assert short.dropped == {Drop.FAILED_CALL: 9, Drop.FEW_SURVIVORS: 7}
    assert credit([*group(1, *[0] * 10), *lost, episode(0, [ERROR])], PAPER).trains  # 11 of 20
    assert credit(group(*[1] * 10, 0, *[None] * 9), replace(PAPER, min_survivors=0.55)).trains


def test_a_group_of_one_is_dropped() -> None:
    """The authors' code keeps it, with mean 0 and std 1, and so trains with A = R."""
    for members in (group(1), [episode(1), episode(0, [ERROR])]):
        got = credit(members, replace(PAPER, min_survivors=0))
        assert not got.trains
        assert got.dropped[Drop.FEW_SURVIVORS] == 1


def test_a_group_of_equal_rewards_is_dropped_and_counted() -> None:
    got = credit(group(1, 1, 1, None), PAPER)
    assert not got.trains
    assert got.dropped == {Drop.UNDECIDED: 1, Drop.EQUAL_REWARDS: 3}


MEMBERS = st.lists(
    st.builds(
        episode,
        st.sampled_from([0.0, 1.0, None]),
        st.lists(st.sampled_from(list(Outcome)), max_size=2),
        overlong=st.booleans(),
        void_turn=st.booleans(),
    ),
    max_size=12,
)
TREATMENT = st.sampled_from(["keep", "mask", "drop"])
SETTINGS = st.builds(
    CreditSettings,
    failed_call=TREATMENT, overlong=TREATMENT, void_turn=TREATMENT,
    min_survivors=st.sampled_from([0.0, 0.5, 1.0]), equal_rewards=st.sampled_from(["drop", "keep"]),
)  # fmt: skip


@fuzz
@given(MEMBERS, SETTINGS)
def test_every_member_has_a_row_or_one_reason(
    members: list[Member], settings: CreditSettings
) -> None:
    """Nothing vanishes: the counters add up to the group, whatever happened."""
    got = credit(members, settings)
    rows = sum(a is not None for a in got.advantages_G)
    assert rows + got.dropped.total() == len(got.advantages_G) == len(members)
    assert got.against == Counter(r for m in members for r in m.against)


@fuzz
@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 300), st.floats(1, 4))
def test_refill_asks_for_what_is_missing_up_to_the_cap(
    wanted: int, kept: int, sampled: int, cap: float
) -> None:
    more = refill(wanted, min(kept, sampled), sampled, cap)
    assert more >= 0
    assert not more or sampled + more <= cap * wanted
    if kept >= wanted <= sampled:
        assert more == 0


def test_refill_by_hand() -> None:
    assert refill(8, 0, 0, 3.0) == 8
    assert refill(8, 4, 8, 3.0) == 8  # half were kept: four missing are eight to sample
    assert refill(8, 2, 16, 3.0) == 8  # 48 would be needed; the cap leaves 8
    assert refill(8, 7, 24, 3.0) == 0


# ---- the step level -------------------------------------------------------------------------


def test_the_step_reward_is_that_the_action_executes() -> None:
    rewards = {outcome: step(outcome, PAPER).reward for outcome in Outcome}
    assert rewards == {OK: 1.0, ERROR: 0.0, TIMEOUT: 0.0, SILENT: 0.0, INFRA: None}


def test_no_action_is_never_rewarded() -> None:
    """The released code pays 1.0 for executing nothing."""
    members = [step(o, PAPER) for o in (OK, ERROR, None, ERROR)]
    assert rounded(credit(members, PAPER)) == [1.155, -0.577, None, -0.577]
    zero = replace(PAPER, no_action="zero")
    members = [step(o, zero) for o in (OK, ERROR, None, ERROR)]
    assert rounded(credit(members, zero)) == [1.5, -0.5, -0.5, -0.5]
    nobody = credit([step(None, PAPER)] * 4, PAPER)
    assert not nobody.trains
    assert nobody.dropped == {Drop.NO_ACTION: 4}


def test_all_failed_steps_are_eligible_or_the_first_alone() -> None:
    outcomes = [OK, ERROR, INFRA, SILENT, OK, TIMEOUT]
    every = failed_steps("q", "r", outcomes, StepSettings())
    assert [one.action for one in every] == [1, 3, 5]
    first = failed_steps("q", "r", outcomes, StepSettings(failed="first"))
    assert [one.action for one in first] == [1]
    assert failed_steps("q", "r", [OK, INFRA], StepSettings(failed="first")) == []


FAILED = st.sets(
    st.builds(
        FailedStep, st.sampled_from("abcd"), st.sampled_from(["1", "2", "3"]), st.integers(0, 3)
    ),
    max_size=30,
)


@fuzz
@given(FAILED, st.integers(0, 32), st.integers(0, 5), st.randoms(use_true_random=False))
def test_steps_are_spread_over_questions(
    failed: set[FailedStep], limit: int, seed: int, rng: random.Random
) -> None:
    """Seeded, never more than the limit, without doubles; no question waits while another has two
    more; and the order in which rollouts arrived does not matter."""
    chosen = choose(failed, limit, seed)
    assert len(chosen) == len(set(chosen)) == min(limit, len(failed))
    assert set(chosen) <= failed
    arrived = list(failed)
    rng.shuffle(arrived)
    assert choose(arrived, limit, seed) == chosen
    has = Counter(one.question for one in failed)
    got = Counter(one.question for one in chosen)
    for question in has:
        most = max(got.values(), default=0)
        assert got[question] >= min(has[question], most - 1)


def test_every_failed_step_can_be_chosen() -> None:
    failed = [FailedStep(q, r, 0) for q in "ab" for r in "123"]
    seen = {one for seed in range(50) for one in choose(failed, 1, seed)}
    assert seen == set(failed)


def rollout(*lengths: tuple[Kind, int]) -> list[Segment]:
    ids = iter(range(10_000))
    return [Segment(kind, tuple(next(ids) for _ in range(n))) for kind, n in lengths]


P, T, C, O = Kind.PROMPT, Kind.THOUGHT, Kind.CODE, Kind.OBSERVATION  # noqa: E741


@pytest.mark.parametrize(("l_suf", "end"), [(0, 10 + 8), (3, 10 + 5), (8, 10), (100, 10)])
def test_backtracking_stays_inside_the_thought(l_suf: int, end: int) -> None:
    """Ids 0-9 come before r^2, 10-17 are r^2.

    The released code cuts by the count alone (control): with 100 tokens to drop and 8 of thought
    it eats the observation, the code before it, and the prompt.
    """
    segments = rollout((P, 4), (T, 2), (C, 2), (O, 2), (T, 5), (T, 3), (C, 6), (O, 2))
    found = prefix(segments, 1, l_suf)
    pref = found.segment
    assert pref.kind is P
    assert found.begun == end - 10
    assert pref.ids == tuple(range(end))
    naive = tuple(range(10 + 8))[: max(0, 18 - l_suf)]
    assert (naive == pref.ids) is (l_suf <= 8)


def test_an_action_without_thought_is_tried_again_as_it_stands() -> None:
    segments = rollout((P, 4), (C, 2), (O, 3), (C, 2))
    assert prefix(segments, 0, 100).segment.ids == (0, 1, 2, 3)
    assert prefix(segments, 1, 100).segment.ids == tuple(range(9))


@fuzz
@given(st.lists(st.tuples(st.sampled_from([T, C, O]), st.integers(1, 6)), max_size=12), st.data())
def test_a_prefix_is_what_was_sampled(parts: list[tuple[Kind, int]], data: st.DataObject) -> None:
    """Token-exact: a prefix of the rollout's own ids, that ends in r^t and drops L_suf at most."""
    segments = rollout((P, 3), *parts)
    actions = [i for i, s in enumerate(segments) if s.kind is C]
    if not actions:
        return
    action, l_suf = data.draw(st.integers(0, len(actions) - 1)), data.draw(st.integers(0, 8))
    ids = [i for s in segments for i in s.ids]
    before = sum(len(s.ids) for s in segments[: actions[action]])
    pref = prefix(segments, action, l_suf).segment
    assert list(pref.ids) == ids[: len(pref.ids)]
    assert max(3, before - l_suf) <= len(pref.ids) <= before
    dropped = range(len(pref.ids), before)
    kind_of = [s.kind for s in segments for _ in s.ids]
    assert all(kind_of[i] is T for i in dropped)
