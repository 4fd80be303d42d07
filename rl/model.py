"""The policy as the trainer runs it: a Hugging Face causal LM that gives log-probabilities.

`Policy` wraps the model so that one forward call, the only one that DeepSpeed's hooks see, goes
from ids to the log-probabilities of the loss tokens. The head is a module that owns its weight:
under ZeRO-3 it is gathered once per call, however many chunks of logits there are, so that ranks
with different numbers of loss tokens still make the same collectives.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rl.attention import boundaries
from rl.config import Lora, ModelConfig
from rl.logprobs import token_logprobs
from rl.packing import MicroBatch
from shared.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Head(nn.Module):
    """The model's output layer and the log-probabilities after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)

    def forward(
        self, hidden_NH: Tensor, labels_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        def logits(hidden_nH: Tensor) -> Tensor:
            return functional.linear(hidden_nH, self.weight, self.bias)

        found = token_logprobs(hidden_NH, logits, labels_N, temperature=temperature, chunk=chunk)
        return found.logp_N, found.entropy_N


class Policy(nn.Module):
    """log pi of a micro-batch's loss tokens. `lm` is what is saved, synced and exported."""

    def __init__(self, lm: PreTrainedModel, *, chunk: int = 1024) -> None:
        super().__init__()
        self.lm, self.chunk = lm, chunk
        self.head = Head(lm.get_output_embeddings())

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor, at_N: Tensor, labels_N: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(logp_N with gradient, entropy_N without), see `rl.packing.MicroBatch`."""
        base = self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm
        hidden_BTH = base.model(
            input_ids=ids_BT, position_ids=positions_BT, use_cache=False, **boundaries(positions_BT)
        ).last_hidden_state
        found: tuple[Tensor, Tensor] = self.head(
            hidden_BTH.flatten(0, 1)[at_N], labels_N, temperature, self.chunk
        )
        return found


def arguments(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A micro-batch as the arguments of `Policy.forward`."""
    tensors = (batch.ids_BT, batch.positions_BT, batch.at_N, batch.labels_N)
    return tuple(t.to(device) for t in tensors)  # type: ignore[return-value]


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Raises InputError where there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.path)
    except (OSError, ValueError) as error:
        raise _unreadable(config, "tokenizer", error) from error
    return tokenizer


def load_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """In float32 (DeepSpeed casts); `fresh` takes the architecture and draws the weights.

    Raises InputError where there is no model, ConfigError for LoRA without peft.
    """
    options: dict[str, Any] = {"attn_implementation": config.attention, "dtype": torch.float32}
    try:
        if config.fresh:
            architecture = AutoConfig.from_pretrained(config.path)
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # the same weights on every rank
                lm = AutoModelForCausalLM.from_config(architecture, **options)
        else:
            lm = AutoModelForCausalLM.from_pretrained(config.path, **options)
    except (OSError, ValueError) as error:
        raise _unreadable(config, "model", error) from error
    lm.config.use_cache = False
    if config.recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [m for m in lm.modules() if hasattr(m, "gradient_checkpointing")]
        for n, layer in enumerate(layers):
            layer.gradient_checkpointing = n % config.recompute == 0
    if config.lora is not None:
        lm = _with_lora(lm, config.lora)
    lm.train()
    no_dropout(lm)
    return lm


def no_dropout(lm: nn.Module) -> None:
    """A ratio of probabilities means nothing if dropout drew differently for the two."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def save_model(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, Tensor], to: Path
) -> None:
    """The Hugging Face folder that transformers and vLLM read."""
    lm.save_pretrained(to, state_dict=state)
    tokenizer.save_pretrained(to)


def _with_lora(lm: PreTrainedModel, lora: Lora) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "LoRA needs the package peft.", where="model.lora", remedy="pip install peft"
        )
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm, settings, autocast_adapter_dtype=False)  # DeepSpeed#8072


def _unreadable(config: ModelConfig, what: str, error: Exception) -> InputError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"Cannot load the {what}: {first}",
        where=f"model.path = {config.path}",
        remedy="name a Hugging Face folder (config.json, model.safetensors, tokenizer.json)",
    )


def attention_cost(lm: nn.Module) -> float:
    """What a pair of tokens costs relative to a token (`rl.packing.pack`), causal attention."""
    hidden: int = lm.config.hidden_size  # type: ignore[union-attr,assignment]
    return 1 / (12 * hidden)
