"""Which version of the code is running."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path


def code_version() -> str:
    """The package's version, and the commit where it runs from a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return version("tirgen")
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return f"{version('tirgen')}+{commit}" if commit else version("tirgen")
