"""The packaged weights are what their card says (the recipe: test_rl_sft.py)."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from rl.nano import encode
from shared.nano.model import NanoModel
from shared.nano.teacher import Demo, demonstrations
from tirgen.stack import WEIGHTS

MEGABYTES = 1 << 20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def demos() -> list[Demo]:
    return list(islice(demonstrations(seed=123), 300))


def test_transformers_loads_them_and_the_torch_free_server_computes_the_same(
    tokenizer: PreTrainedTokenizerFast, demos: list[Demo]
) -> None:
    reference = Qwen3ForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    ours = NanoModel(WEIGHTS, slots=2)
    for demo in demos[:10]:
        ids = list(encode(tokenizer, demo).ids)
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0, -1].numpy()
        assert np.abs(ours.prefill(0, ids) - expected).max() < 1e-3
        assert np.abs(ours.prefill(0, ids[:-1]) - expected).max() > 0.1  # the control


def test_they_are_small_and_their_vocabulary_is_the_tokenizers(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = Qwen3ForCausalLM.from_pretrained(WEIGHTS)
    assert 1e6 < model.num_parameters() < 4e6
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) < 20 * MEGABYTES
    assert model.config.vocab_size == len(tokenizer)  # no padding rows: exact log-probabilities


def test_digits_and_newlines_are_always_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("1234567", "a1b22c", "x\n\n\ny", "10\n20"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert all(
            len(p.strip(" ")) == 1 for p in pieces if any(c.isdigit() or c == "\n" for c in p)
        )


def test_the_loss_covers_exactly_the_learnable_segments(
    tokenizer: PreTrainedTokenizerFast, demos: list[Demo]
) -> None:
    """Decoded, the tokens under loss are the learnable text and the end of the turn; no more."""
    for demo in demos:
        row = encode(tokenizer, demo)
        learned = [i for i, learn in zip(row.ids, row.learn, strict=True) if learn]
        expected = "".join(s.text for s in demo.reply if s.learn) + tokenizer.eos_token
        assert tokenizer.decode(learned) == expected
        assert tokenizer.decode(row.ids).endswith(demo.text + tokenizer.eos_token)
