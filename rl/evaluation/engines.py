"""Opening a policy for an evaluation: weights run here, a server of token ids, or one of texts.

The prompt is `rl.render.Renderer`'s, as in training. A local engine is kept by the process from
slice to slice: a worker does not load its weights every minute.
"""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.evaluation.config import EvaluationConfig, PolicyConfig
from shared.endpoints import Endpoint
from shared.errors import InputError
from shared.policy import Codec, Engine

if TYPE_CHECKING:
    from rl.render import Renderer
    from rl.rollout.local import LocalEngine

_ENDS = 1 << 20  # bytes of each end of a large file that its digest covers


@asynccontextmanager
async def open_policy(config: EvaluationConfig) -> AsyncIterator[tuple[Engine, Codec]]:
    """Raises InputError for weights or a tokenizer that cannot be read, ConfigError for a chat
    template that cannot be trusted, EndpointError for a server that does not answer."""
    policy = config.policy
    if policy.engine == "local":
        assert policy.model is not None
        asked = (policy.model, policy.prompts, policy.thinking, policy.dtype, policy.slots,
                 config.budgets.context)  # fmt: skip
        if asked not in _kept:
            _forget()
            _kept[asked] = _local(*asked)
        yield _kept[asked]
        return
    assert policy.endpoint is not None
    async with Endpoint(policy.endpoint) as endpoint:
        await endpoint.check()
        if policy.engine == "text" and policy.tokenizer is None:
            from shared import text_policy

            yield text_policy.TextEngine(endpoint), text_policy.TextCodec(policy.prompts)
            return
        renderer = _renderer(policy.tokenizer or policy.endpoint.model, policy)
        if policy.engine == "text":
            from rl.evaluation.text_engine import TextEngine

            yield TextEngine(endpoint, renderer), renderer
        else:
            from rl.rollout.http import HttpEngine

            yield HttpEngine(endpoint, eos={renderer.eos}), renderer


_kept: dict[object, tuple[LocalEngine, Renderer]] = {}  # the last one only


@atexit.register
def _forget() -> None:
    """Close it: its thread keeps it in memory, and torch aborts a process that ends in a step."""
    while _kept:
        _kept.popitem()[1][0].close()


def _local(
    model: str, prompts: str, thinking: bool, dtype: str, slots: int, context: int
) -> tuple[LocalEngine, Renderer]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from rl.rollout.local import LocalEngine

    policy = PolicyConfig.model_validate(
        {"model": model, "prompts": prompts, "thinking": thinking, "dtype": dtype}
    )
    renderer = _renderer(model, policy)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    logging.disable_progress_bar()  # ours is on the screen
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=kinds[dtype])
    except (OSError, ValueError) as error:
        raise _unreadable(model, "model", error) from error
    engine = LocalEngine(
        lm.to(device), renderer.tokenizer, eos=_ends(lm, renderer), slots=slots, max_len=context
    )
    return engine, renderer


def _ends(lm: Any, renderer: Renderer) -> set[int]:
    """What ends a turn: the template's own mark, and whatever the model says ends a text."""
    said = getattr(lm.generation_config, "eos_token_id", None)
    listed = said if isinstance(said, list) else [said]
    return {renderer.eos, *(i for i in listed if i is not None)}


def _renderer(tokenizer: str, policy: PolicyConfig) -> Renderer:
    from transformers import AutoTokenizer

    from rl.render import Renderer

    try:
        found = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise _unreadable(tokenizer, "tokenizer", error) from error
    return Renderer(found, policy.prompts, thinking=policy.thinking)


def _unreadable(name: str, what: str, error: Exception) -> InputError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"Cannot load the {what}: {first}",
        where=name,
        remedy="name a Hugging Face folder (config.json, model.safetensors, tokenizer.json)",
    )


def digest(folder: Path) -> str:
    """Of a folder's weights and tokenizer, so that a name cannot come to mean another model.

    Of files larger than 2 MiB it covers the length and both ends.
    """
    found = hashlib.sha256()
    names = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.bin")
    for path in sorted({path for name in names for path in folder.glob(name)}):
        size = path.stat().st_size
        found.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            found.update(file.read(_ENDS))
            if size > 2 * _ENDS:
                file.seek(size - _ENDS)
            found.update(file.read(_ENDS))
    return found.hexdigest()[:16]
