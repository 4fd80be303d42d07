"""Training rows -> micro-batches: which rows run together, on which rank, and as which tensors.

    segments -> TrainRow -> pack: rows to ranks and micro-batches -> collate: MicroBatch

What `pack` promises for the rows of one optimizer window:
- Each row is in exactly one micro-batch, none of which holds more tokens than the budget.
- Every rank has the same number of micro-batches: with sharded parameters each of them is a
  collective, and a rank without one would leave the others waiting. Where rows are few, some are
  empty; `collate` makes of those one token without loss, so that forward and backward still run.
- Ranks are balanced by cost, as are the micro-batches that run at the same time.
- It depends on the lengths alone: all ranks compute the same plan without talking.

Axis suffixes: `_B` rows of a tensor, `_T` positions, `_N` tokens that carry loss, row after row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.segments import SAMPLED, Kind, Segment


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One row, all of length T: ids, whether each token carries loss, and the sampler's logprobs.

    `sampler` is 0 where nothing was sampled. The first token carries no loss: nothing predicts it.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    sampler: tuple[float, ...]

    @property
    def n_loss(self) -> int:
        return sum(self.learn)


def train_row(segments: Iterable[Segment], learn: frozenset[Kind] = SAMPLED) -> TrainRow:
    """The row of some segments; the loss mask follows from their kinds.

    `learn`: what was sampled; with OBSERVATION as well it is the paper's SFT, which masks nothing.
    Raises ValueError where the first token would carry loss, that is, without a prompt.
    """
    parts = [segment for segment in segments if segment.ids]
    if parts and parts[0].kind in learn:
        raise ValueError("a row begins with its prompt")
    return TrainRow(
        ids=tuple(i for part in parts for i in part.ids),
        learn=tuple(part.kind in learn for part in parts for _ in part.ids),
        sampler=tuple(x for part in parts for x in part.logprobs or (0.0,) * len(part.ids)),
    )


# ---- which rows run together ----------------------------------------------------------------


def pack(
    lengths: Sequence[int], budget: int, world: int = 1, attention: float = 0.0
) -> list[list[tuple[int, ...]]]:
    """Row numbers by rank and micro-batch; see the promises above.

    `budget`: tokens of a micro-batch. `attention`: what a pair of tokens costs relative to a token,
    so that a row costs T + attention * T^2; about 1 / (12 * hidden size) of a causal decoder.
    Raises ConfigError for a row longer than the budget.
    """
    if max(lengths, default=0) > budget:
        raise ConfigError(
            f"A row of {max(lengths)} tokens does not fit into a micro-batch of {budget}.",
            where="token_budget",
            remedy="raise it to the longest row, or leave out longer rows",
        )
    costs = [n + attention * n * n for n in lengths]
    steps = max(1, math.ceil(sum(lengths) / (budget * world)))
    while (bins := _fill(lengths, costs, steps * world, budget)) is None:
        steps += 1
    # Neighbours in cost run at the same time, so that no rank waits long for another. Dealt in this
    # order, the ranks' sums differ by no more than the costliest and the cheapest micro-batch do.
    bins.sort(key=lambda rows: (-sum(costs[i] for i in rows), rows))
    return [[tuple(sorted(rows)) for rows in bins[rank::world]] for rank in range(world)]


def _fill(
    lengths: Sequence[int], costs: Sequence[float], n: int, budget: int
) -> list[list[int]] | None:
    """Rows into `n` bins, costliest first, each into the cheapest bin with room; None: no room.

    It can only fail for n < 2 * sum(lengths) / budget: then every bin is more than half full.
    """
    bins: list[list[int]] = [[] for _ in range(n)]
    room = [budget] * n
    cheapest = [(0.0, b) for b in range(n)]
    for i in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        passed = []
        while cheapest and room[cheapest[0][1]] < lengths[i]:
            passed.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, b = heapq.heappop(cheapest)
        bins[b].append(i)
        room[b] -= lengths[i]
        for entry in (*passed, (cost + costs[i], b)):
            heapq.heappush(cheapest, entry)
    return bins


# ---- tensors --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows as tensors. Run the model on `ids_BT` and `positions_BT`, without mask or cache.

    at_N: where in the flattened (B * T) hidden states stands the one that predicts a loss token;
    labels_N: that token; sampler_N: its log-probability when sampled; row_N: its row, from 0.

    Packed (B = 1), the rows follow each other and positions begin at 0 with each: transformers
    keeps rows apart by that, and only if there is neither an attention mask (one of all ones joins
    them) nor a cache. Padded, the padding is on the right, where a causal model does not look.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    at_N: Tensor
    labels_N: Tensor
    sampler_N: Tensor
    row_N: Tensor


def collate(
    rows: Sequence[TrainRow], pad: int, layout: Literal["packed", "padded"] = "packed"
) -> MicroBatch:
    """Rows as tensors; none give one `pad` token without loss.

    `pad` may be any token, the EOS too: no mask is made from ids.
    """
    rows = [row for row in rows if row.ids]
    width = max((len(row.ids) for row in rows), default=1)
    if layout == "packed":
        ids = [[i for row in rows for i in row.ids] or [pad]]
        positions = [[p for row in rows for p in range(len(row.ids))] or [0]]
        starts = list(accumulate((len(row.ids) for row in rows), initial=0))
    else:
        ids = [[*row.ids, *[pad] * (width - len(row.ids))] for row in rows] or [[pad]]
        positions = [list(range(width)) for _ in ids]
        starts = [n * width for n in range(len(rows))]
    loss = [(n, t) for n, row in enumerate(rows) for t, learn in enumerate(row.learn) if learn]
    long = torch.long
    return MicroBatch(
        ids_BT=torch.tensor(ids, dtype=long),
        positions_BT=torch.tensor(positions, dtype=long),
        at_N=torch.tensor([starts[n] + t - 1 for n, t in loss], dtype=long),
        labels_N=torch.tensor([rows[n].ids[t] for n, t in loss], dtype=long),
        sampler_N=torch.tensor([rows[n].sampler[t] for n, t in loss], dtype=torch.float32),
        row_N=torch.tensor([n for n, _ in loss], dtype=long),
    )
