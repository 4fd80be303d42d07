"""Packing: every row once, within the budget, balanced; and rows in one tensor do not meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl.packing import MicroBatch, TrainRow, collate, pack, train_row
from shared.errors import ConfigError
from shared.segments import SAMPLED, Kind, Segment
from tests.fuzz import fuzz

P, T, C, O, E = Kind.PROMPT, Kind.THOUGHT, Kind.CODE, Kind.OBSERVATION, Kind.EOS  # noqa: E741
EOS = PAD = 2

# ---- rows -----------------------------------------------------------------------------------

EXCHANGE = [
    Segment(P, (1, 2, 3)),
    Segment(T, (4, 5), (-0.1, -0.2)),
    Segment(C, (6, 7), (-0.3, -0.4)),
    Segment(O, (8, 2, 9)),  # a tool's output may hold any id
    Segment(T, (4,), (-0.5,)),
    Segment(C, (), ()),
    Segment(E, (EOS,), (-0.6,)),
]


def test_the_mask_is_of_what_was_sampled() -> None:
    row = train_row(EXCHANGE)
    assert row.ids == (1, 2, 3, 4, 5, 6, 7, 8, 2, 9, 4, EOS)
    assert [i for i, learn in zip(row.ids, row.learn, strict=True) if learn] == [4, 5, 6, 7, 4, EOS]
    assert row.sampler == (0, 0, 0, -0.1, -0.2, -0.3, -0.4, 0, 0, 0, -0.5, -0.6)
    assert row.n_loss == sum(len(s.ids) for s in EXCHANGE if s.kind in SAMPLED)
    unmasked = train_row(EXCHANGE, SAMPLED | {O})  # the paper's SFT
    assert unmasked.n_loss == row.n_loss + 3
    assert not any(unmasked.learn[:3])


def test_offsets_of_a_segment_are_not_offsets_of_the_row() -> None:
    """Control, after the released code: an observation's span is counted from the segment before it
    and taken out of the whole response. Observations are then trained on."""
    response = [s for s in EXCHANGE if s.kind is not P]
    released = [True] * sum(len(s.ids) for s in response)
    for written, injected in pairwise(response):
        if injected.kind is O:
            start = len(written.ids)  # counted from the beginning of the segment before
            released[start : start + len(injected.ids)] = [False] * len(injected.ids)
    is_observation = [s.kind is O for s in response for _ in s.ids]
    ours = train_row(EXCHANGE).learn[3:]
    assert not any(learn for learn, o in zip(ours, is_observation, strict=True) if o)
    assert any(learn for learn, o in zip(released, is_observation, strict=True) if o)


def test_a_step_row_has_no_eos_and_no_loss_on_its_prefix() -> None:
    """Control: a mask made from ids, up to the first EOS, takes the first pad for one (pad == eos):
    so the released code teaches to end the turn right after the code."""
    row = train_row([Segment(P, (1, 9, 4, 5)), Segment(T, (6,)), Segment(C, (7, 8))])
    assert row.learn == (False,) * 4 + (True,) * 3
    longer = train_row([Segment(P, (1,)), Segment(T, tuple(range(3, 15)))])
    batch = collate([row, longer], PAD, "padded")
    assert EOS not in batch.labels_N[batch.row_N == 0]
    padded = batch.ids_BT[0].tolist()
    released = padded[4 : padded.index(EOS) + 1]
    assert released == [6, 7, 8, EOS]


def test_a_row_begins_with_its_prompt() -> None:
    with pytest.raises(ValueError, match="begins with its prompt"):
        train_row([Segment(P, ()), Segment(T, (4,))])


# ---- packing --------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 64), max_size=60)
WORLD = st.integers(1, 8)


@fuzz
@given(LENGTHS, WORLD, st.integers(64, 200), st.sampled_from([0.0, 0.01, 1.0]))
def test_a_plan_keeps_its_promises(
    lengths: list[int], world: int, budget: int, attention: float
) -> None:
    plan = pack(lengths, budget, world, attention)
    rows = [i for rank in plan for batch in rank for i in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert len(plan) == world
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1  # equal on all ranks
    assert all(sum(lengths[i] for i in batch) <= budget for rank in plan for batch in rank)
    (steps,) = counts
    assert math.ceil(sum(lengths) / (budget * world)) <= steps
    assert steps <= 1 + 2 * sum(lengths) / (budget * world)  # never twice as many as needed
    costs = [[sum(lengths[i] * (1 + attention * lengths[i]) for i in b) for b in r] for r in plan]
    loads, parts = [sum(rank) for rank in costs], [c for rank in costs for c in rank]
    assert max(loads) - min(loads) <= max(parts) - min(parts) + 1e-6


@fuzz
@given(LENGTHS, WORLD, st.integers(64, 200))
def test_ranks_differ_by_one_row_at_most(lengths: list[int], world: int, budget: int) -> None:
    """In tokens; and so do the micro-batches."""
    plan = pack(lengths, budget, world)
    tokens = [[sum(lengths[i] for i in batch) for batch in rank] for rank in plan]
    for loads in ([sum(rank) for rank in tokens], [n for rank in tokens for n in rank]):
        assert max(loads) - min(loads) <= max(lengths, default=0)


def test_dealing_rows_in_order_would_not_be_balanced() -> None:
    """Control: a few long rows among short ones, dealt in turn."""
    lengths = [512, 8] * 16
    dealt = [sum(lengths[rank::2]) for rank in range(2)]
    planned = [sum(lengths[i] for b in rank for i in b) for rank in pack(lengths, 1024, 2)]
    assert max(dealt) > 60 * min(dealt)
    assert planned[0] == planned[1]


def test_micro_batches_that_run_together_cost_alike() -> None:
    """Ranks wait for each other at each micro-batch, not only at the end of the window."""
    lengths = [100, 10, 100, 10]
    plan = pack(lengths, 100, 2)
    together = [{sum(lengths[i] for i in rank[n]) for rank in plan} for n in range(2)]
    assert together == [{100}, {10}]


def test_a_row_longer_than_the_budget_is_named() -> None:
    with pytest.raises(ConfigError, match="A row of 65 tokens") as caught:
        pack([3, 65], 64)
    assert caught.value.where == "token_budget"


def test_few_rows_leave_empty_micro_batches_that_still_run() -> None:
    plan = pack([5], 64, 3)
    assert sorted(map(len, (b for rank in plan for b in rank))) == [0, 0, 1]
    for layout in ("packed", "padded"):
        empty = collate([], PAD, layout)  # type: ignore[arg-type]
        assert empty.ids_BT.tolist() == [[PAD]]
        assert empty.positions_BT.tolist() == [[0]]
        loss = logps(empty).sum()
        loss.backward()
        assert loss.item() == 0.0
        assert all((p.grad == 0).all() for p in model().parameters() if p.grad is not None)


# ---- tensors and the model that runs on them ------------------------------------------------


@cache
def model_with(attention: str) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attn_implementation=attention,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def model() -> Any:
    return model_with("sdpa")


def logps(batch: MicroBatch, attention: str = "sdpa", **inputs: Tensor) -> Tensor:
    """Log-probabilities (N,) of the loss tokens, logits at their positions only."""
    m = model_with(attention)
    hidden = m.model(
        input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False, **inputs
    ).last_hidden_state
    logits_NV = m.lm_head(hidden.flatten(0, 1)[batch.at_N])
    return logits_NV.log_softmax(-1).gather(1, batch.labels_N[:, None])[:, 0]


def by_hand(row: TrainRow) -> list[float]:
    """One row alone, by a loop over its tokens."""
    logits = model()(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return [
        logits[t - 1].log_softmax(-1)[row.ids[t]].item()
        for t in range(1, len(row.ids))
        if row.learn[t]
    ]


def ragged(lengths: Sequence[int]) -> list[TrainRow]:
    g = torch.Generator().manual_seed(5)
    rows = []
    for n in lengths:
        ids = tuple(torch.randint(3, 32, (n - 1,), generator=g).tolist())
        learn = tuple(t > 1 and t % 5 != 0 for t in range(n - 1))
        rows.append(TrainRow((*ids, EOS), (*learn, n > 1), tuple(-0.01 * t for t in range(n))))
    return rows


ROWS = ragged([9, 1, 14, 2, 1, 6])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_among_others_is_the_row_alone(layout: str, attention: str) -> None:
    """Each loss token's log-probability, at its own label and by its own context.

    The EOS keeps its loss although the padding is the same token.
    """
    batch = collate(ROWS, PAD, layout)  # type: ignore[arg-type]
    alone = [value for row in ROWS for value in by_hand(row)]
    assert logps(batch, attention).tolist() == pytest.approx(alone, abs=2e-5)
    assert batch.row_N.tolist() == [n for n, row in enumerate(ROWS) for _ in range(row.n_loss)]
    assert batch.labels_N.tolist().count(EOS) == sum(len(row.ids) > 1 for row in ROWS)
    sampled = [x for row in ROWS for x, learn in zip(row.sampler, row.learn, strict=True) if learn]
    assert batch.sampler_N.tolist() == pytest.approx(sampled)


def test_positions_begin_at_zero_with_each_row() -> None:
    rows = ragged([3, 1, 2])
    assert collate(rows, PAD).positions_BT.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert collate(rows, PAD, "padded").positions_BT.tolist() == [[0, 1, 2]] * 3


def test_neighbours_replaced_by_noise_change_nothing() -> None:
    third = [n == 2 for n in collate(ROWS, PAD).row_N]
    noise = [
        replace(row, ids=tuple((i * 7 + 3) % 32 for i in row.ids)) if n != 2 else row
        for n, row in enumerate(ROWS)
    ]
    ours, others = (logps(collate(rows, PAD))[torch.tensor(third)] for rows in (ROWS, noise))
    assert (ours - others).abs().max() < 2e-5


def test_a_mask_of_ones_would_join_the_rows() -> None:
    """Control: the test above can see contamination. So the model is run without a mask."""
    batch = collate(ROWS, PAD)
    alone = torch.tensor([value for row in ROWS for value in by_hand(row)])
    joined = logps(batch, attention_mask=torch.ones_like(batch.ids_BT))
    assert (joined - alone).abs().max() > 1e-2


def test_labels_shifted_by_one_would_be_seen() -> None:
    batch = collate(ROWS, PAD)
    shifted = replace(batch, at_N=batch.at_N + 1)
    alone = torch.tensor([value for row in ROWS for value in by_hand(row)])
    assert (logps(shifted) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_prompts_observations_and_padding_have_no_gradient(layout: str) -> None:
    """d loss / d logits is exactly 0 where no loss token is predicted."""
    batch = collate([train_row(EXCHANGE), *ROWS], PAD, layout)  # type: ignore[arg-type]
    positions = batch.ids_BT.numel()
    logits = torch.randn(positions, 32, requires_grad=True)
    logp = logits.log_softmax(-1)[batch.at_N, batch.labels_N]
    (-logp.sum()).backward()
    assert logits.grad is not None
    silent = torch.ones(positions, dtype=torch.bool)
    silent[batch.at_N] = False
    assert silent.any()
    assert (logits.grad[silent] == 0).all()
    assert (logits.grad[~silent] != 0).any(dim=-1).all()


@pytest.mark.parametrize("plan", [(1, 200), (1, 16), (2, 16), (8, 14)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_gradient_of_a_window_does_not_depend_on_its_plan(
    layout: str, plan: tuple[int, int]
) -> None:
    """World 1, 2, 4 and several budgets against one padded batch; fp32, summed over ranks."""
    world, budget = plan
    weights = [1 / (5 * max(1, row.n_loss)) for row in ROWS]  # seq-mean-token-mean of the window

    def gradient(parts: list[list[int]], how: str) -> Tensor:
        model().zero_grad()
        for part in parts:
            batch = collate([ROWS[i] for i in part], PAD, how)  # type: ignore[arg-type]
            weight = torch.tensor([weights[i] for i in part])[batch.row_N]
            (-(weight * logps(batch)).sum()).backward()
        return torch.cat([p.grad.flatten() for p in model().parameters()])

    whole = gradient([list(range(len(ROWS)))], "padded")
    lengths = [len(row.ids) for row in ROWS]
    parts = [list(b) for rank in pack(lengths, budget, world) for b in rank]
    assert (gradient(parts, layout) - whole).abs().max() < 1e-6
