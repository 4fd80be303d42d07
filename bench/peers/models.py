"""The models and rows of bench/trainer.py, for its own process and its peer's alike."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from rl.packing import TrainRow, train_row
from rl.render import Renderer
from tests.nano_frozen import solved

WEIGHTS = Path(__file__).parents[2] / "shared/nano/weights"

# Random weights: the vocabulary of "50m" is such that its head has the share of the weights that
# Qwen3-0.6B's has (26 %).
SHAPES: dict[str, dict[str, int]] = {
    "50m": {
        "vocab_size": 25_600, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "0.6b": {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128,
    },
}  # fmt: skip
SIZES = ("nano", *SHAPES)


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS)


def make(size: str, attention: str) -> Any:
    """A causal LM in float32, ready to be trained."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if size == "nano":
        lm = AutoModelForCausalLM.from_pretrained(
            WEIGHTS, dtype=torch.float32, attn_implementation=attention
        )
    else:
        torch.manual_seed(0)
        config = Qwen3Config(
            **SHAPES[size], max_position_embeddings=32_768, tie_word_embeddings=True,
            dtype="float32", pad_token_id=0, eos_token_id=2, attn_implementation=attention,
        )  # fmt: skip
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            lm = Qwen3ForCausalLM(config)
    lm.config.use_cache = False
    return lm.train()


def rows(n: int, length: int | None) -> list[TrainRow]:
    """Trajectories of nano's world, observations masked; or rows of that length with such a mask.

    The latter: 55 % of the tokens after a prompt of 60 carry loss, in spans, as in the former.
    """
    if length is None:
        renderer = Renderer(tokenizer(), "compact")
        return [train_row(renderer.render(problem.text, made)) for problem, made in solved(n)]
    random, found = Random(0), []
    for _ in range(n):
        learn = [False] * 60
        while len(learn) < length:
            learn += [True] * random.randint(10, 100) + [False] * random.randint(8, 80)
        ids = tuple(random.randrange(1000) for _ in range(length))
        found.append(TrainRow(ids, tuple(learn[:length]), (0.0,) * length))
    return found
