"""Ending processes that may be ending already."""

from __future__ import annotations

import contextlib

import psutil


def kill(*processes: psutil.Process) -> None:
    """SIGKILL. One that died meanwhile, of its parent's death say, is as dead as was wanted."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_tree(root: psutil.Process) -> None:
    """The process and all that it has started, and wait for its end."""
    kill(*root.children(recursive=True), root)
    psutil.wait_procs([root], 10)
