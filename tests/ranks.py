"""A program on several ranks, as torchrun starts it, without torchrun's own start.

They are forked from a process that has imported torch and DeepSpeed, which takes a rank eight
seconds of CPU; programs are what they would be as `python -m`.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 100  # seconds; a test has 120 before pytest ends it
COMMON = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

_forked = get_context("forkserver")
_forked.set_forkserver_preload(["deepspeed", "transformers", "torch.distributed.checkpoint"])


class Rank:
    """One process, in a session of its own; as of subprocess.Popen what tests ask of it."""

    def __init__(self, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="rank-", suffix=".log")  # noqa: SIM115
        self._process = _forked.Process(
            target=_be, args=(module, list(arguments), dict(env), self._log.name)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code; None if it goes on."""
        self._process.join(seconds)
        return self.poll()

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def said(self) -> str:
        return Path(self._log.name).read_text(errors="replace")


def _be(module: str, arguments: list[str], env: dict[str, str], log: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    os.environ.update(env)
    sys.argv = [module, *arguments]
    warnings.simplefilter("ignore", FutureWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(
    module: str, arguments: Sequence[str], world: int, env: Mapping[str, str] | None = None
) -> list[Rank]:
    """`python -m MODULE ARGUMENTS` on each rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(COMMON)  # libraries read it when they are imported: in the first process
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common = {**os.environ, **group, **(env or {})}
    return [
        Rank(module, arguments, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


def finish(ranks: Sequence[Rank]) -> str:
    """Their output. Raises AssertionError, with it, if one fails or takes too long."""
    codes = [rank.wait() for rank in ranks]
    for rank in ranks:
        rank.kill()
    said = "\n".join(rank.said() for rank in ranks)
    assert codes == [0] * len(ranks), f"exit codes {codes}: {said[-6000:]}"
    return said


def run(
    module: str, arguments: Sequence[str], world: int, env: Mapping[str, str] | None = None
) -> str:
    return finish(start(module, arguments, world, env))
