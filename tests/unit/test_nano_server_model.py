"""The ONNX graph computes what torch computes, and a row never depends on its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from shared.errors import InputError
from shared.nano.model import NanoModel, read_safetensors
from tests.nano_random import make_model

TOLERANCE = 1e-4
SLOTS = 32


def torch_logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0, -1])


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tied": False, "kv_heads": 4, "layers": 3},
        {"dtype": "BF16", "head_dim": 32, "hidden": 192, "heads": 6, "intermediate": 512},
    ],
    ids=["tied-grouped", "untied-ungrouped", "bf16-likely-shape"],
)
def test_logits_equal_transformers_at_prefill_and_every_decode_step(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    folder = make_model(tmp_path, **shape)
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = NanoModel(folder, slots=4)
    rng = np.random.default_rng(1)
    worst = 0.0
    for slot, length in enumerate((1, 2, 37, 200)):
        ids = rng.integers(0, 512, length).tolist()
        got = model.prefill(slot, ids)
        worst = max(worst, float(np.abs(got - torch_logits(reference, ids)).max()))
        for _ in range(6):
            ids.append(int(rng.integers(0, 512)))
            got = model.decode({slot: (ids[-1], len(ids) - 1)})[slot]
            worst = max(worst, float(np.abs(got - torch_logits(reference, ids)).max()))
    assert worst < TOLERANCE
    # Control: the tolerance is far below what one wrong token does.
    wrong = [*ids[:-2], (ids[-2] + 1) % 512, ids[-1]]
    assert np.abs(got - torch_logits(reference, wrong)).max() > 100 * TOLERANCE


def test_logits_are_bit_identical_alone_and_among_31_others(tmp_path: Path) -> None:
    """In any slot, beside any neighbours at any lengths: the same floats, not merely close ones."""
    model = NanoModel(make_model(tmp_path, vocab=509, max_positions=512), slots=SLOTS)
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, 500, 90).tolist()
    forced = rng.integers(0, 500, 20).tolist()

    def run(slot: int, neighbours: bool) -> np.ndarray[Any, Any]:
        others: dict[int, tuple[int, int]] = {}
        if neighbours:
            for other in set(range(SLOTS)) - {slot}:
                length = int(rng.integers(1, 450))
                model.prefill(other, rng.integers(0, 500, length).tolist())
                others[other] = (int(rng.integers(0, 500)), length)
        rows = [model.prefill(slot, prompt)]
        for step, token in enumerate(forced):
            mine = {slot: (token, len(prompt) + step)}
            rows.append(model.decode(mine | others)[slot].copy())
            others = {key: (token, at + 1) for key, (token, at) in others.items()}
        return np.stack(rows)

    alone = run(0, neighbours=False)
    for _ in range(12):
        assert np.array_equal(alone, run(int(rng.integers(0, SLOTS)), neighbours=True))


def test_a_copied_prompt_continues_like_the_original(tmp_path: Path) -> None:
    model = NanoModel(make_model(tmp_path), slots=4)
    prompt = list(range(40))
    model.prefill(1, prompt)
    model.copy_prompt(1, 3, len(prompt))
    logits = model.decode({1: (7, 40), 3: (7, 40)})
    assert np.array_equal(logits[1], logits[3])


def test_bf16_weights_are_read_exactly(tmp_path: Path) -> None:
    folder = make_model(tmp_path, dtype="BF16")
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, value in read_safetensors(folder / "model.safetensors").items():
        assert np.array_equal(value, reference[name].numpy()), name


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"qwen3"', '"llama"', "model_type 'llama'"),
        ('"default"', '"yarn"', "rope_type"),
        ('"attention_bias": false', '"attention_bias": true', "attention_bias"),
    ],
)
def test_a_model_that_the_graph_would_get_wrong_is_refused(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    config = make_model(tmp_path) / "config.json"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InputError, match=says):
        NanoModel(tmp_path, slots=1)


def test_missing_files_and_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        NanoModel(tmp_path / "nowhere", slots=1)
    make_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(InputError, match=r"model\.layers\.2"):
        NanoModel(tmp_path, slots=1)
