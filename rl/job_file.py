"""The job file: what to train, on which snapshot, where. And the command that comes of it.

    [job]
    name = "sft-1"
    command = "sft"                 # sft, train, eval
    snapshot = "gsm-v1"
    model = "Qwen/Qwen3-0.6B"
    recipe = "sft.toml"             # the trainer's --config; may name its preset
    where = "local"                 # local, slurm, celery
    processes = 8                   # on each host

    [set]                           # over the recipe: its keys, as for --set
    "optimizer.lr" = 2e-6

A `Spec` is the job file made whole: absolute paths, the recipe's text. It is all that is needed to
start the job on any host at any later time, and is kept in the job's row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shared.config import Section, merge_settings, parse, read_file
from shared.errors import ConfigError
from shared.store.models import JobPlace

RECIPE = "recipe.toml"
CHECKPOINT = "checkpoints/latest"  # in OUT: there is something to go on from
PORTS = range(20_000, 30_000)  # of rendezvous; below those that the kernel gives out
TORCHRUN = ("-m", "torch.distributed.run")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Word = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")]


class SlurmOptions(Section):
    """#SBATCH lines by their names; `options` are further ones, as they stand."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Word | None = Field(default=None, description="Limit, as 24:00:00 or 2-00:00:00.")
    mem: Word | None = None
    cpus_per_task: int | None = Field(default=None, ge=1)
    gpus_per_node: str | int | None = Field(
        default=None, description="Default: as many as processes. 0: none asked for."
    )
    warn_seconds: int = Field(
        default=120, ge=0, description="So long before its time is up, the job may save."
    )
    requeue: bool = Field(default=True, description="After preemption Slurm starts it again.")
    options: tuple[Word, ...] = Field(default=(), description='As "--exclusive".')
    setup: tuple[str, ...] = Field(default=(), description="Shell lines before the start.")


class CeleryOptions(Section):
    queue: Name = "train"
    restarts: int = Field(
        default=0,
        ge=0,
        description="How often another worker goes on when the job's host died.",
    )


class JobOptions(Section):
    name: Name
    command: Literal["sft", "train", "eval"]
    snapshot: Word | None = Field(default=None, description="A snapshot's name, or a folder.")
    model: Word | None = Field(default=None, description="A Hugging Face folder, or a name.")
    preset: Word | None = Field(default=None, description="What the recipe stands on.")
    recipe: Path | None = Field(default=None, description="A TOML file: the command's --config.")
    out: Path | None = Field(default=None, description="The job's folder; default runs/NAME.")
    where: JobPlace = JobPlace.LOCAL
    processes: int = Field(default=1, ge=1, description="On each host: one per GPU.")
    nodes: int = Field(default=1, ge=1, description="slurm: hosts.")
    hosts: tuple[Word, ...] = Field(default=(), description="local: hosts reached by ssh.")
    hostfile: Path | None = Field(
        default=None, description="local: the same as a file, a line each: HOST slots=N."
    )
    master_port: int | None = Field(default=None, ge=1024, le=65535)
    python: Word = Field(default=sys.executable, description="The interpreter, on every host.")
    program: tuple[Word, ...] = Field(
        default=("-m", "rl.cli"),
        min_length=1,
        description="What python runs; a trainer of your own may stand here.",
    )
    arguments: tuple[str, ...] = Field(default=(), description="Further ones of the command.")
    env: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _fits_its_place(self) -> JobOptions:
        if self.hosts and self.hostfile:
            raise ValueError("hosts and hostfile: one of them")
        if (self.hosts or self.hostfile) and self.where is not JobPlace.LOCAL:
            raise ValueError("hosts and hostfile need where = 'local'")
        if self.nodes > 1 and self.where is not JobPlace.SLURM:
            raise ValueError("nodes needs where = 'slurm'; elsewhere name hosts or a hostfile")
        if self.command == "eval" and (self.snapshot or self.preset):
            raise ValueError(
                "eval takes no snapshot and no preset; write arguments = ['--benchmark', ...]"
            )
        return self


class JobFile(Section):
    job: JobOptions
    set: dict[str, Any] = Field(default={}, description="Over the recipe, as --set.")
    slurm: SlurmOptions = SlurmOptions()
    celery: CeleryOptions = CeleryOptions()


class Host(Section):
    """Where ranks run. `address` None: the host that the job is started on."""

    address: str | None = None
    processes: int = 1


class Spec(Section):
    """How to start a job. `arguments` are the program's, without --config and --resume."""

    place: JobPlace
    python: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    recipe: str | None = Field(default=None, description="Its text.")
    out: str
    cwd: str
    hosts: tuple[Host, ...] = (Host(),)
    nodes: int = 1
    master_port: int | None = None
    env: dict[str, str] = Field(default={})
    slurm: SlurmOptions = SlurmOptions()

    @property
    def world_size(self) -> int:
        return self.nodes * sum(host.processes for host in self.hosts)


def load(file: Path, settings: Iterable[str] = ()) -> JobFile:
    """The file with `section.key=value` settings over it. Raises ConfigError naming the key."""
    values = read_file(file)
    merge_settings(values, settings)
    return parse(JobFile, values, str(file), "docs/jobs.md lists every key")


def make_spec(file: JobFile, cwd: Path) -> Spec:
    """Raises ConfigError for a recipe or host file that cannot be read."""
    job = file.job
    out = (cwd / (job.out or Path("runs") / job.name)).resolve()
    given = {"preset": job.preset, "snapshot": job.snapshot, "model": job.model}
    # An evaluation has no folder: its attempts are trajectories of a run, which has a name.
    given |= {"run": job.name} if job.command == "eval" else {"out": str(out)}
    arguments: list[str] = [job.command]
    for name, value in given.items():
        if value is not None:
            arguments += [f"--{name}", _path(value, cwd)]
    for setting in settings(file.set):
        arguments += ["--set", setting]
    return Spec(
        place=job.where,
        python=job.python,
        program=job.program,
        arguments=(*arguments, *job.arguments),
        recipe=_text(cwd / job.recipe) if job.recipe else None,
        out=str(out),
        cwd=str(cwd),
        hosts=hosts(job, cwd),
        nodes=job.nodes,
        master_port=job.master_port,
        env=job.env,
        slurm=file.slurm,
    )


def command(spec: Spec, *, resume: bool) -> list[str]:
    """The program with all its arguments, for one rank."""
    found = [*spec.program, *spec.arguments]
    if spec.recipe is not None:
        found += ["--config", str(Path(spec.out) / RECIPE)]
    return found + ["--resume"] * resume


def host_commands(spec: Spec, job_id: int, *, resume: bool) -> list[list[str]]:
    """The command of each host of a local job: plain for one process, by torchrun for more."""
    program = command(spec, resume=resume)
    if spec.world_size == 1:
        return [[spec.python, *program]]
    found = []
    for rank, host in enumerate(spec.hosts):
        where = ["--nproc-per-node", str(host.processes)]
        if len(spec.hosts) == 1:
            where += ["--standalone"]
        else:
            where += ["--nnodes", str(len(spec.hosts)), "--node-rank", str(rank)]
            where += ["--master-addr", str(spec.hosts[0].address)]
            where += ["--master-port", str(port(spec, job_id))]
        # torchrun takes -m for itself; a program that is a file needs nothing.
        found.append([spec.python, *TORCHRUN, *where, *program])
    return found


def port(spec: Spec, job_id: int) -> int:
    """Of the rendezvous: two jobs that share a host have different ones."""
    return spec.master_port or PORTS[job_id % len(PORTS)]


def settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key=value` of each leaf, the value as TOML."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        else:
            # JSON's texts, numbers, booleans and lists are TOML's, too.
            yield f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}"


def hosts(job: JobOptions, cwd: Path) -> tuple[Host, ...]:
    if job.hostfile:
        where = cwd / job.hostfile
        found = tuple(_host(line, job.processes, where) for line in _lines(_text(where)))
        if not found:
            raise ConfigError("the host file names no host", where=str(where))
        return found
    if job.hosts:
        return tuple(Host(address=address, processes=job.processes) for address in job.hosts)
    return (Host(processes=job.processes),)


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if plain := line.partition("#")[0].strip():
            yield plain


def _host(line: str, processes: int, where: Path) -> Host:
    """`HOST`, or DeepSpeed's `HOST slots=N`."""
    address, *rest = line.split()
    match rest:
        case []:
            return Host(address=address, processes=processes)
        case [slots] if slots.startswith("slots=") and slots[6:].isdecimal() and int(slots[6:]):
            return Host(address=address, processes=int(slots[6:]))
    raise ConfigError(
        f"not a line of a host file: {line!r}", where=str(where), remedy="write HOST slots=N"
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the file: {error}", where=str(file)) from error


def _path(value: str, cwd: Path) -> str:
    """A path below `cwd` made absolute; a name (of a snapshot, on the Hub) as it is."""
    if "/" in value and (cwd / value).exists():
        return str((cwd / value).resolve())
    return value
