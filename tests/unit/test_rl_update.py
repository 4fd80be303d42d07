"""The update: which rows meet in a step, what pi_old is, and what the metrics say.

Numbers of the losses: test_rl_loss.py. Ranks and ZeRO: tests/integration/test_rl_partition.py.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.config import TrainConfig
from rl.engine import Engine
from rl.loss import Level
from rl.model import Policy
from rl.packing import TrainRow, collate
from rl.rollout.sampler import RlRow
from rl.update import deal, update
from rl.world import World, join
from tests.fuzz import fuzz
from tests.rl_programs.partition import model, rl_rows


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return join(timedelta(minutes=1))


def config(updates: int, lr: float = 0.05, **fields: Any) -> TrainConfig:
    return TrainConfig(
        model={"path": "-"},
        data={"snapshot": "-"},
        engine={"zero": 0, "dtype": "fp32", "token_budget": 64, "max_grad_norm": None},
        optimizer={"kind": "sgd", "lr": lr, "weight_decay": 0.0},
        schedule={"updates": updates},
        **fields,
    )


def engine(chosen: TrainConfig, world: World) -> Engine:
    return Engine(Policy(model()), chosen.engine, chosen.optimizer, world, 10)


def sampled(chosen: TrainConfig, world: World, temperature: float = 1.0) -> list[RlRow]:
    """The rows with the log-probabilities that the untrained policy itself gives."""
    policy = engine(chosen, world)
    rows = []
    for one in rl_rows():
        batch = collate([one.row], 0)
        with torch.no_grad():
            found = policy.logprobs(batch, temperature)[0].tolist()
        logps = iter(found)
        sampler = tuple(next(logps) if learn else 0.0 for learn in one.row.learn)
        rows.append(
            RlRow(
                one.level, one.group, one.advantage, TrainRow(one.row.ids, one.row.learn, sampler)
            )
        )
    return rows


# ---- windows -----------------------------------------------------------------------------------


@fuzz
@given(
    st.lists(st.tuples(st.sampled_from(list(Level)), st.integers(0, 9)), max_size=60),
    st.integers(1, 6),
    st.integers(0, 5),
)
def test_groups_stay_together_and_windows_are_even(
    members: list[tuple[Level, int]], windows: int, seed: int
) -> None:
    rows = [
        RlRow(level, str(group), float(i), TrainRow((1,), (False,), (0.0,)))
        for i, (level, group) in enumerate(members)
    ]
    dealt = deal(rows, windows, seed)
    assert Counter(id(row) for window in dealt for row in window) == Counter(map(id, rows))
    groups = [{(row.level, row.group) for row in window} for window in dealt]
    sizes = [len(group) for group in groups]
    assert sum(sizes) == len(set().union(*groups)), "no group is in two windows"
    assert max(sizes) - min(sizes) <= 1
    for window in dealt:
        assert [row.advantage for row in window] == sorted(row.advantage for row in window)
    assert deal(rows, windows, seed) == dealt


def test_another_seed_deals_otherwise() -> None:
    assert deal(rl_rows(), 2, 0) != deal(rl_rows(), 2, 1)


# ---- pi_old ------------------------------------------------------------------------------------


def test_on_policy_the_first_step_has_ratio_one(world: World) -> None:
    """Fresh rows, one step: ratio 1, nothing clipped, no KL, and the sampler agrees."""
    chosen = config(1)
    (step,) = update(chosen, engine(chosen, world), sampled(chosen, world), 0)
    assert step["ratio/mean"] == 1.0
    assert step["ratio/clipped"] == step["ratio/dual_clipped"] == 0.0
    assert step["kl/k1"] == step["kl/k3"] == 0.0
    assert step["mismatch/abs"] < 1e-5
    assert step["mismatch/importance"] == pytest.approx(1, abs=1e-5)


def test_later_steps_are_measured_against_the_policy_before_all_of_them(world: World) -> None:
    """Three steps: the second and third have moved away from pi_old. Control: at a rate of almost
    zero they have not."""
    chosen = config(3)
    steps = update(chosen, engine(chosen, world), sampled(chosen, world), 0)
    assert len(steps) == 3
    assert steps[0]["kl/k3"] == 0.0
    assert all(step["kl/k3"] > 1e-5 for step in steps[1:])
    still = config(3, lr=1e-9)
    steps = update(still, engine(still, world), sampled(still, world), 0)
    assert all(step["kl/k3"] < 1e-9 for step in steps)


def test_pi_old_of_the_sampler_needs_no_forward_pass_of_its_own(world: World) -> None:
    """Sampler and trainer agree here, so both give the same step; where they differ, only the
    sampler's pi_old makes the ratio differ from 1."""
    rows = sampled(config(1), world)
    ours, theirs = config(1), config(1, old_logprobs="sampler")
    a = update(ours, engine(ours, world), rows, 0)[0]
    b = update(theirs, engine(theirs, world), rows, 0)[0]
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    shifted = [
        RlRow(r.level, r.group, r.advantage,
              TrainRow(r.row.ids, r.row.learn, tuple(x - 0.1 for x in r.row.sampler)))
        for r in rows
    ]  # fmt: skip
    c = update(theirs, engine(theirs, world), shifted, 0)[0]
    assert c["ratio/mean"] == pytest.approx(2.718281828**0.1, rel=1e-4)
    d = update(ours, engine(ours, world), shifted, 0)[0]
    assert d["ratio/mean"] == 1.0
    assert d["mismatch/importance"] == pytest.approx(2.718281828**0.1, rel=1e-4)


def test_the_temperature_of_sampling_is_the_trainers(world: World) -> None:
    """Sampled at 0.7: with the trainer at 0.7 they agree. Control: at 1 they do not."""
    hot = config(1, rollout={"temperature": 0.7})
    rows = sampled(hot, world, 0.7)
    assert update(hot, engine(hot, world), rows, 0)[0]["mismatch/abs"] < 1e-5
    plain = config(1)
    assert update(plain, engine(plain, world), rows, 0)[0]["mismatch/abs"] > 1e-2


# ---- what is told ------------------------------------------------------------------------------


def test_the_metrics_are_of_the_window(world: World) -> None:
    chosen = config(1)
    rows = sampled(chosen, world)
    (step,) = update(chosen, engine(chosen, world), rows, 0)
    for level in Level:
        mine = [one for one in rows if one.level is level and one.row.n_loss]
        assert step[f"rows/{level}"] == len(mine)
        assert step[f"rows/{level}/loss_tokens"] == sum(one.row.n_loss for one in mine)
    assert step["loss"] == pytest.approx(step["loss/policy"] + step["loss/nll"])
    assert step["loss/nll"] > 0


def test_no_rows_no_step(world: World) -> None:
    chosen = config(2)
    made = engine(chosen, world)
    assert update(chosen, made, [], 0) == []
    assert made.steps == 0


def test_rewards_go_up(world: World) -> None:
    """A bandit: rows whose answer is an even token are rewarded. After a few steps the policy
    prefers them. Control: with the advantages' signs turned it avoids them."""

    def even_mass(sign: float) -> float:
        chosen = config(1, lr=2.0, loss={"nll_weight": 0.0, "importance": "off"})
        made = engine(chosen, world)
        random = Random(0)
        for _ in range(8):
            rows = [
                RlRow(Level.EPISODE, "g", sign * (1.0 if token % 2 == 0 else -1.0),
                      TrainRow((5, 6, token), (False, False, True), (0.0, 0.0, -4.0)))
                for token in random.sample(range(61), 16)
            ]  # fmt: skip
            update(chosen, made, rows, 0)
        everything = [TrainRow((5, 6, t), (False, False, True), (0.0,) * 3) for t in range(61)]
        with torch.no_grad():
            logp = made.logprobs(collate(everything, 0, "padded"))[0]
        return float(logp.exp()[::2].sum())

    assert even_mass(1.0) > 0.7
    assert even_mass(-1.0) < 0.3
