"""The SFT program on one rank: nano's recipe, step for step beside plain torch.

Claim. What the trainer computes from rows is what one would write by hand: cross entropy over the
tokens under loss, clipped AdamW, warm-up and cosine. The reference below shares no code with it but
the model and the rows. Ranks and ZeRO: tests/integration/test_rl_partition.py.
"""

from __future__ import annotations

import json
import math
import os
import signal
from datetime import timedelta
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from rl.config import SftConfig, load
from rl.data import Position
from rl.jobs import Job
from rl.model import Policy
from rl.nano import Demonstrations, make_model
from rl.session import Session
from rl.sft import train
from rl.world import World, join
from tirgen.stack import WEIGHTS

STEPS, ROWS = 6, 8


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return join(timedelta(minutes=1))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(WEIGHTS)


def config(**settings: object) -> SftConfig:
    given = {"max_steps": STEPS, "batch_rows": ROWS, "optimizer.warmup": 3, "model.path": '"-"'}
    chosen = [f"{name}={value}" for name, value in (given | settings).items()]
    return load(SftConfig, "sft-nano", settings=chosen)


class Kept:
    """Metrics that are kept for a look."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        assert step == len(self.steps) + 1
        self.steps.append(dict(values))

    def close(self) -> None:
        pass


def by_the_trainer(
    world: World, tokenizer: PreTrainedTokenizerFast, chosen: SftConfig, out: Path
) -> list[dict[str, float]]:
    kept = Kept()
    source = Demonstrations(tokenizer, chosen.seed, world)
    policy = Policy(make_model(tokenizer, seed=1).train())
    session = Session("sft", out, world, metrics=kept)
    train(chosen, session, source, policy, tokenizer, resume=False)
    return kept.steps


def by_hand(
    world: World, tokenizer: PreTrainedTokenizerFast, chosen: SftConfig
) -> tuple[list[float], Qwen3ForCausalLM]:
    """Losses before each step, and the model after the last one."""
    model = make_model(tokenizer, seed=1).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), eps=1e-8)
    windows = Demonstrations(tokenizer, chosen.seed, world).windows(Position(), 1, ROWS)
    losses = []
    for step, window in enumerate(islice(windows, STEPS)):
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 3) * cosine
        width = max(len(row.ids) for row in window.rows)
        ids = torch.zeros(ROWS, width, dtype=torch.long)
        labels = torch.full((ROWS, width), -100)
        for i, row in enumerate(window.rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            labels[i, : len(row.ids)] = torch.where(
                torch.tensor(row.learn), ids[i, : len(row.ids)], -100
            )
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_the_recipe_is_what_one_would_write_by_hand(
    world: World, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Six steps from nothing: every loss, and the weights that are exported and load again.

    Control: at another rate, the last loss is another.
    """
    steps = by_the_trainer(world, tokenizer, config(), tmp_path / "ours")
    losses, model = by_hand(world, tokenizer, config())
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=2e-4)
    assert losses[-1] < losses[0] - 0.5
    exported = Qwen3ForCausalLM.from_pretrained(tmp_path / "ours" / "model", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.allclose(exported.get_parameter(name), parameter, atol=2e-4), name
    other = by_the_trainer(world, tokenizer, config(**{"optimizer.lr": 1e-3}), tmp_path / "other")
    assert other[-1]["loss"] != pytest.approx(losses[-1], rel=2e-2)


def test_a_step_says_what_it_trained_on(
    world: World, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (step,) = by_the_trainer(world, tokenizer, config(max_steps=1), tmp_path)
    window = next(Demonstrations(tokenizer, 0, world).windows(Position(), 1, ROWS))
    assert step["rows"] == len(window.rows) == ROWS
    assert step["loss_tokens"] == sum(row.n_loss for row in window.rows)
    assert step["tokens"] == sum(len(row.ids) for row in window.rows)
    assert 0 < step["entropy"] <= math.log(len(tokenizer))
    state = json.loads((tmp_path / "checkpoints/step-000001/state.json").read_text())
    assert state["progress"]["position"] == {"epoch": 0, "row": ROWS}


def test_told_to_stop_it_leaves_a_checkpoint_and_no_model(
    world: World, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """After the step under way. Told so in its last step, it has come to its end all the same."""

    class Told(Kept):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.at = at

        def log(self, step: int, values: dict[str, float]) -> None:
            super().log(step, values)
            if step == self.at:
                os.kill(os.getpid(), signal.SIGTERM)

    for at, ended in ((2, False), (3, True)):
        out, job, chosen = tmp_path / str(at), Job("j"), config(max_steps=3)
        policy = Policy(make_model(tokenizer, seed=1).train())
        session = Session("sft", out, world, job, Told(at))
        train(chosen, session, Demonstrations(tokenizer, 0, world), policy, tokenizer, resume=False)
        assert (out / "checkpoints/latest").read_text() == f"step-{at:06d}"
        assert (out / "model").exists() is ended
        assert job.early is not ended
