"""Checkpoints: everything that a job needs to go on as if it had not stopped.

Contract. `OUT/checkpoints/step-N` is there as a whole or not at all: it is written beside its place
and renamed. `latest` names the newest and is replaced after that. A checkpoint holds DeepSpeed's
state (parameters, optimizer), the random state of every rank, the position in the data, the rollout
buffer, and what it was made from: fingerprint of the configuration, digest of the snapshot. A job
does not go on from what was made from something else.

On the same number of ranks, resuming is exact to the bit (on CPUs). On another number, DeepSpeed's
universal checkpoint is made of it first, and sums over ranks are added in another order.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.data import Position
from rl.engine import Engine
from rl.world import World
from shared.errors import ConfigError, InputError

STATE = "state.json"
DEEPSPEED = "deepspeed"
UNIVERSAL = "universal"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands: its steps (RL: rounds), and its position in the data."""

    step: int = 0
    position: Position = field(default_factory=Position)


@dataclass(frozen=True, slots=True)
class Made:
    """What a checkpoint was made from. A job goes on from it only if all of it is the same."""

    command: str
    fingerprint: str
    snapshot: str | None


class Checkpoints:
    """The checkpoints of one job, in `folder`."""

    def __init__(self, folder: Path, made: Made, keep: int, world: World) -> None:
        self.folder, self.made, self.keep, self.world = folder, made, keep, world

    def save(self, engine: Engine, progress: Progress, buffer: Any = None) -> Path:
        """Every rank calls it. `buffer`: what this rank has sampled and not yet trained on."""
        final = self.folder / f"step-{progress.step:06d}"
        part = self.folder / f".{final.name}.part"
        if self.world.is_first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.world.barrier()
        engine.engine.save_checkpoint(str(part), tag=DEEPSPEED, save_latest=False)
        torch.save(
            {"random": random_state(), "buffer": buffer}, part / f"rank-{self.world.rank}.pt"
        )
        self.world.barrier()
        if self.world.is_first:
            state = {
                "made": asdict(self.made),
                "world": self.world.size,
                "steps": engine.steps,
                "progress": asdict(progress),
            }
            (part / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
            _sync_folder(part)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            _replace(self.folder / "latest", final.name)
            self._forget_old()
        self.world.barrier()
        return final

    def load(self, engine: Engine) -> tuple[Progress, Any]:
        """The newest checkpoint into `engine`; progress, and this rank's buffer (None: none).

        Raises InputError where there is none, ConfigError where it was made from something else.
        """
        folder = newest(self.folder)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self._check(folder, state["made"])
        same = state["world"] == self.world.size
        where, tag = (folder, DEEPSPEED) if same else self._universal(folder, engine)
        loaded, _ = engine.engine.load_checkpoint(str(where), tag=tag)
        if loaded is None:
            raise InputError("DeepSpeed could not load the checkpoint.", where=str(folder))
        engine.steps = state["steps"]
        buffer = None
        if same:
            mine = torch.load(folder / f"rank-{self.world.rank}.pt", weights_only=False)
            set_random_state(mine["random"])
            buffer = mine["buffer"]
        at = state["progress"]
        return Progress(at["step"], Position(**at["position"])), buffer

    def _check(self, folder: Path, made: dict[str, Any]) -> None:
        now = asdict(self.made)
        changed = [
            f"{key}: {made[key]} then, {now[key]} now" for key in now if made[key] != now[key]
        ]
        if changed:
            raise ConfigError(
                "The checkpoint was made from something else:\n    " + "\n    ".join(changed),
                where=str(folder),
                remedy="resume with the configuration and snapshot it was made with, or start anew"
                " in another --out; --model may be the checkpoint's export",
            )

    def _universal(self, folder: Path, engine: Engine) -> tuple[Path, str]:
        """The same state in a form that any number of ranks can load; made once, by rank 0."""
        if engine.config.zero == 0:
            return folder, DEEPSPEED  # every rank has everything
        target = folder / UNIVERSAL
        if self.world.is_first and not target.exists():
            part = folder / f".{UNIVERSAL}.part"
            shutil.rmtree(part, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(folder / DEEPSPEED), "--output_folder", str(part)]
            command += ["--inject_missing_state", "--num_extract_workers", "1"]
            command += ["--num_merge_workers", "1"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(
                    f"The checkpoint cannot be converted for {self.world.size} ranks: "
                    f"{done.stderr.strip()[-2000:]}",
                    where=str(folder),
                    remedy="resume with as many ranks as it was saved with",
                )
            part.rename(target)
        self.world.barrier()
        engine.engine._config.load_universal_checkpoint = True
        return folder, UNIVERSAL

    def _forget_old(self) -> None:
        old = sorted(self.folder.glob("step-*"))[: -self.keep]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)


def newest(folder: Path) -> Path:
    """The newest checkpoint of a job. Raises InputError where there is none."""
    named = folder / "latest"
    if not named.exists():
        raise InputError(
            "There is no checkpoint to go on from.",
            where=str(folder),
            remedy="start without --resume; checkpoint.every says how often one is written",
        )
    return folder / named.read_text(encoding="utf-8").strip()


def seed_random(seed: int) -> None:
    """Seed everything in this process that draws without a seed of ours."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Of everything in this process that draws without a seed of ours."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _sync_folder(folder: Path) -> None:
    """Onto the disk, before a rename says that it is there."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
