"""Packed rows attend within themselves, and cost what they cost alone.

Claim. `attention = "rows"` gives the values and gradients that transformers' dense mask gives, for
grouped heads and sliding windows too, without computing a pair of tokens of different rows; on
anything but packed rows it is sdpa. Why it matters: it is the default, so every number of the
trainer comes through it. Reference: transformers' sdpa and eager attention, and rows run alone.
Not shown here: the kernels of GPUs (tests/gpu).
"""

from __future__ import annotations

from copy import deepcopy
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import rl.attention
from rl.attention import ROWS, boundaries, bounded
from rl.model import Policy, arguments
from rl.packing import TrainRow, collate
from shared.errors import ConfigError

COMMON: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32",
}  # fmt: skip
WINDOW = 5
CONFIGS = {
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "qwen2": Qwen2Config(**COMMON),
    "llama": LlamaConfig(**COMMON),
    "sliding": Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
}
LENGTHS = (9, 1, 14, 2, 6)


def model(kind: str, attention: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(CONFIGS[kind]), attn_implementation=attention)


def rows() -> list[TrainRow]:
    random = Random(3)
    made = []
    for n in LENGTHS:
        ids = tuple(random.randrange(61) for _ in range(n))
        made.append(TrainRow(ids, (False, *(True,) * (n - 1)), (0.0,) * n))
    return made


def trained(lm: Any, layout: str = "packed") -> tuple[Tensor, Tensor]:
    """(log-probabilities, all gradients) of a loss that weighs each token differently."""
    batch = collate(rows(), 0, layout)  # type: ignore[arg-type]
    logp, _ = Policy(lm)(*arguments(batch, torch.device("cpu")))
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return logp.detach(), torch.cat([p.grad.flatten() for p in lm.parameters()])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_values_and_gradients_are_those_of_a_dense_mask(kind: str, layout: str) -> None:
    logp, gradient = trained(model(kind, ROWS), layout)
    for other in ("sdpa", "eager"):
        expected, slope = trained(model(kind, other), layout)
        assert (logp - expected).abs().max() < 2e-6
        assert (gradient - slope).abs().max() < 1e-5


def test_control_the_window_was_felt() -> None:
    wide = model("sliding", ROWS)
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    assert (trained(wide)[0] - trained(model("sliding", ROWS))[0]).abs().max() > 1e-3


def test_control_rows_that_are_joined_are_other_rows() -> None:
    """The boundaries are what keeps rows apart: told that there is one row, they run together."""
    lm = model("qwen3", ROWS)
    batch = collate(rows(), 0)
    told = boundaries(batch.positions_BT)
    one = bounded([0, sum(LENGTHS)], torch.device("cpu"))
    apart, joined = (
        lm(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False, **bounds)
        for bounds in (told, one)
    )
    first = LENGTHS[0]
    difference = (apart.logits - joined.logits).abs()[0]
    assert difference[:first].max() < 1e-6
    assert difference[first:].max() > 1e-2


def test_no_pair_of_different_rows_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def counting(query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return inner(query, key, *rest, **more)

    monkeypatch.setattr("rl.attention.scaled_dot_product_attention", counting)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counting)
    trained(model("qwen3", ROWS))
    assert seen == [(n, n) for n in LENGTHS] * 2  # layers
    seen.clear()
    trained(model("qwen3", "sdpa"))
    assert seen == [(sum(LENGTHS), sum(LENGTHS))] * 2  # control: what the dense mask costs


@pytest.mark.parametrize("lengths", [(9, 1, 14, 2, 6), (16,), (1, 2), (3, 8, 1)])
def test_rows_that_are_attended_to_by_length_come_back_in_order(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows alone, filled up to a multiple of 8, the others together: values and gradients are
    those of each row by itself. The kernels are a CPU's; the GPU's own are in tests/gpu."""

    def together(q: Tensor, k: Tensor, v: Tensor, scaling: float, _: None, *told: Any) -> Tensor:
        return alone(q, k, v, told[0].diff().tolist())

    def alone(q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> Tensor:
        parts = zip(*(torch.split(x, sizes, 2) for x in (q, k, v)), strict=True)
        return torch.cat([rl.attention._row(*part, 0.3, None) for part in parts], 2).transpose(1, 2)

    for name, value in (("LONG", 6), ("GRAIN", 8), ("_varlen", together)):
        monkeypatch.setattr(rl.attention, name, value)
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, sum(lengths), 8, generator=draw, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    found = rl.attention._by_length(*inputs, 0.3, ends)
    wanted = alone(*inputs, list(lengths))
    slopes = torch.randn(wanted.shape, generator=draw)
    assert (found - wanted).abs().max() < 1e-6
    for a, b in zip(
        torch.autograd.grad((found * slopes).sum(), inputs),
        torch.autograd.grad((wanted * slopes).sum(), inputs),
        strict=True,
    ):
        assert (a - b).abs().max() < 5e-6


def test_a_model_that_is_called_by_others_keeps_rows_apart_too() -> None:
    """Without boundaries, positions tell them."""
    batch = collate(rows(), 0)
    ours, theirs = (
        model("qwen3", name)(
            input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False
        ).logits
        for name in (ROWS, "sdpa")
    )
    assert (ours - theirs).abs().max() < 2e-6


def test_generation_with_a_cache_and_padding_on_the_left_is_that_of_sdpa() -> None:
    ids = torch.tensor([[0, 0, 5, 7, 9], [3, 8, 2, 6, 4]])
    seen = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ours, theirs = (
        model("qwen3", name).eval().generate(
            ids, attention_mask=seen, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )
        for name in (ROWS, "sdpa")
    )  # fmt: skip
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert (a - b).abs().max() < 2e-6


def test_a_kind_of_attention_that_it_does_not_have_is_named() -> None:
    lm = model("qwen3", ROWS)
    batch = collate(rows(), 0)
    with pytest.raises(ConfigError, match="needs an attention") as caught:
        lm(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False, softcap=30.0)
    assert caught.value.where == "model.attention"


def test_the_name_does_not_go_out_with_the_model(tmp_path: Path) -> None:
    """What is exported loads where nobody has heard of it."""
    model("qwen3", ROWS).save_pretrained(tmp_path)
    assert ROWS not in (tmp_path / "config.json").read_text().split('"')
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
