"""nano's beginning: its tokenizer, its architecture, and the demonstrations that it learns from.

    python -m rl.nano --out DIR                              # tokenizer and untrained weights
    tirgen-rl sft --preset sft-nano --model DIR --out OUT    # the recipe

`data.snapshot = "nano"` names the demonstrations of `shared.nano.teacher` (the train split of the
problem world), made up as they are needed: an endless, seeded stream, cut at `EPOCH` rows. Prompts
and observations carry no loss.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rl.data import Position, Window
from rl.packing import TrainRow
from rl.world import World
from shared.nano.teacher import Demo, demonstrations

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
VOCABULARY = 1024
CONTEXT = 1024
EPOCH = 2**17  # demonstrations that count as one pass

# Qwen3's turns; `enable_thinking` is off unless asked for, and then an empty thought is pre-filled.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if not enable_thinking | default(false) %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def make_tokenizer(demos: int = 30_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens; digits and newlines are always single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(THINK),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (f"user\n{d.prompt}assistant\n{d.text}" for d in islice(demonstrations(seed=0), demos))
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(THINK)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),  # no padding rows: log-probabilities are over what can be said
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerBase, demo: Demo) -> TrainRow:
    """Prompt through the chat template, then every segment by itself: masks need no offsets."""
    header = tokenizer.apply_chat_template(
        [{"role": "user", "content": demo.prompt}],
        add_generation_prompt=True,
        enable_thinking=demo.thinking,
        tokenize=False,
    )
    ids: list[int] = tokenizer.encode(header, add_special_tokens=False)
    learn = [False] * len(ids)
    for segment in demo.reply:
        tokens = tokenizer.encode(segment.text, add_special_tokens=False)
        ids += tokens
        learn += [segment.learn] * len(tokens)
    ids.append(tokenizer.eos_token_id)
    learn.append(True)
    return TrainRow(tuple(ids), tuple(learn), (0.0,) * len(ids))


class Demonstrations:
    """`rl.data.Source` of the teacher's demonstrations; each rank makes its share of a window."""

    digest: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, world: World) -> None:
        self.tokenizer, self.seed, self.world = tokenizer, seed, world

    def __len__(self) -> int:
        return EPOCH

    def windows(self, start: Position, epochs: int, size: int) -> Iterator[Window]:
        done = start.epoch * EPOCH + start.row
        demos = islice(demonstrations(self.seed), done, None)
        while done < epochs * EPOCH:
            window = list(islice(demos, min(size, EPOCH - done % EPOCH)))
            mine = window[self.world.rank :: self.world.size]
            parts = self.world.gather([encode(self.tokenizer, demo) for demo in mine])
            rows = [row for turn in zip_longest(*parts) for row in turn if row is not None]
            done += len(window)
            yield Window(tuple(rows), Counter(), Position(*divmod(done, EPOCH)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")  # noqa: T201


if __name__ == "__main__":
    main()
