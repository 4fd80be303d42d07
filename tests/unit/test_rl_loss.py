"""Losses and weights: hand values, enumeration, and the whole against every split of it.

The claim that matters most: a window's gradient does not depend on how it was cut into
micro-batches and ranks. `objective` adds plain sums and `row_weights` divides by the window's
counts; nothing else scales anything. Not shown here: what an engine does with the sum (averages
over ranks, clipping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rl.credit import CreditSettings, Member, credit
from rl.loss import (
    Aggregation,
    Counts,
    Level,
    LossBatch,
    LossSettings,
    count,
    importance,
    kl,
    objective,
    policy_loss,
    row_weights,
    token_weight,
)
from tests.fuzz import fuzz

EPISODE, STEP = Level.EPISODE, Level.STEP
DOUBLE = torch.float64
PLAIN = LossSettings(importance="off", nll_weight=0.0)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


# ---- the clipped loss -----------------------------------------------------------------------

CLIP = [  # advantage, ratio, loss, d loss / d log pi; eps 0.2 / 0.28, dual clip 3
    (+1, 0.5, -0.5, -0.5),
    (+1, 1.5, -1.28, 0.0),
    (-1, 0.5, 0.8, 0.0),
    (-1, 1.5, 1.5, 1.5),
    (-1, 5.0, 3.0, 0.0),
    (+1, 5.0, -1.28, 0.0),
    (+1, 1.0, -1.0, -1.0),
    (-1, 1.0, 1.0, 1.0),
    (0, 1.5, 0.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "expected", "slope"), CLIP)
def test_the_clipped_loss_by_hand(
    advantage: float, ratio: float, expected: float, slope: float
) -> None:
    old = tensor(-1.0)
    logp = (old + math.log(ratio)).requires_grad_()
    got = policy_loss(logp, old, tensor(advantage), torch.tensor([0]), PLAIN)
    got.loss_N.sum().backward()
    assert got.loss_N.item() == pytest.approx(expected)
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(slope)
    assert got.clipped_N.item() is ((advantage, ratio) in [(1, 1.5), (-1, 0.5), (1, 5.0)])
    assert got.dual_clipped_N.item() is (expected == 3.0)


def test_without_the_dual_clip_a_bad_token_may_cost_anything() -> None:
    got = policy_loss(
        tensor(math.log(5)),
        tensor(0),
        tensor(-1),
        torch.tensor([0]),
        replace(PLAIN, dual_clip=None),
    )
    assert got.loss_N.item() == pytest.approx(5.0)


@given(
    st.lists(
        st.tuples(st.floats(-3, 3), st.floats(-6, 0), st.floats(-6, 0)), min_size=1, max_size=8
    )
)
@fuzz
def test_the_clipped_loss_is_its_definition(tokens: list[tuple[float, float, float]]) -> None:
    advantages, news, olds = zip(*tokens, strict=True)
    got = policy_loss(
        tensor(*news), tensor(*olds), tensor(*advantages), torch.arange(len(tokens)), PLAIN
    )
    for i, (a, new, old) in enumerate(tokens):
        r = math.exp(new - old)
        value = min(r * a, min(max(r, 0.8), 1.28) * a)
        value = max(value, 3 * a) if a < 0 else value
        assert got.loss_N[i].item() == pytest.approx(-value, abs=1e-12)
        assert got.ratio_N[i].item() == pytest.approx(r)


def test_the_sequence_ratio_is_the_geometric_mean_over_a_rows_tokens() -> None:
    """GSPO: one ratio a row, and a gradient through all of its tokens; rows do not mix."""
    settings = replace(PLAIN, ratio="sequence")
    logp = tensor(0.1, -0.1, 0.3, 0.2).requires_grad_()
    rows = torch.tensor([0, 0, 0, 1])
    got = policy_loss(logp, tensor(0, 0, 0, 0), tensor(1, 1, 1, 1), rows, settings)
    assert got.ratio_N.tolist() == pytest.approx([math.exp(0.1)] * 3 + [math.exp(0.2)])
    got.loss_N[:3].mean().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-math.exp(0.1) / 3] * 3 + [0])


@pytest.mark.parametrize("far", [-200.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_no_ratio_overflows(far: float, advantage: float) -> None:
    """exp(200) is inf in float32; a clipped inf has the gradient inf * 0 = NaN (control)."""
    logp = torch.tensor([far], requires_grad=True)
    got = policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), torch.tensor([0]), PLAIN)
    got.loss_N.sum().backward()
    assert logp.grad is not None
    assert torch.isfinite(got.loss_N).all()
    assert torch.isfinite(logp.grad).all()
    naive = torch.tensor([200.0], requires_grad=True)
    torch.where(naive.exp() > 3, torch.tensor(3.0), naive.exp()).sum().backward()
    assert naive.grad is not None
    assert naive.grad.isnan().all()


def test_the_first_update_is_reinforce() -> None:
    """On fresh rollouts: ratio 1, nothing clipped, KL 0, and the gradient is -A grad log pi."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, advantage = (
        torch.tensor([0, 1, 2, 3, 4, 0]),
        torch.tensor([1.5, 1.5, -0.5, -0.5, -0.5, 2]),
    )
    logp = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    got = policy_loss(logp, logp.detach(), advantage, torch.tensor([0, 0, 1, 1, 1, 2]), PLAIN)
    assert (got.ratio_N == 1).all()
    assert not got.clipped_N.any()
    assert not got.dual_clipped_N.any()
    assert kl(logp, logp.detach()).k1_N.abs().max() < 1e-8
    (gradient,) = torch.autograd.grad(got.loss_N.sum(), logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantage * logp).sum(), logits)
    assert torch.equal(gradient, reinforce)


# ---- aggregation ----------------------------------------------------------------------------

AGGREGATION: list[tuple[Aggregation, float]] = [
    ("token-mean", 1.666667),
    ("seq-mean-token-mean", 1.5),
    ("seq-mean-token-sum", 5.0),
    ("seq-mean-token-sum-norm", 0.625),  # L = 8
]


@pytest.mark.parametrize(("aggregation", "expected"), AGGREGATION)
def test_aggregation_by_hand(aggregation: Aggregation, expected: float) -> None:
    """A row of 2 tokens with loss 1 and one of 4 tokens with loss 2; in one piece or two."""
    window = Counts(tokens=6, sequences=2)
    first = sum(token_weight(2, window, aggregation, 8) * 1 for _ in range(2))
    second = sum(token_weight(4, window, aggregation, 8) * 2 for _ in range(4))
    assert first + second == pytest.approx(expected, abs=1e-6)


def test_the_naive_mean_of_micro_batches_is_another_number() -> None:
    """Control: token means of two micro-batches, averaged, are 1.5 and not 1.667."""
    naive = (token_weight(2, Counts(2, 1), "token-mean") * 2 * 1
             + token_weight(4, Counts(4, 1), "token-mean") * 4 * 2) / 2  # fmt: skip
    assert naive == pytest.approx(1.5)


def test_counts_are_of_rows_that_carry_loss() -> None:
    rows = [(EPISODE, 3, 1.0), (EPISODE, 5, -1.0), (EPISODE, 0, 1.0), (STEP, 2, 0.0)]
    counts = count(rows)
    assert counts == {EPISODE: Counts(8, 2, 3), STEP: Counts(2, 1, 0)}
    assert row_weights(EPISODE, 0, 1.0, counts, LossSettings()) == (0.0, 0.0)


# ---- a window and its splits ----------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row for a bigram policy: ids (T,), which of them carry loss (never the first)."""

    level: Level
    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    advantage: float

    @property
    def tokens(self) -> int:
        return sum(self.learn)


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[Row]:
    """Ragged rows of both levels, with prompt and observation gaps in their masks."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, 7, (n,), generator=g).tolist()
        learn = [j > 0 and (j + i) % 4 != 0 for j in range(n)]
        advantage = float(torch.randn(1, generator=g))
        rows.append(Row(STEP if i % 3 == 2 else EPISODE, tuple(ids), tuple(learn), advantage))
    return rows


RAGGED = rows_of([9, 3, 5, 12, 2, 7, 4, 1, 6, 11, 3, 8])  # the row of one token carries no loss


def table(seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(7, 7, generator=g, dtype=DOUBLE).requires_grad_()


def micro_batch(
    rows: Sequence[Row], policy: Tensor, counts: dict[Level, Counts], settings: LossSettings
) -> tuple[Tensor, LossBatch]:
    """Log-probabilities and the rest for some rows, through the functions under test."""
    before, labels, advantage, w, v, row_index = [], [], [], [], [], []
    for number, row in enumerate(rows):
        policy_weight, nll_weight = row_weights(
            row.level, row.tokens, row.advantage, counts, settings
        )
        for j, learn in enumerate(row.learn):
            if learn:
                before.append(row.ids[j - 1])
                labels.append(row.ids[j])
                advantage.append(row.advantage)
                w.append(policy_weight)
                v.append(nll_weight)
                row_index.append(number)
    index = torch.tensor(labels, dtype=torch.long)
    logp = policy.log_softmax(-1)[torch.tensor(before, dtype=torch.long), index]
    old = logp.detach() - 0.3 * torch.sin(3.0 * index.double())  # some updates ago
    sampler = old - 0.9 * torch.cos(5.0 * index.double())  # an engine of another precision
    batch = LossBatch(
        old, sampler, tensor(*advantage), tensor(*w), tensor(*v),
        torch.tensor(row_index, dtype=torch.long),
    )  # fmt: skip
    return logp, batch


def gradient(
    parts: Sequence[Sequence[Row]],
    settings: LossSettings,
    counts: Callable[[Sequence[Row]], dict[Level, Counts]] | None = None,
) -> tuple[float, Tensor]:
    """Loss and gradient of a window in parts. `counts`: of a part; default: of the window."""
    policy = table()
    window = count((r.level, r.tokens, r.advantage) for part in parts for r in part)
    total = 0.0
    for part in parts:
        logp, batch = micro_batch(part, policy, counts(part) if counts else window, settings)
        share = objective(logp, batch, settings).total
        share.backward()
        total += share.item()
    assert policy.grad is not None
    return total, policy.grad


SETTINGS = [
    replace(LossSettings(), aggregation=a, length=8, levels=levels, ratio=ratio, importance=how)
    for a, _ in AGGREGATION
    for levels, ratio, how in [
        ("separate", "token", "off"),
        ("mixed", "sequence", "token"),
        ("separate", "token", "sequence"),
    ]
]


SPLITS = [
    [[row] for row in RAGGED],
    [RAGGED[::2], RAGGED[1::2]],
    [RAGGED[8:], [], RAGGED[:3], RAGGED[3:8]],
    [RAGGED[7:8], RAGGED[:7] + RAGGED[8:]],  # a micro-batch without loss tokens
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_any_split_of_a_window_is_the_whole(settings: LossSettings) -> None:
    """Micro-batches, ranks, their order, and empty ones: the sum has the same gradient."""
    loss, whole = gradient([RAGGED], settings)
    for split in SPLITS:
        again, grad = gradient(split, settings)
        assert again == pytest.approx(loss, abs=1e-12)
        assert (grad - whole).abs().max() < 1e-12


def test_denominators_of_a_micro_batch_would_be_seen() -> None:
    """Control: each part divided by its own counts, then averaged, is another gradient.

    This is what averaging the losses of micro-batches (or ranks) amounts to.
    """

    def own(part: Sequence[Row]) -> dict[Level, Counts]:
        return count((r.level, r.tokens, r.advantage) for r in part)

    for settings in SETTINGS:
        _, whole = gradient([RAGGED], settings)
        _, naive = gradient(SPLITS[1], settings, own)
        assert (naive / 2 - whole).abs().max() > 1e-4


@pytest.mark.parametrize("levels", ["separate", "mixed"])
@pytest.mark.parametrize("aggregation", [a for a, _ in AGGREGATION])
def test_the_loss_is_the_papers_formula(aggregation: Aggregation, levels: str) -> None:
    """L = L_epis + lambda L_step, each -J + alpha NLL, by plain loops over rows and tokens."""
    settings = LossSettings(
        aggregation=aggregation, length=8, levels=levels, step_weight=0.7, nll_weight=0.05,  # type: ignore[arg-type]
    )  # fmt: skip
    logp = table().detach().log_softmax(-1)

    def token(row: Row, j: int) -> tuple[float, float]:
        new = logp[row.ids[j - 1], row.ids[j]].item()
        old = new - 0.3 * math.sin(3 * row.ids[j])
        sampler = old - 0.9 * math.cos(5 * row.ids[j])
        r, a = math.exp(new - old), row.advantage
        value = min(r * a, min(max(r, 0.8), 1.28) * a)
        value = max(value, 3 * a) if a < 0 else value
        return -min(math.exp(old - sampler), 2.0) * value, -new

    def level_loss(rows: list[Row]) -> float:
        losses = [[token(r, j) for j in range(len(r.ids)) if r.learn[j]] for r in rows]
        losses = [one for one in losses if one]
        n_tokens, n_rows = sum(map(len, losses)), len(losses)
        sums = [sum(pg for pg, _ in one) for one in losses]
        pg = {
            "token-mean": sum(sums) / n_tokens,
            "seq-mean-token-mean": sum(x / len(o) for x, o in zip(sums, losses, strict=True))
            / n_rows,
            "seq-mean-token-sum": sum(sums) / n_rows,
            "seq-mean-token-sum-norm": sum(sums) / n_rows / 8,
        }[aggregation]
        positive = [nll for r in rows if r.advantage > 0 for nll in
                    (token(r, j)[1] for j in range(len(r.ids)) if r.learn[j])]  # fmt: skip
        return pg + 0.05 * sum(positive) / len(positive)

    got, _ = gradient([RAGGED], settings)
    episode, steps = ([r for r in RAGGED if r.level is level] for level in Level)
    if levels == "mixed":  # the authors' code: one loss over the rows of both, without a lambda
        got, _ = gradient([RAGGED], replace(settings, step_weight=1.0))
        assert got == pytest.approx(level_loss(RAGGED), abs=1e-12)
    else:
        assert got == pytest.approx(level_loss(episode) + 0.7 * level_loss(steps), abs=1e-12)


@pytest.mark.parametrize("settings", [PLAIN, LossSettings(ratio="sequence", importance="sequence")])
def test_a_micro_batch_without_loss_tokens_is_zero_and_runs_backward(
    settings: LossSettings,
) -> None:
    policy = table()
    logp, batch = micro_batch([], policy, count([]), settings)
    got = objective(logp, batch, settings)
    got.total.backward()
    assert got.total.item() == 0.0
    assert policy.grad is not None
    assert (policy.grad == 0).all()


def test_the_step_level_counts_by_lambda_and_not_by_its_tokens() -> None:
    """Twice as long step rows change the step level's weight only where levels are mixed."""
    for levels, constant in (("separate", True), ("mixed", False)):
        settings = replace(PLAIN, aggregation="token-mean", levels=levels)  # type: ignore[arg-type]
        shares = []
        for n in (10, 20):
            window = count([(EPISODE, 100, 1.0), (STEP, n, 1.0)])
            shares.append(n * row_weights(STEP, n, 1.0, window, settings)[0])
        assert (shares[0] == pytest.approx(shares[1])) is constant
        assert (shares[0] == pytest.approx(1.0)) is constant


# ---- importance and KL ----------------------------------------------------------------------

RATIOS = tensor(0, math.log(2), math.log(5), -math.log(4))
ROW = torch.zeros(4, dtype=torch.long)
IMPORTANCE = [  # cap 2
    ("token", "truncate", [1, 2, 2, 0.25]),
    ("token", "mask", [1, 2, 0, 0.25]),
    ("sequence", "truncate", [2, 2, 2, 2]),  # the product is 2.5
    ("sequence", "mask", [0, 0, 0, 0]),
    ("geometric", "truncate", [1.257433] * 4),
    ("off", "truncate", [1, 1, 1, 1]),
]


@pytest.mark.parametrize(("how", "beyond", "expected"), IMPORTANCE)
def test_importance_by_hand(how: str, beyond: str, expected: list[float]) -> None:
    settings = LossSettings(importance=how, beyond=beyond, importance_cap=2.0 + 1e-12)  # type: ignore[arg-type]
    old = RATIOS.clone().requires_grad_()
    got = importance(old, torch.zeros(4, dtype=DOUBLE), ROW, settings)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    assert not got.requires_grad
    two = importance(
        torch.cat([RATIOS, RATIOS * 0]), torch.zeros(8, dtype=DOUBLE),
        torch.cat([ROW, ROW + 1]), settings,
    )  # fmt: skip
    assert two.tolist() == pytest.approx([*expected, 1, 1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("how", ["token", "sequence", "geometric"])
def test_equal_probabilities_change_no_bit(how: str) -> None:
    settings = replace(PLAIN, importance=how)  # type: ignore[arg-type]
    logp, batch = micro_batch(
        RAGGED, table(), count((r.level, r.tokens, r.advantage) for r in RAGGED), settings
    )
    batch = replace(batch, sampler_N=batch.old_N)
    plain = objective(logp, batch, PLAIN).total
    assert objective(logp, batch, settings).total.item() == plain.item()


def test_kl_by_hand() -> None:
    got = kl(tensor(0, 0, 0), tensor(0.5, -0.5, 0))
    assert got.k3_N.tolist() == pytest.approx([0.148721, 0.106531, 0], abs=1e-6)
    assert got.k2_N.tolist() == pytest.approx([0.125, 0.125, 0])
    assert got.k1_N.tolist() == pytest.approx([-0.5, 0.5, 0])


def test_kl_by_enumeration() -> None:
    """Over 7 symbols: E[k1] = E[k3] = KL, also off policy when weighed by pi / mu.

    As a loss, k2 has the gradient of KL(pi || ref), k3 that of the reverse instead, k1 none.
    """
    g = torch.Generator().manual_seed(3)
    logits, ref, mu = torch.randn(3, 7, generator=g, dtype=DOUBLE).unbind()
    logits = logits.clone().requires_grad_()
    pi, ref, mu = (x.log_softmax(-1) for x in (logits, ref, mu))
    p = pi.detach().exp()
    k = kl(pi, ref)

    def grad(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    forward, reverse = (pi.exp() * (pi - ref)).sum(), (ref.exp() * (ref - pi)).sum()
    for estimate in (k.k1_N, k.k3_N):
        assert (p * estimate).sum().item() == pytest.approx(forward.item(), abs=1e-12)
        weight = (pi - mu).detach().exp()
        off_policy = (mu.exp() * weight * estimate).sum()
        assert off_policy.item() == pytest.approx(forward.item(), abs=1e-12)
    assert (k.k3_N >= 0).all()
    assert (grad((p * k.k2_N).sum()) - grad(forward)).abs().max() < 1e-12
    assert (grad((p * k.k3_N).sum()) - grad(reverse)).abs().max() < 1e-12
    assert (grad((p * k.k3_N).sum()) - grad(forward)).abs().max() > 1e-2
    assert grad((p * k.k1_N).sum()).abs().max() < 1e-12


# ---- the step level on a toy MDP ------------------------------------------------------------

# Three continuations of a prefix: "b" (one token), "ac" and "ad" (two). Only "ac" executes.
CONTINUATIONS = ([1], [0, 0], [0, 1])
REWARD = (0.0, 1.0, 0.0)


def continuation_logps(theta: Tensor) -> list[Tensor]:
    """Log-probabilities (tokens,) of each continuation; theta (2, 2): root, then after "a"."""
    root, after = theta.log_softmax(-1)
    return [root[1:], torch.stack([root[0], after[0]]), torch.stack([root[0], after[1]])]


def expected_gradient(
    theta: Tensor,
    level: Level,
    settings: LossSettings,
    extra: int,
    rewards: Sequence[float] = REWARD,
) -> Tensor:
    """E over both members of a group of 2 of the gradient, all nine groups enumerated.

    `extra` tokens of an episode row stand in the same window, with advantage 0.
    """
    credits = CreditSettings(equal_rewards="keep", eps=0.0)
    total = torch.zeros_like(theta)
    for pair in product(range(3), repeat=2):
        advantages = credit([Member(rewards[i]) for i in pair], credits).advantages_G
        logps = [continuation_logps(theta)[i] for i in pair]
        window = count(
            [(level, len(logp), a or 0.0) for logp, a in zip(logps, advantages, strict=True)]
            + [(EPISODE, extra, 0.0)] * (extra > 0)
        )
        weights = [
            row_weights(level, len(logp), a or 0.0, window, settings)[0]
            for logp, a in zip(logps, advantages, strict=True)
        ]
        logp = torch.cat(logps)

        def spread(values: Sequence[float | None], logps: list[Tensor] = logps) -> Tensor:
            return torch.cat(
                [torch.full_like(x, v or 0.0) for x, v in zip(logps, values, strict=True)]
            )

        old = logp.detach()
        rows = spread([0.0, 1.0]).long()
        batch = LossBatch(old, old, spread(advantages), spread(weights), spread([0, 0]), rows)
        (grad,) = torch.autograd.grad(objective(logp, batch, settings).total, theta)
        chance = math.exp(sum(x.sum().item() for x in logps))
        total += chance * grad
    return total


def pass_rate_gradient(theta: Tensor) -> Tensor:
    """Gradient of P(the action executes) = P(a) P(c | a), in closed form."""
    first, second = theta.detach().softmax(-1)
    root = first[0] * second[0] * (torch.eye(2, dtype=DOUBLE)[0] - first)
    after = first[0] * second[0] * (torch.eye(2, dtype=DOUBLE)[0] - second)
    return torch.stack([root, after])


@pytest.mark.parametrize("seed", [0, 1])  # two prefixes
def test_the_step_gradient_climbs_the_pass_rate_exactly(seed: int) -> None:
    """Exact enumeration. In a group of two the advantages are +-1/sqrt(2) where rewards differ, so
    the expected gradient of the loss is -1/sqrt(2) of the pass rate's, whatever the lengths."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(2, 2, generator=g, dtype=DOUBLE).requires_grad_()
    settings = replace(PLAIN, aggregation="seq-mean-token-sum")
    truth = pass_rate_gradient(theta)
    got = expected_gradient(theta, STEP, settings, extra=0)
    assert (got + truth / math.sqrt(2)).abs().max() < 1e-12
    # Control: paid for not executing ("b"), as the released code pays, it climbs something else.
    wrong = expected_gradient(theta, STEP, settings, extra=0, rewards=(1.0, 1.0, 0.0))
    assert (wrong + truth / math.sqrt(2)).abs().max() > 1e-2


@pytest.mark.parametrize("aggregation", [a for a, _ in AGGREGATION])
def test_episode_tokens_do_not_thin_the_step_gradient(aggregation: Aggregation) -> None:
    """The mixture is L_epis + lambda L_step, whatever the number of tokens of the other level."""
    theta = torch.tensor([[0.3, -0.2], [0.1, 0.5]], dtype=DOUBLE).requires_grad_()
    for levels in ("separate", "mixed"):
        settings = replace(PLAIN, aggregation=aggregation, levels=levels, step_weight=0.5)  # type: ignore[arg-type]
        few, many = (expected_gradient(theta, STEP, settings, extra=n) for n in (3, 3000))
        alone = expected_gradient(theta, STEP, settings, extra=0)
        assert torch.allclose(few, alone) is (levels == "separate")
        thinned = not torch.allclose(few, many)
        assert thinned is (levels == "mixed" and aggregation == "token-mean")
        half = expected_gradient(theta, STEP, replace(settings, step_weight=1.0), extra=0)
        assert torch.allclose(alone, half / 2)
