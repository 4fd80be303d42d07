"""One training job on one rank: its folder, its record, its metrics, and how it is told to stop.

A job stops in order on SIGTERM, SIGINT or a cancelled record: the step under way ends, a checkpoint
is written, all ranks leave together. `--resume` goes on from there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rl.checkpoint import Checkpoints, Made
from rl.config import Common, ModelConfig
from rl.engine import Engine
from rl.folder import describe
from rl.model import Policy, save_adapters, save_model
from rl.render import Renderer
from rl.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rl.jobs import Job
    from rl.metrics import Metrics

COLUMNS = (
    TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
    TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"),
)  # fmt: skip


class Session:
    """`out` is the job's folder. `job` and `metrics` are the first rank's; elsewhere None."""

    def __init__(
        self,
        command: str,
        out: Path,
        world: World,
        job: Job | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.command, self.out, self.world = command, out, world
        self.job, self.metrics = job, metrics
        self._told = False
        self.console = Console(stderr=True)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While the block runs, SIGTERM and SIGINT ask for an orderly end."""

        def stop(signum: int, frame: FrameType | None) -> None:
            self._told = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stopping(self) -> bool:
        """Has any rank been told to stop? The same on every rank; a collective."""
        mine = self._told or (self.job is not None and self.job.cancelled)
        return self.world.total({"told": float(mine)})["told"] > 0

    def ends_early(self) -> None:
        """Record that the program leaves because it was told to, before its end."""
        if self.job is not None:
            self.job.stopped()

    def engine(self, config: Common, policy: Policy, steps: int) -> Engine:
        return Engine(policy, config.engine, config.optimizer, self.world, steps)

    def checkpoints(self, config: Common, digest: str | None) -> Checkpoints:
        made = Made(self.command, config.fingerprint, digest)
        return Checkpoints(self.out / "checkpoints", made, config.checkpoint.keep, self.world)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.log(step, values)

    def saved(self, step: int, path: Path) -> None:
        if self.job is not None:
            self.job.checkpoint(step, path)

    def export(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, asked: ModelConfig | None = None
    ) -> Path:
        """The model as a Hugging Face folder, `OUT/model`; of LoRA, `OUT/adapters` as well.

        `asked`: the prompts that it was trained with, for the folder to say.
        """
        folder, lm = self.out / "model", engine.policy.lm
        state = engine.state_dict()
        if self.world.is_first:
            save_model(lm, tokenizer, state, folder)
            if asked is not None:
                describe(folder, prompts=asked.prompts, thinking=asked.thinking)
        if hasattr(lm, "peft_config"):
            adapters = engine.adapters()
            if self.world.is_first:
                save_adapters(lm, adapters, self.out / "adapters")
        self.world.barrier()
        return folder

    @contextmanager
    def progress(self, what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """A bar on the first rank: call it with the steps done and what to say beside them."""
        if not self.world.is_first:
            yield lambda step, facts: None
            return
        with Progress(*COLUMNS, console=self.console) as bars:
            task = bars.add_task(what, total=total, completed=done, facts="")
            yield lambda step, facts: bars.update(task, completed=step, facts=facts)


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def values(self) -> dict[str, float]:
        return {f"time/{name}": seconds for name, seconds in self.seconds.items()}


def make_renderer(config: Common, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Raises ConfigError if the chat template cannot be trained with."""
    model = config.model
    return Renderer(tokenizer, model.prompts, style=model.format, thinking=model.thinking)
