"""Slurm: the script of a job, what runs in it, and the programs that are asked about it.

    python -m rl.slurm ID:TOKEN srun ...

is all that the script comes to: it runs that command, beats for the job while it runs, and records
how it ended where the trainer did not come to. Slurm itself starts and kills the ranks.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from rl import job_rows
from rl.job_file import CHECKPOINT, RECIPE, Spec, command, port
from rl.job_rows import Hold, JobLost, Tail
from rl.jobs import BEAT_SECONDS
from rl.logs import LOG, last_lines, read_tail
from rl.verdicts import ERROR_LINES, patiently, verdict
from shared.errors import DatabaseError, TirgenError
from shared.store.database import Database, resolve_url

SCRIPT = "job.sbatch"


class SlurmError(TirgenError):
    """A program of Slurm's is missing or refused."""


def script(spec: Spec, name: str, hold: Hold) -> str:
    """What sbatch is given."""
    return _template().render(
        name=name,
        hold=f"{hold.id}:{hold.token}",
        options=list(_options(spec, name)),
        env=spec.env,
        cwd=spec.cwd,
        setup=spec.slurm.setup,
        checkpoint=str(Path(spec.out) / CHECKPOINT),
        port=port(spec, hold.id),
        python=spec.python,
        processes=spec.hosts[0].processes,
        program=shlex.join(command(spec, resume=False)),
    )


def submit(spec: Spec, name: str, hold: Hold) -> str:
    """Write recipe and script into the job's folder and submit; Slurm's number for it.

    Raises SlurmError.
    """
    out = Path(spec.out)
    out.mkdir(parents=True, exist_ok=True)
    if spec.recipe is not None:
        (out / RECIPE).write_text(spec.recipe, encoding="utf-8")
    file = out / SCRIPT
    file.write_text(script(spec, name, hold), encoding="utf-8")
    said = _run("sbatch", "--parsable", str(file))
    return said.strip().partition(";")[0]  # ID, or ID;CLUSTER


def cancel(external_id: str) -> None:
    """SIGTERM to all ranks, then SIGKILL, by Slurm. Raises SlurmError."""
    _run("scancel", external_id)


def is_known(external_id: str) -> bool | None:
    """Has Slurm the job in its queue, waiting or running? None where that cannot be asked."""
    try:
        said = _run("squeue", "--noheader", "--jobs", external_id, "--format", "%T")
    except SlurmError as error:
        return False if "Invalid job id" in error.what else None
    return bool(said.strip())


def run(db: Database, hold: Hold, command: Sequence[str], external_id: str | None) -> int:
    """Run the command for the job; its exit status. Raises JobLost where the job is not to be run.

    SIGTERM is for the ranks, which get it from Slurm; this waits for their end.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    row = job_rows.start(db, hold, socket.gethostname(), os.getpid(), external_id)
    log = Path(row.out) / LOG
    known = None
    asked = False
    process = subprocess.Popen(command)
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(BEAT_SECONDS)
            break
        try:
            tail = read_tail(log, known)
            order = job_rows.beat(db, hold, tail)
            known = tail.n_bytes if tail else known
            late = order.asked is not None and order.asked > order.grace
        except DatabaseError:
            continue
        except JobLost:
            late = True
        if late and not asked:
            asked = True
            process.terminate()  # srun passes it on
    close(db, hold, 128 - code if code < 0 else code, read_tail(log))
    return code


def close(db: Database, hold: Hold, code: int, tail: Tail | None) -> None:
    """Record what the trainer, killed perhaps, did not come to record itself."""
    state, error_class, error_text = verdict(code)
    if code and tail:
        error_text = f"{error_text}\n{last_lines(tail.text, ERROR_LINES)}"
    patiently(lambda: job_rows.end(db, hold, state, error_class, error_text, tail))


def _options(spec: Spec, name: str) -> Iterator[str]:
    slurm = spec.slurm
    processes = spec.hosts[0].processes
    log = str(Path(spec.out) / LOG).replace("%", "%%")  # which begins one of Slurm's patterns
    yield f"--job-name={name}"
    yield f'--output="{log}"'
    yield "--open-mode=append"
    yield f"--nodes={spec.nodes}"
    yield "--ntasks-per-node=1"
    gpus = processes if slurm.gpus_per_node is None else slurm.gpus_per_node
    if gpus != 0:
        yield f"--gpus-per-node={gpus}"
    for option in ("partition", "account", "qos", "constraint", "time", "mem", "cpus_per_task"):
        value = getattr(slurm, option)
        if value is not None:
            yield f"--{option.replace('_', '-')}={value}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    if slurm.warn_seconds:
        yield f"--signal=TERM@{slurm.warn_seconds}"
    yield from slurm.options


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("rl", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["inner"] = lambda text: text.replace("'", "'\\''")  # within '…'
    return environment.get_template("slurm.sbatch.jinja")


def _run(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{program} is not there",
            where="PATH",
            remedy="launch from a host that submits to Slurm, or with another job.where",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{program} does not answer", where=" ".join(arguments)) from error
    if done.returncode:
        raise SlurmError(f"{program}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def main() -> int:
    job_id, _, token = sys.argv[1].partition(":")
    hold = Hold(int(job_id), int(token))
    return run(Database(resolve_url()), hold, sys.argv[2:], os.environ.get("SLURM_JOB_ID"))


if __name__ == "__main__":
    sys.exit(main())
