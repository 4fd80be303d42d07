"""Removing what hostile code has left behind in its directory."""

from __future__ import annotations

import os
from pathlib import Path


def remove_tree(top: Path) -> None:
    """Remove a directory that hostile code has filled, however deep, whatever its modes."""
    flattened = 0
    pending = True
    while pending:
        pending = False
        top.chmod(0o700)
        with os.scandir(top) as entries:
            listed = list(entries)
        for entry in listed:
            if not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink()
                continue
            Path(entry.path).chmod(0o700)
            with os.scandir(entry.path) as inner:
                for item in list(inner):
                    if item.is_dir(follow_symlinks=False):
                        Path(item.path).chmod(0o700)  # to move a directory is to write in it
                        Path(item.path).rename(top / f".flat{flattened}")
                        flattened, pending = flattened + 1, True
                    else:
                        Path(item.path).unlink()
            Path(entry.path).rmdir()
    top.rmdir()
