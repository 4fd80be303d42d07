"""The trackers that people use, by name. Each is imported when it is asked for, and only then."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared.optional import require


@dataclass(frozen=True, slots=True)
class Run:
    """What a tracker is told of the job. The same folder is the same run, also when it resumes."""

    project: str
    name: str
    out: Path
    config: Mapping[str, Any]


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases. After a resume it keeps the first value of a step that was made anew."""

    def __init__(self, run: Run) -> None:
        module = require("wandb", need="log.trackers = wandb", install="wandb")
        digest = hashlib.sha256(str(run.out).encode()).hexdigest()[:12]
        self.run = module.init(
            project=run.project,
            name=run.name,
            id=f"{run.name}-{digest}",
            resume="allow",
            dir=str(run.out),
            config=dict(run.config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    def __init__(self, run: Run) -> None:
        self.module = require("trackio", need="log.trackers = trackio", install="trackio")
        self.module.init(
            project=run.project, name=run.name, config=dict(run.config), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


class Tensorboard:
    """Event files in OUT/tensorboard; steps that are made anew are purged."""

    def __init__(self, run: Run) -> None:
        require("tensorboard", need="log.trackers = tensorboard", install="tensorboard")
        module = require(
            "torch.utils.tensorboard", need="log.trackers = tensorboard", install="tensorboard"
        )
        self._open: Any = module.SummaryWriter
        self._writer: Any = None
        self.folder = run.out / "tensorboard"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open(log_dir=str(self.folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


TRACKERS: Mapping[str, type[Wandb] | type[Trackio] | type[Tensorboard]] = {
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "trackio": Trackio,
}
