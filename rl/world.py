"""The ranks of one training job: who this process is, and what ranks tell each other.

Started by torchrun, Slurm or by hand with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
in the environment; without them a world of one. All that ranks exchange goes through here, in an
order that every rank follows.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """rank 0..size-1 over all hosts, local_rank on this one; `device` is where tensors live.

    `group`: the process group it talks in; None is the one that DeepSpeed uses too.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank. Pickled: for what is small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        shared: T = box[0]
        return shared

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks, by name; a rank that does not name one adds nothing to it.

        Added in order of rank, so that every rank has the same bits.
        """
        sums: dict[str, float] = {}
        for given in self.gather(dict(values)):
            for name, value in given.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def concatenated(self, values: Sequence[T]) -> list[T]:
        """The lists of all ranks, one after another."""
        return [one for part in self.gather(list(values)) for one in part]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def aside(self, timeout: timedelta) -> World:
        """The same ranks in a group of their own, for a thread that talks while others train.

        Over gloo and the CPU: its order of calls is independent of what the GPUs are doing.
        """
        group = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None
        return replace(self, device=torch.device("cpu"), group=group)

    def close(self) -> None:
        """Leave the process group, so that the other ranks are not surprised by our end."""
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare_environment() -> None:
    """What DeepSpeed reads when it is imported. Call before the first `import deepspeed`."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed looks for ninja on the PATH, and an environment need not be activated to be used.
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])


def join(timeout: timedelta) -> World:
    """Join the process group that the environment names. `timeout`: of every collective.

    DeepSpeed's own default is 10 minutes since 0.19.6, which a long rollout on one rank outlasts.
    """
    prepare_environment()
    import deepspeed

    # On CPUs DeepSpeed would compile an all-reduce of its own at the first start; gloo's is there.
    compatible: dict[str, bool] = deepspeed.ops.__compatible_ops__
    compatible["deepspeed_shm_comm"] = False
    on_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        address = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(address, MASTER_PORT=str(_free_port()))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo", timeout=timeout, auto_mpi_discovery=False, verbose=False
    )
    return World(dist.get_rank(), dist.get_world_size(), local, device)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
