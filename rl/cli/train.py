"""sft and train: one training job, on this rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared import seeds
from shared.errors import ConfigError
from shared.terminal import console, table

if TYPE_CHECKING:
    from rl.config import Common

Preset = Annotated[str | None, typer.Option(help="Where the configuration starts from.")]
File = Annotated[Path | None, typer.Option("--config", help="TOML, over the preset.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over both; may be repeated.")
]
Model = Annotated[str | None, typer.Option(help="Hugging Face folder or name: model.path.")]
Snapshot = Annotated[str | None, typer.Option(help="Snapshot or exported folder: data.snapshot.")]
Out = Annotated[Path | None, typer.Option(help="The job's folder: checkpoints, metrics, model.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the configuration and the batch arithmetic.")
]
Name = Annotated[str | None, typer.Option(help="The job's name in the database; default: --out's.")]


def sft(
    snapshot: Snapshot = None, model: Model = None, preset: Preset = None, config: File = None,
    settings: Settings = None, out: Out = None, name: Name = None, resume: Resume = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Cold start: supervised fine-tuning on the trajectories of a snapshot.

    Presets: `sft-paper`, `sft-authors-code`, `sft-nano`. The result is `OUT/model`, a Hugging Face
    folder. On several GPUs: `torchrun --nproc-per-node N -m rl.cli sft ...`, or `tirgen-rl launch`.
    """
    from rl import sft as program
    from rl.config import SftConfig, load

    chosen = load(SftConfig, preset, config, settings or (), model, snapshot)
    if not _printed(chosen, dry_run):
        _run("sft", chosen, program.run, out, name, resume)


def train(
    snapshot: Snapshot = None, model: Model = None, preset: Preset = None, config: File = None,
    settings: Settings = None, out: Out = None, name: Name = None, resume: Resume = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Hierarchical RL: whole solutions and failed steps, on the problems of a snapshot.

    Presets: `rl-paper`, `rl-paper-thinking`, `rl-authors-code`, `rl-authors-code-thinking`,
    `rl-nano`. One level alone: `--set 'levels=["episode"]'`.
    """
    from rl import hierarchical as program
    from rl.config import TrainConfig, load

    chosen = load(TrainConfig, preset, config, settings or (), model, snapshot)
    if not _printed(chosen, dry_run):
        _run("train", chosen, program.run, out, name, resume)


def _printed(config: Common, dry_run: bool) -> bool:
    from rl.config import batch_arithmetic

    if dry_run:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        typer.echo(config.model_dump_json(indent=2))
        console.print(table(("batch", "is"), batch_arithmetic(config, world)))
        console.print(f"fingerprint {config.fingerprint}", highlight=False)
    return dry_run


def _run(
    command: str,
    config: Common,
    program: Callable[..., None],
    out: Path | None,
    name: str | None,
    resume: bool,
) -> None:
    """The program on this rank; the first one records the job and its metrics."""
    from rl.checkpoint import seed_random
    from rl.data import NANO
    from rl.jobs import open_job
    from rl.metrics import open_metrics
    from rl.session import Session
    from rl.world import join
    from shared.store.snapshot_reader import Snapshot

    world = join(timedelta(minutes=config.engine.timeout_minutes))
    seed_random(seeds.derive(config.seed, "rank", world.rank))
    folder = world.share(out or Path("runs") / (name or f"{command}-{datetime.now():%m%d-%H%M%S}"))
    _check(folder, resume)
    try:
        if not world.is_first:
            program(config, Session(command, folder, world), resume=resume)
            return
        data = config.data
        snapshot = None if data.snapshot == NANO else Snapshot.open(data.snapshot, data.url)
        plain = config.model_dump(mode="json")
        with open_job(
            command, plain, snapshot, folder, name=name, resume=resume, world_size=world.size,
            url=data.url,
        ) as job:  # fmt: skip
            (folder / "config.json").write_text(config.model_dump_json(indent=2), encoding="utf-8")
            metrics = open_metrics(
                config.log.trackers, folder, job, config=plain, project=config.log.project
            )
            try:
                program(config, Session(command, folder, world, job, metrics), resume=resume)
            finally:
                metrics.close()
        console.print(f"done: {folder}/model", highlight=False)
    finally:
        world.close()


def _check(folder: Path, resume: bool) -> None:
    """Refuse to write over an earlier job."""
    if not resume and (folder / "checkpoints" / "latest").exists():
        raise ConfigError(
            "There is a job in this folder already.",
            where=str(folder),
            remedy="go on with it by --resume, or name another --out",
        )
