"""What a policy's folder says of itself: in a file of ours how it is to be asked, in Hugging Face's
how long its context is and in what its weights are stored. Who may read those may read the weights.

A policy that is asked with other prompts than in training, or in the other mode of thinking, is
measured as a worse one than it is, and nothing looks wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.errors import InputError

NAME = "tirgen.json"
SAID = ("prompts", "thinking")
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def describe(folder: Path, *, prompts: str, thinking: bool) -> None:
    said = {"prompts": prompts, "thinking": thinking}
    (folder / NAME).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def described(folder: Path) -> dict[str, Any]:
    """Prompts and thinking; nothing where the folder is not ours. Raises InputError."""
    found = _read(folder / NAME)
    return {key: found[key] for key in SAID if key in found}


def stored(folder: Path) -> tuple[str | None, int | None]:
    """(fp32 or bf16, positions that it knows) of the model; None where it does not say. Raises
    InputError."""
    found = _read(folder / "config.json")
    inner = found.get("text_config")
    text = {**found, **inner} if isinstance(inner, dict) else found
    positions = text.get("max_position_embeddings")
    dtype = DTYPES.get(str(text.get("dtype") or text.get("torch_dtype")))
    return dtype, positions if isinstance(positions, int) else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"it cannot be read: {error}", where=str(path)) from error


def share(folder: Path) -> None:
    """Give weights the mode of the configuration beside them: safetensors keeps its files to their
    owner, and a server may be another user."""
    mode = next(folder.glob("*config.json")).stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
