"""What a policy's folder says of itself beside Hugging Face's files: how it is to be asked.

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
