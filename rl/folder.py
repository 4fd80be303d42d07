"""What a policy's folder is beside Hugging Face's files: it says how it is to be asked, and who may
read its weights is who may read the rest.

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


def describe(folder: Path, *, prompts: str, thinking: bool) -> None:
    said = {"prompts": prompts, "thinking": thinking}
    (folder / NAME).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def described(folder: Path) -> dict[str, Any]:
    """Prompts and thinking; nothing where the folder is not ours. Raises InputError."""
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in SAID if key in found}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"it cannot be read: {error}", where=str(path)) from error


def share(folder: Path) -> None:
    """Give weights the mode of the configuration beside them: safetensors keeps its files to their
    owner, and a server may be another user."""
    mode = next(folder.glob("*config.json")).stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
