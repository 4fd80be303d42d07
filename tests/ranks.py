"""A program on several ranks, as torchrun starts it, without torchrun's own start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 100  # seconds; a test has 120 before pytest ends it


def start(
    module: str, arguments: Sequence[str], world: int, env: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """`python -m MODULE ARGUMENTS` on each rank, in a session of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONWARNINGS": "ignore::FutureWarning", "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
    } | (env or {})  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> str:
    """Their output. Raises AssertionError, with it, if one fails or takes too long."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=PATIENCE)[0])
    except subprocess.TimeoutExpired as error:
        outputs.append(f"{error}: {error.output!r}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(outputs)
    assert all(process.returncode == 0 for process in processes), said[-6000:]
    return said


def run(
    module: str, arguments: Sequence[str], world: int, env: dict[str, str] | None = None
) -> str:
    return finish(start(module, arguments, world, env))
