"""launch, worker, and jobs: list, show, logs, cancel, resume."""

from __future__ import annotations

import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from sqlalchemy import select

from rl import curves, job_rows, slurm
from rl import launch as launching
from rl import worker as workers
from rl.cli.common import open_database
from rl.evaluation import worker as evaluation
from rl.job_file import JobFile, Spec, host_commands, load
from rl.job_rows import Hold
from rl.logs import LOG, Follower, last_lines, settled
from shared.errors import ConfigError, TirgenError
from shared.store import Database
from shared.store.models import JobPlace, JobRow, JobState
from shared.terminal import Format, age, cell, console, json_text, line, table, visible
from shared.work import celery_app

app = typer.Typer(no_args_is_help=True, help="Training jobs: what they do, and what they did.")

OPEN = (JobState.QUEUED, JobState.RUNNING)
EXIT = {JobState.DONE: 0, JobState.CANCELLED: 130}
STYLES = {
    JobState.RUNNING: "cyan",
    JobState.DONE: "green",
    JobState.FAILED: "red",
    JobState.LOST: "red",
    JobState.CANCELLED: "yellow",
}
POLL = 0.3  # seconds between looks at a log or a row
PLOT_HEIGHT = 8
END_SECONDS = 30.0  # beyond the grace, for processes to be killed and the row to be closed

Name = Annotated[str, typer.Argument(help="The job's name.")]
Detach = Annotated[
    bool, typer.Option("--detach", help="Return at once; the job runs on without this terminal.")
]


def launch(
    file: Annotated[Path, typer.Argument(help="The job, TOML (docs/jobs.md).")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value over the file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be started.")
    ] = False,
    detach: Detach = False,
) -> None:
    """Start a job on a snapshot: here, by Slurm, or on whichever worker takes it from a queue.

    Ctrl-C cancels a job that runs in this terminal; a second one does not wait for its checkpoint.
    """
    chosen = load(file, settings or ())
    db = open_database()
    new = launching.prepare(db, chosen, Path.cwd())
    if dry_run:
        _print_plan(chosen, Spec.model_validate(new.spec))
        return
    job_rows.create(db, new)
    _start(db, new.name, detach)


def worker(
    processes: Annotated[int, typer.Option(help="Jobs at once.", min=1)] = 1,
    queue: Annotated[
        list[str] | None, typer.Option(help="To take work from; may be repeated.")
    ] = None,
) -> None:
    """A Celery worker for this GPU host. On SIGTERM it lets its jobs save, and gives them back."""
    db = open_database()
    broker = celery_app.make_app(db)
    celery_app.prepare_broker(db, broker)
    celery_app.check_broker(broker)
    # Every kind of work is made known here; what a worker takes is told by its queues.
    workers.register_training(broker, db)
    celery_app.register_slices(
        broker, db, evaluation.KIND, evaluation.opener(), evaluation.settings
    )
    workers.run(broker, db, queue or [workers.QUEUE], processes)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(help="Of the newest jobs.", min=1)] = 30,
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """The newest jobs."""
    db = open_database()
    launching.refresh(db)
    with db.session() as session:
        rows = session.scalars(select(JobRow).order_by(JobRow.id.desc()).limit(limit)).all()
        steps = job_rows.last_steps(session, [row.id for row in rows])
    if format is Format.JSON:
        typer.echo(json_text([_facts(row) | {"step": steps.get(row.id)} for row in rows], indent=2))
    elif rows:
        names = ("job", "command", "state", "step", "where", "snapshot", "age")
        console.print(table(names, (_row(row, steps.get(row.id)) for row in rows)))
    else:
        console.print("No jobs yet: tirgen-rl sft, or tirgen-rl launch FILE", style="dim")


@app.command()
def show(
    name: Name,
    metric: Annotated[
        list[str] | None, typer.Option(help="Draw this one large; may be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw all curves into this .png file.")] = None,
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """One job: its facts, checkpoints and curves."""
    db = open_database()
    launching.refresh(db)
    with db.session() as session:
        row = job_rows.find(session, name)
        logged = job_rows.metrics(session, row.id)
        saved = job_rows.checkpoints(session, row.id)
    found = curves.curves(logged)
    if format is Format.JSON:
        told = _facts(row) | {
            "step": logged[-1][0] if logged else None,
            "metrics": logged[-1][1] if logged else {},
            "config": row.config,
            "log_tail": row.log_tail,
            "checkpoints": [
                {"step": s.step, "path": s.path, "n_bytes": s.n_bytes, "digest": s.digest,
                 "saved_at": s.saved_at}
                for s in saved
            ],
        }  # fmt: skip
        typer.echo(json_text(told, indent=2))
    else:
        _print_facts(row)
        if saved:
            listed = ((s.step, _size(s.n_bytes), s.saved_at, s.path) for s in saved[-5:])
            console.print()
            console.print(table(("checkpoint", "size", "saved", "path"), listed))
        _print_curves(found, metric or ())
        if row.state in (JobState.FAILED, JobState.LOST) and row.error_text:
            console.print(f"\n{visible(row.error_text)}", markup=False, highlight=False)
    if plot is not None:
        curves.picture(found, f"{row.command} {row.name} ({row.state})", plot)


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    lines: Annotated[int, typer.Option(help="To begin with.", min=0)] = 50,
) -> None:
    """A job's log: the file where it can be seen from here, else its end as the job reported it."""
    db = open_database()
    row = _find(db, name)
    file = Follower(Path(row.out) / LOG, lines)
    for piece in file.read():
        _echo(piece)
    seen = row.log_bytes or 0
    if not file.found and row.log_tail:
        _echo(last_lines(row.log_tail.rstrip("\n"), lines) + "\n")
    while follow and row.state in OPEN:
        time.sleep(POLL)
        row = _find(db, name)
        if not file.found and row.log_tail and (row.log_bytes or 0) > seen:
            _echo(row.log_tail[seen - (row.log_bytes or 0) :])
            seen = row.log_bytes or 0
        for piece in file.read():
            _echo(piece)


@app.command()
def cancel(
    name: Name,
    grace: Annotated[
        float, typer.Option(help="Seconds in which it may save and end by itself.", min=0)
    ] = 60.0,
) -> None:
    """End a job, all its ranks on all hosts; whoever runs it kills what does not end by itself."""
    db = open_database()
    row = launching.cancel(db, name, grace)
    deadline = time.monotonic() + grace + END_SECONDS
    while row.state in OPEN:
        if time.monotonic() > deadline:
            raise TirgenError(
                f"job {name!r} has not ended yet",
                where=f"{row.host}, process {row.pid}",
                remedy="it ends once its host is heard of again, and counts as cancelled after a "
                f"minute of silence: tirgen-rl jobs show {name}",
            )
        time.sleep(POLL)
        launching.refresh(db)
        row = _find(db, name)
    console.print(f"{name}: {row.state}", highlight=False)


@app.command()
def resume(name: Name, detach: Detach = False) -> None:
    """Go on with a job that failed, was cancelled or lost: from its last checkpoint, as it was."""
    db = open_database()
    launching.refresh(db)
    job_rows.reopen(db, name)
    _start(db, name, detach)


def _start(db: Database, name: str, detach: bool) -> None:
    row = _find(db, name)
    printed = Follower(Path(row.out) / LOG, 0)
    waits = row.place == JobPlace.LOCAL and not detach

    def tick() -> None:
        for piece in printed.read():
            _echo(piece)

    state = launching.start(db, row, detach=detach, tick=tick)
    if not waits:
        told = {
            JobPlace.LOCAL: "started",
            JobPlace.SLURM: "submitted",
            JobPlace.CELERY: f"waits for a worker of queue {row.queue}",
        }[JobPlace(row.place)]
        console.print(f"{name}: {told}; tirgen-rl jobs logs -f {name}", highlight=False)
        return
    console.print(f"{name}: {state}", highlight=False)
    if code := EXIT.get(state, 1):
        raise typer.Exit(code)


def _find(db: Database, name: str) -> JobRow:
    with db.session() as session:
        return job_rows.find(session, name)


def _print_plan(file: JobFile, spec: Spec) -> None:
    console.print_json(file.model_dump_json())
    if spec.place is JobPlace.SLURM:
        typer.echo(slurm.script(spec, file.job.name, Hold(0, 0)))
        return
    for host, command in zip(spec.hosts, host_commands(spec, 0, resume=False), strict=True):
        typer.echo(f"{host.address or 'here'}: {shlex.join(command)}")


def _row(row: JobRow, step: int | None) -> tuple[Any, ...]:
    where = row.queue if row.place == JobPlace.CELERY and row.host is None else row.host
    begun = row.started_at or row.created_at
    return (row.name, row.command, _state(row), step, where or row.place, row.snapshot_name,
            age(begun))  # fmt: skip


def _state(row: JobRow) -> Text:
    told = "cancelling" if row.state == JobState.RUNNING and row.cancel_at else row.state
    return Text(told, style=STYLES.get(JobState(row.state), ""))


def _facts(row: JobRow) -> dict[str, Any]:
    names = (
        "name", "command", "place", "queue", "state", "host", "pid", "world_size", "external_id",
        "snapshot_name", "snapshot_digest", "config_digest", "code_version", "created_by", "out",
        "error_class", "error_text", "losses", "created_at", "started_at", "finished_at",
        "heartbeat_at", "cancel_at",
    )  # fmt: skip
    return {name: getattr(row, name) for name in names}


def _print_facts(row: JobRow) -> None:
    now = datetime.now(row.created_at.tzinfo)
    took = (row.finished_at or now) - row.started_at if row.started_at else None
    where = [row.place, row.queue, row.external_id, row.host, row.pid and f"process {row.pid}"]
    digest = (row.snapshot_digest or "")[:12]
    facts: dict[str, Any] = {
        "job": f"{row.name}, {row.command}",
        "state": _state(row),
        "error": row.error_class,
        "where": ", ".join(str(part) for part in where if part),
        "ranks": row.world_size,
        "snapshot": f"{row.snapshot_name}  {digest}" if row.snapshot_name else None,
        "config": row.config_digest,
        "code": row.code_version,
        "by": row.created_by,
        "created": row.created_at,
        "started": row.started_at,
        "ran": str(took).partition(".")[0] if took else None,
        "last heard of": f"{age(row.heartbeat_at)} ago" if row.heartbeat_at else None,
        "out": row.out,
    }
    for name, value in facts.items():
        if value is not None:
            shown = value if isinstance(value, Text | datetime) else line(str(value))
            console.print(Text(f"{name:14}", style="bold"), cell(shown), end="\n", soft_wrap=True)


def _print_curves(found: list[curves.Curve], wanted: list[str] | tuple[str, ...]) -> None:
    if not found:
        return
    by_name = {curve.name: curve for curve in found}
    for name in wanted:
        if name not in by_name:
            remedy = f"there are: {', '.join(by_name)}"
            raise ConfigError(f"the job has no metric {name!r}", where="--metric", remedy=remedy)
        curve = by_name[name]
        console.print(Text(f"\n{line(name)}, steps {curve.steps[0]} to {curve.steps[-1]}", "bold"))
        rows = curves.plot_lines(curve.values, console.width - 12, PLOT_HEIGHT)
        ends = {
            0: max(curve.finite, default=None),
            PLOT_HEIGHT - 1: min(curve.finite, default=None),
        }
        for i, drawn in enumerate(rows):
            end = ends.get(i)
            console.print(f"{'' if end is None else f'{end:.4g}':>10}  {drawn}", highlight=False)
    if not wanted:
        width = max(8, min(40, console.width - 70))
        listed = (
            (c.name, Text(curves.sparkline(c.values, width), no_wrap=True), c.values[0],
             c.values[-1], min(c.finite, default=None), max(c.finite, default=None))
            for c in found
        )  # fmt: skip
        names = ("metric", f"steps {found[0].steps[0]} to {max(c.steps[-1] for c in found)}",
                 "first", "last", "least", "most")  # fmt: skip
        console.print()
        console.print(table(names, listed))


def _size(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _echo(text: str) -> None:
    sys.stdout.write(visible(settled(text)))
    sys.stdout.flush()
