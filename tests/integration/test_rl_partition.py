"""Partition invariance: a step does not depend on how its rows were cut (trainer.md 4.3 A).

Claim. The gradient of a window is the same for every number of ranks, micro-batches, layout, ZeRO
stage and place of the optimizer, to 1e-6 in fp32: each token's weight comes from the counts of the
whole window, and the engine adds plain sums. Why it matters: the plainest use of DeepSpeed trains
on the last micro-batch only and logs a plausible norm; the control here is that use, and it has to
fail. Reference: one plain torch graph over all rows, which shares no code with the trainer.
In bf16 there is nothing to compare exactly.
Not shown here: several hosts, GPUs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl.loss import Level
from tests import ranks
from tests.rl_programs.partition import CASES, LR, NLL, Case, model, rl_rows, rows

WORLDS = (1, 2)
TOLERANCE = 1e-6


class Results:
    """What the cases came to in a world; a start of its ranks for two ZeRO stages, when asked."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.known: dict[str, Any] = {}

    def __getitem__(self, case: Case) -> Any:
        if case.name not in self.known:
            stages = "01" if case.zero < 2 else "23"
            out = self.folder / f"{stages}.pt"
            ranks.run("tests.rl_programs.partition", [str(out), stages], self.world)
            self.known |= torch.load(out)
        return self.known[case.name]


@pytest.fixture(scope="session", params=WORLDS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(request.param, tmp_path_factory.mktemp("partition"))


def reference(case: Case) -> tuple[dict[str, Tensor], float, float]:
    """(change of each parameter, loss, norm) by plain torch: row by row, one graph, SGD by hand."""
    lm = model()
    some = rows()[8:10] if case.few else rows()
    of_row = [own_logprobs(lm, row) for row in some]
    tokens = sum(len(logp) for logp in of_row)
    sequences = sum(len(logp) > 0 for logp in of_row)
    loss = torch.zeros(())
    if case.rl:
        loss, told = hierarchical_loss(of_row)
    else:
        for logp in (logp for logp in of_row if len(logp)):
            token_mean = case.aggregation == "token-mean"
            loss = loss - (logp.sum() / tokens if token_mean else logp.mean() / sequences)
        told = loss.item()
    loss.backward()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
    scale = min(1.0, (case.clip or math.inf) / norm)
    return {name: -LR * scale * g for name, g in gradients.items()}, told, norm


def own_logprobs(lm: Any, row: Any) -> Tensor:
    logits = lm(input_ids=torch.tensor([row.ids])).logits[0, :-1]
    logp = logits.log_softmax(-1)[range(len(row.ids) - 1), row.ids[1:]]
    return logp[torch.tensor(row.learn[1:])]


def hierarchical_loss(of_row: list[Tensor]) -> tuple[Tensor, float]:
    """(what has the gradient of L at pi = pi_old, the value of L), level by level.

    There the ratio is 1, and the gradient of ratio * A is that of A * log pi.
    """
    total, value = torch.zeros(()), 0.0
    advantages = [row.advantage for row in rl_rows()]
    for level in Level:
        mine = [i for i, row in enumerate(rl_rows()) if row.level is level and len(of_row[i])]
        positive = sum(len(of_row[i]) for i in mine if advantages[i] > 0)
        for i in mine:
            total = total - advantages[i] * of_row[i].mean() / len(mine)
            value -= advantages[i] / len(mine)
            if advantages[i] > 0:
                nll = -NLL * of_row[i].sum() / positive
                total, value = total + nll, value + nll.item()
    return total, value


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) / LR for name in expected)


EXACT = [case for case in CASES if not case.managed and case.dtype == "fp32"]


@pytest.mark.parametrize("case", EXACT, ids=lambda c: c.name)
def test_a_step_is_that_of_one_plain_graph(case: Case, results: Results) -> None:
    """Gradients, not only their direction; the loss and the norm on every rank are the window's."""
    expected, loss, norm = reference(case)
    assert distance(results[case]["change"], expected) < TOLERANCE
    for reported in results[case]["reported"]:
        assert reported["loss"] == pytest.approx(loss, rel=1e-5)
        assert reported["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("zero", range(4))
def test_in_bf16_the_loss_and_the_norm_are_those_of_fp32_to_its_precision(
    zero: int, results: Results
) -> None:
    case = Case(zero=zero, budget=31, dtype="bf16")
    _, loss, norm = reference(case)
    for reported in results[case]["reported"]:
        assert reported["loss"] == pytest.approx(loss, rel=0.01)
        assert reported["grad_norm"] == pytest.approx(norm, rel=0.03)
    assert any(change.abs().max() > 0 for change in results[case]["change"].values())


@pytest.mark.parametrize("zero", range(4))
def test_control_managed_accumulation_trains_on_the_last_micro_batch(
    zero: int, results: Results
) -> None:
    """The same rows and calls, and DeepSpeed's default: a boundary at every backward pass.

    Under ZeRO-1 and 2 all but the last micro-batch is lost and nothing is said. Without ZeRO and
    under ZeRO-3 it happens to be right, which is how one overlooks it.
    """
    case = Case(zero=zero, budget=31, managed=True)
    found = distance(results[case]["change"], reference(case)[0])
    assert found > 1e-3 if zero in (1, 2) else found < TOLERANCE


def test_control_clipping_was_felt() -> None:
    """A clip of 0.01 is far below the true norm: the test above would see a missing one."""
    assert reference(Case(clip=0.01))[2] > 0.1


def test_control_the_window_was_cut() -> None:
    """31 tokens are less than a quarter of the rows: there were at least five micro-batches."""
    assert sum(len(row.ids) for row in rows()) > 4 * 31
