"""The update of hierarchical RL: a rollout's rows -> optimizer steps (method.md 4.1).

    minimise  L = L_epis + lambda L_step,  each  PG + alpha NLL      (rl/loss.py)

Rows of a rollout are dealt to `updates` windows by group, seeded, so that the members of a group
are trained on together. pi_old is the policy before the first of these steps: where there is one
step only, it is the policy itself and needs no forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import torch
from torch import Tensor

from rl.config import TrainConfig
from rl.engine import Engine
from rl.loss import Counts, Level, Loss, LossBatch, count, kl, objective, row_weights
from rl.model import attention_cost
from rl.packing import MicroBatch, collate, pack
from rl.rollout.sampler import RlRow

Plan = list[tuple[list[RlRow], MicroBatch]]  # of this rank: rows and tensors of each micro-batch


def deal(rows: Sequence[RlRow], windows: int, seed: int) -> list[list[RlRow]]:
    """Rows by window: whole groups, of either level, in a seeded order; sizes differ by a group."""
    groups = list(dict.fromkeys((row.level, row.group) for row in rows))
    Random(seed).shuffle(groups)
    window_of = {group: i % windows for i, group in enumerate(groups)}
    dealt: list[list[RlRow]] = [[] for _ in range(windows)]
    for row in rows:
        dealt[window_of[row.level, row.group]].append(row)
    return dealt


def update(
    config: TrainConfig, engine: Engine, rows: Sequence[RlRow], seed: int
) -> list[dict[str, float]]:
    """One optimizer step per window, of the same rows on every rank; what each came to.

    A window without rows is left out: there is nothing to learn from it.
    """
    windows = [w for w in deal(rows, config.schedule.updates, seed) if w]
    plans = [_plan(config, engine, window) for window in windows]
    later = [_old_logprobs(config, engine, plan) for plan in plans[1:]]
    steps = []
    for i, (window, plan) in enumerate(zip(windows, plans, strict=True)):
        steps.append(_step(config, engine, window, plan, later[i - 1] if i else None))
    return steps


def _plan(config: TrainConfig, engine: Engine, window: Sequence[RlRow]) -> Plan:
    packed = pack(
        [len(one.row.ids) for one in window],
        config.engine.token_budget,
        engine.world.size,
        attention_cost(engine.policy.lm),
    )
    mine = [[window[n] for n in numbers] for numbers in packed[engine.world.rank]]
    layout = config.engine.layout
    return [(rows, collate([one.row for one in rows], 0, layout)) for rows in mine]


def _old_logprobs(config: TrainConfig, engine: Engine, plan: Plan) -> list[Tensor]:
    """log pi_old of each micro-batch, before any step of this rollout."""
    if config.old_logprobs == "sampler":
        return [batch.sampler_N.to(engine.world.device) for _, batch in plan]
    with engine.inference():
        return [engine.logprobs(batch, config.rollout.temperature)[0] for _, batch in plan]


def _step(
    config: TrainConfig,
    engine: Engine,
    window: Sequence[RlRow],
    plan: Plan,
    old: list[Tensor] | None,
) -> dict[str, float]:
    counts = count((one.level, one.row.n_loss, one.advantage) for one in window)
    told: list[Tensor] = []
    for i, (rows, batch) in enumerate(plan):
        logp_N, entropy_N = engine.logprobs(batch, config.rollout.temperature)
        sampler_N = batch.sampler_N.to(logp_N.device)
        if old is not None:
            old_N = old[i]
        else:
            old_N = sampler_N if config.old_logprobs == "sampler" else logp_N.detach()
        loss_batch = loss_inputs(config, rows, batch, counts, old_N, sampler_N)
        loss = objective(logp_N, loss_batch, config.loss)
        engine.backward(loss.total)
        told.append(_tally(loss, loss_batch, entropy_N))
    result = engine.step()
    sums = dict(zip((*_PLAIN, *_MEANS), torch.stack(told).sum(0).tolist(), strict=True))
    return _values(engine.world.total(sums), counts) | {
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "skipped": float(not result.applied),
    }


def loss_inputs(
    config: TrainConfig,
    rows: Sequence[RlRow],
    batch: MicroBatch,
    counts: dict[Level, Counts],
    old_N: Tensor,
    sampler_N: Tensor,
) -> LossBatch:
    """What `rl.loss.objective` needs of a micro-batch, by its rows and the window's counts."""
    row_N = batch.row_N.to(old_N.device)
    weights = [
        row_weights(one.level, one.row.n_loss, one.advantage, counts, config.loss) for one in rows
    ]
    columns = old_N.new_tensor(
        [[one.advantage, *weight] for one, weight in zip(rows, weights, strict=True)]
    ).reshape(-1, 3)[row_N]
    return LossBatch(old_N, sampler_N, columns[:, 0], columns[:, 1], columns[:, 2], row_N)


# What `_tally` sums up, in its order: the latter become means over the `n` loss tokens.
_PLAIN = ("loss", "loss/policy", "loss/nll", "n")
_MEANS = (
    "entropy", "ratio/mean", "ratio/clipped", "ratio/dual_clipped", "kl/k1", "kl/k3",
    "mismatch/k1", "mismatch/k3", "mismatch/abs", "mismatch/importance",
)  # fmt: skip


def _tally(loss: Loss, batch: LossBatch, entropy_N: Tensor) -> Tensor:
    """A micro-batch's sums for the metrics, float64; to be read when all have been queued."""
    # Tokens were sampled from the first argument of each: KL(pi_old || pi), KL(sampler || pi_old).
    drift = kl(batch.old_N, loss.logp_N)
    mismatch = kl(batch.sampler_N, batch.old_N)
    columns = (
        entropy_N, loss.tokens.ratio_N, loss.tokens.clipped_N, loss.tokens.dual_clipped_N,
        drift.k1_N, drift.k3_N, mismatch.k1_N, mismatch.k3_N,
        (batch.old_N - batch.sampler_N).abs(), loss.importance_N,
    )  # fmt: skip
    plain = (loss.total.detach(), loss.policy, loss.nll, entropy_N.new_tensor(len(entropy_N)))
    means = torch.stack([column.double() for column in columns]).sum(1)
    return torch.cat([torch.stack(plain).double(), means])


def _values(sums: Mapping[str, float], counts: dict[Level, Counts]) -> dict[str, float]:
    """Sums over ranks as metrics: means are per loss token of the window."""
    n = max(1, sums["n"])
    means = {name: sums[name] / n for name in _MEANS}
    plain = {name: sums[name] for name in _PLAIN if name != "n"}
    sizes = {
        f"rows/{level}{what}": float(value)
        for level, count_ in counts.items()
        for what, value in (("", count_.sequences), ("/loss_tokens", count_.tokens))
    }
    return plain | means | sizes
