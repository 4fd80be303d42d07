"""The recipe of nano: tokenizer, model and weights of the packaged policy, from nothing.

    python -m rl.nano --tokens 24_000_000 --out shared/nano/weights

Trains on `shared.nano.teacher` demonstrations only (the train split of the problem world). Loss is
the mean negative log-likelihood over learnable reply tokens; observations and prompts carry none.
Plain torch on purpose: the trainer proper arrives with DeepSpeed, and this becomes its recipe.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from shared.nano.teacher import Demo, demonstrations

log = logging.getLogger(__name__)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
VOCABULARY = 1024
CONTEXT = 1024

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


@dataclass(frozen=True, slots=True)
class Row:
    """One exchange as token ids (T,) with the loss mask (T,) of the same length."""

    ids: list[int]
    learn: list[bool]


def encode(tokenizer: PreTrainedTokenizerFast, demo: Demo) -> Row:
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
    return Row([*ids, tokenizer.eos_token_id], [*learn, True])


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, budget: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of about `budget` tokens: ids (B, T) and labels (B, T), -100 without loss.

    Rows are sorted by length within a pool, so that padding stays small; batches are then shuffled.
    """
    demos = demonstrations(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = sorted((encode(tokenizer, d) for d in islice(demos, 4096)), key=lambda r: len(r.ids))
        cut: list[list[Row]] = [[]]
        for row in rows:
            if cut[-1] and len(row.ids) * (len(cut[-1]) + 1) > budget:
                cut.append([])
            cut[-1].append(row)
        for i in torch.randperm(len(cut), generator=generator).tolist():
            width = max(len(row.ids) for row in cut[i])
            ids = torch.full((len(cut[i]), width), tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for j, row in enumerate(cut[i]):
                n = len(row.ids)
                ids[j, :n] = torch.tensor(row.ids)
                labels[j, :n] = torch.where(torch.tensor(row.learn), ids[j, :n], -100)
            yield ids, labels


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tokens: int,
    seed: int,
    out: Path,
    peak_lr: float,
    budget: int = 6144,
) -> None:
    """AdamW, warm-up, cosine to a twentieth; saves every 10 %, so that a cut run is usable."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.98),
    )
    seen, started, saved, mean = 0, time.monotonic(), 0, math.nan
    for step, (ids, labels) in enumerate(batches(tokenizer, seed, budget), start=1):
        progress = seen / tokens
        if progress >= 1:
            break
        warm = min(1.0, step / 100)
        rate = peak_lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Rows are padded on the right and attention is causal: padding needs no mask.
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            speed = seen / (time.monotonic() - started)
            log.info("step %d  tokens %.2fM  loss %.4f  %.0f tok/s", step, seen / 1e6, mean, speed)
        if seen >= (saved + 1) * tokens // 10:
            saved += 1
            save(model, tokenizer, out)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The Hugging Face layout that transformers, vLLM and nano's own server read."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24_000_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--init", type=Path, help="go on from these weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("shared/nano/weights"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = Qwen3ForCausalLM.from_pretrained(args.init, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    else:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, args.seed)
    n = sum(p.numel() for p in model.parameters())
    log.info("%s parameters, vocabulary %d", f"{n:,}", len(tokenizer))
    train(model, tokenizer, tokens=args.tokens, seed=args.seed, out=args.out, peak_lr=args.lr)
    save(model, tokenizer, args.out)
    card = {"parameters": n, "tokens": args.tokens, "seed": args.seed}
    log.info("saved %s", json.dumps(card))


if __name__ == "__main__":
    main()
