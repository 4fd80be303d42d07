"""LoRA and recomputed activations: less memory, and otherwise the same training.

Claim. Under ZeRO 0 to 3 only the adapters have gradients and change; the base stays bit for bit;
the loss falls; and a step of them is the step that plain torch takes. What is exported is the
policy that was trained, merged and as adapters. `recompute` changes what is kept, not what comes
out. Not shown here: several ranks, bf16.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.config import EngineConfig, Lora, ModelConfig, OptimizerConfig, SftConfig
from rl.data import Position, Window
from rl.engine import Engine
from rl.model import Policy, arguments, load_model
from rl.packing import TrainRow, collate, train_row
from rl.render import Renderer
from rl.session import Session
from rl.sft import train_window
from rl.world import World, join
from shared.errors import ConfigError
from tests.nano_frozen import solved
from tirgen.stack import WEIGHTS

ROWS = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return join(timedelta(minutes=1))


@cache
def rows() -> tuple[TrainRow, ...]:
    renderer = Renderer(AutoTokenizer.from_pretrained(WEIGHTS), "compact")
    return tuple(train_row(renderer.render(p.text, t)) for p, t in solved(ROWS))


def model_config(**settings: Any) -> ModelConfig:
    return ModelConfig(path=str(WEIGHTS), prompts="compact", **settings)


def config(zero: int, **engine: Any) -> SftConfig:
    return SftConfig(
        model=model_config(lora=Lora(rank=4, alpha=8), recompute=2),
        data={"snapshot": "-"},
        engine=EngineConfig(zero=zero, dtype="fp32", token_budget=512, max_grad_norm=None),
        optimizer=OptimizerConfig(kind="sgd", lr=0.5, weight_decay=0.0),
    )


def window() -> Window:
    return Window(rows(), Counter(), Position(1, 0))


def logprobs(lm: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = Policy(lm)(*arguments(collate(rows(), 0), CPU))[0]
    return found


def named(lm: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.named_parameters()}


def by_hand(lm: Any, steps: int, lr: float) -> Any:
    """Mean NLL over the loss tokens, row by row through the model's own logits; SGD by hand."""
    tokens = sum(row.n_loss for row in rows())
    for _ in range(steps):
        lm.zero_grad()
        for row in rows():
            logits = lm(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            logp = logits.log_softmax(-1)[range(len(row.ids) - 1), row.ids[1:]]
            (-logp[torch.tensor(row.learn[1:])].sum() / tokens).backward()
        with torch.no_grad():
            for p in lm.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
    return lm


@pytest.mark.parametrize("zero", range(4))
def test_only_adapters_are_trained_and_the_export_is_the_policy(
    zero: int, world: World, tmp_path: Path
) -> None:
    chosen = config(zero)
    policy = Policy(load_model(chosen.model, seed=0))
    before = named(policy.lm)
    engine = Engine(policy, chosen.engine, chosen.optimizer, world, total_steps=3)
    losses = [train_window(chosen, engine, window())["loss"] for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    Session("sft", tmp_path, world).export(engine, tokenizer)
    adapters = engine.adapters()
    assert adapters.keys() == {name for name in before if "lora_" in name}
    assert all(not torch.equal(adapters[name], before[name]) for name in adapters)

    reference = by_hand(load_model(chosen.model, seed=0), 3, lr=0.5)
    for name, tensor in adapters.items():
        assert (tensor - named(reference)[name]).abs().max() < 1e-5, name

    expected = logprobs(reference)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not hasattr(merged, "peft_config")
    assert (logprobs(merged) - expected).abs().max() < 2e-5
    base = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    untrained = logprobs(base)
    on_base = PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
    assert (logprobs(on_base) - expected).abs().max() < 2e-5
    assert (untrained - expected).abs().max() > 1e-2  # control: the adapters say something


@pytest.mark.parametrize("zero", [0, 2])
def test_the_base_stays_bit_for_bit(zero: int, world: World) -> None:
    chosen = config(zero)
    policy = Policy(load_model(chosen.model, seed=0))
    before = named(policy.lm)
    engine = Engine(policy, chosen.engine, chosen.optimizer, world, total_steps=1)
    train_window(chosen, engine, window())
    after = named(policy.lm)
    assert all(torch.equal(after[name], before[name]) for name in before if "lora_" not in name)
    trained = {name for name, p in policy.lm.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if "lora_" in name}
    assert sum(before[name].numel() for name in trained) < 0.1 * sum(
        map(Tensor.numel, before.values())
    )


def test_an_adapter_on_the_output_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="output layer would never be trained") as caught:
        load_model(model_config(lora=Lora(targets=("q_proj", "lm_head"))), seed=0)
    assert caught.value.where == "model.lora.targets"


# ---- recomputed activations -----------------------------------------------------------------


def gradients_and_memory(recompute: int, lora: Lora | None) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step, and the bytes that the forward pass keeps for the backward one."""
    lm = load_model(model_config(recompute=recompute, lora=lora), seed=0)
    parameters = {p.data_ptr() for p in lm.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp, _ = Policy(lm)(*arguments(collate(rows(), 0), CPU))
    (-logp.mean()).backward()
    return {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_recomputed_activations_give_the_same_gradients_for_less_memory(lora: Lora | None) -> None:
    """All four layers, every second, none: bit for bit, and in this order of what is kept."""
    (plain, most), (half, less), (whole, least) = (
        gradients_and_memory(recompute, lora) for recompute in (0, 2, 1)
    )
    for others in (half, whole):
        assert others.keys() == plain.keys()
        assert all(torch.equal(others[name], plain[name]) for name in plain)
    assert least < 0.3 * most
    assert least < less < 0.75 * most
