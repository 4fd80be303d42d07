"""The policy as the trainer runs it: a Hugging Face causal LM that gives log-probabilities.

`Policy` wraps the model so that one forward call, the only one that DeepSpeed's hooks see, goes
from ids to the log-probabilities of the loss tokens. The head is a module that owns its weight:
under ZeRO-3 it is gathered once per call, however many chunks of logits there are, so that ranks
with different numbers of loss tokens still make the same collectives.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from rl.attention import boundaries
from rl.config import Lora, ModelConfig
from rl.folder import share
from rl.logprobs import token_logprobs
from rl.packing import MicroBatch
from shared.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Head(nn.Module):
    """The model's output layer and the log-probabilities after it."""

    weight: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)
        self.fused = False

    def forward(
        self, hidden_NH: Tensor, labels_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        def logits(hidden_nH: Tensor) -> Tensor:
            return functional.linear(hidden_nH, self.weight, self.bias)

        found = token_logprobs(
            hidden_NH, logits, labels_N, temperature=temperature, chunk=chunk, fused=self.fused
        )
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

    def fuse(self) -> None:
        """Compile each layer, and what follows the head: fewer and larger kernels, the same
        function to rounding. Lengths differ with every micro-batch, so for all of them at once."""
        self.head.fused = True
        for layer in decoder_layers(self.lm):
            layer.compile(dynamic=True)


def decoder_layers(lm: nn.Module) -> list[GradientCheckpointingLayer]:
    return [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]


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
            with _seeded(seed):
                lm = AutoModelForCausalLM.from_config(architecture, **options)
        else:
            lm = AutoModelForCausalLM.from_pretrained(config.path, **options)
    except (OSError, ValueError) as error:
        raise _unreadable(config, "model", error) from error
    lm.config.use_cache = False
    if config.recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        for n, layer in enumerate(decoder_layers(lm)):
            layer.gradient_checkpointing = n % config.recompute == 0
    if config.lora is not None:
        with _seeded(seed):
            lm = _with_lora(lm, config.lora)
    lm.train()
    no_dropout(lm)
    return lm


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is drawn in the block is the same on every rank, and elsewhere nothing is felt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def no_dropout(lm: nn.Module) -> None:
    """A ratio of probabilities means nothing if dropout drew differently for the two."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def save_model(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, Tensor], to: Path
) -> None:
    """The Hugging Face folder that transformers and vLLM read; `state` is `Engine.state_dict()`.

    With LoRA, `state` is the base with the adapters merged in, and so is what is written: whoever
    loads it needs neither peft nor the base. `save_adapters` writes them alone.
    """
    plain = lm.get_base_model() if hasattr(lm, "peft_config") else lm
    plain.save_pretrained(to, state_dict=state)
    tokenizer.save_pretrained(to)
    share(to)


def save_adapters(lm: Any, state: dict[str, Tensor], to: Path) -> None:
    """A LoRA policy's adapters alone, as peft's folder, a few MB. `state`: `Engine.adapters()`.

    For `PeftModel.from_pretrained(BASE, FOLDER)`, or for vLLM's --lora-modules.
    """
    lm.save_pretrained(to, state_dict=state, save_embedding_layers=False)
    share(to)


def _with_lora(lm: PreTrainedModel, lora: Lora) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "LoRA needs the package peft.", where="model.lora", remedy="pip install peft"
        )
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(lm, settings, autocast_adapter_dtype=False)  # DeepSpeed#8072
    if isinstance(lm.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            "An adapter on the output layer would never be trained: only its weight is used.",
            where="model.lora.targets",
            remedy="leave it out; all-linear does",
        )
    return adapted


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
