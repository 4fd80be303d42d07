"""A trainer in all but the training: it records itself, logs and saves as a real one does.

    training_program.py sft --out DIR [--resume] [--set key=value]...

    steps=N     so many steps (3)
    hold=N      before step N, wait for the file OUT/go
    fail=N      at step N, raise
    stubborn=1  hear neither SIGTERM nor a cancelled record
    quiet=1     log nothing to standard output

Ranks other than the first wait for the first one's end. Each start writes a line to OUT/starts:
rank, world size, process, first step.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from rl.jobs import Job, open_job
from rl.metrics import Metrics, open_metrics


class Training:
    def __init__(self, out: Path, settings: dict[str, str], resume: bool) -> None:
        self.out, self.settings = out, settings
        self.told = False
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.latest = out / "checkpoints" / "latest"
        self.done = int(self.latest.read_text()) if resume else 0
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, *_: object) -> None:
        self.told = "stubborn" not in self.settings

    def number(self, name: str, default: int) -> int:
        return int(self.settings.get(name, default))

    def start(self) -> None:
        with (self.out / "starts").open("a") as starts:
            print(self.rank, self.world, os.getpid(), self.done + 1, file=starts, flush=True)

    def run(self, job: Job, metrics: Metrics) -> None:
        """What rank 0 does."""
        for step in range(self.done + 1, self.number("steps", 3) + 1):
            while step == self.number("hold", 0) and not (self.out / "go").exists():
                if self.stopping(job):
                    break
                time.sleep(0.02)
            if self.stopping(job):
                job.stopped()
                return
            if step == self.number("fail", 0):
                raise ValueError(f"no step {step}\x1b[31m")
            metrics.log(step, {"loss": 1 / step, "reward/episode": step / 10})
            print(f"step {step}", flush=True)
            folder = self.latest.parent / f"step-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state").write_text("x" * step)
            job.checkpoint(step, folder, digest=f"digest {step}")
            part = self.latest.with_name("part")
            part.write_text(str(step))
            part.replace(self.latest)

    def stopping(self, job: Job) -> bool:
        return self.told or ("stubborn" not in self.settings and job.cancelled)

    def wait(self) -> None:
        """What the other ranks do."""
        while not (self.out / "over").exists():
            time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--snapshot")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    settings = dict(setting.split("=", 1) for setting in given.set)
    training = Training(given.out, settings, given.resume)
    training.start()
    if training.rank:
        training.wait()
        return 0
    config = {"steps": training.number("steps", 3)}
    try:
        with open_job(
            given.command, config, None, given.out, resume=given.resume, world_size=training.world
        ) as job:
            metrics = open_metrics([], given.out, job, config=config)
            try:
                training.run(job, metrics)
            finally:
                metrics.close()
    finally:
        (given.out / "over").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
