"""generate, resume, retry, cancel: a run from the command line, watched until it ends."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from sqlalchemy import func, select

from shared.errors import ConfigError
from shared.problems import field_map, load_problems
from shared.sandbox.backend import backend
from shared.sandbox.diagnose import probe
from shared.store.models import ItemState, RunState
from shared.store.queries import Funnel, usage
from shared.terminal import console
from shared.work import items
from tirgen import budgets, runs
from tirgen.cli.common import open_database
from tirgen.cli.read import stats
from tirgen.client import Client
from tirgen.config import PRESETS, RunConfig, override

Preset = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML, over the preset.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over both; may be repeated.")
]
BaseUrl = Annotated[
    str | None,
    typer.Option(envvar="TIRGEN_BASE_URL", help="OpenAI-compatible server of all roles."),
]
Model = Annotated[str | None, typer.Option(help="Model name, all roles.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Stop the run when it has used so many, all roles.")
]
MaxCost = Annotated[
    float | None, typer.Option(min=0, help="Stop the run when it has cost that; needs prices.")
]
Deadline = Annotated[
    str | None, typer.Option(help="Stop the run then: 90m, 8h, 2d, or a date and time.")
]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once; workers go on.")]
Name = Annotated[str, typer.Argument(help="The run's name, see `tirgen runs`.")]


def generate(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Problem files (jsonl, csv, parquet), a dataset's name, or `nano`."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; made up if not given.")] = None,
    run_prefix: Annotated[str, typer.Option(hidden=True)] = "run",
    samples: Annotated[int, typer.Option(min=1, help="Trajectories per problem.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.")] = None,
    map: Annotated[
        list[str] | None,
        typer.Option("--map", help="Columns: problem=question,answer=final; boxed:solution too."),
    ] = None,
    from_snapshot: Annotated[
        str | None, typer.Option(help="The problems of this snapshot.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="The problems of trajectories, as `tirgen query` finds them.")
    ] = None,
    unsolved_by: Annotated[
        str | None, typer.Option(help="Only problems that this run could not solve.")
    ] = None,
    max_rate: Annotated[
        float, typer.Option(min=0, max=1, help="--unsolved-by: pass rate up to which, included.")
    ] = 0.0,
    preset: Preset = "nano",
    config: ConfigFile = None,
    settings: Settings = None,
    base_url: BaseUrl = None,
    model: Model = None,
    no_tool: Annotated[
        bool, typer.Option("--no-tool", help="The reasoner alone: measures what it solves so.")
    ] = False,
    slots: Annotated[int, typer.Option(min=1, help="Worker processes at once.")] = 1,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    deadline: Deadline = None,
    detach: Detach = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration.")
    ] = False,
) -> None:
    """Turn problems into vetted trajectories.

    With nothing configured this starts its own PostgreSQL, worker and small model, and leaves them
    up (`tirgen down` stops them). Ctrl-C stops the run; `tirgen resume` goes on with it.
    """
    if not (files or from_snapshot or where is not None or unsolved_by):
        remedy = "name a file, a dataset, `nano`, --from-snapshot, --where or --unsolved-by"
        raise ConfigError("there are no problems to generate from", remedy=remedy)
    fields = field_map(map or ())
    sources = [load_problems(source, limit, fields) for source in files or ()]
    problems = [problem for source in sources for problem in source]
    for source in sources:
        if source.n_duplicates or source.n_unanswered:
            console.print(
                f"{source.source}: left out {source.n_duplicates} duplicates and "
                f"{source.n_unanswered} problems without an answer",
                highlight=False,
                markup=False,
            )
    client = Client()
    settings = [*(settings or ()), *_limits(client, max_tokens, max_cost, deadline)]
    chosen = client.configure(preset, config, settings, base_url, model, tool=not no_tool)
    if show_config:
        typer.echo(chosen.model_dump_json(indent=2))
        return
    if from_snapshot or where is not None or unsolved_by:
        problems = client.problems(
            among=problems, snapshot=from_snapshot, where=where,
            unsolved_by=unsolved_by, max_rate=max_rate,
        )  # fmt: skip
    name = run or f"{run_prefix}-{datetime.now():%m%d-%H%M%S}"
    _announce_sandbox(client, chosen)
    client.generate(problems, config=chosen, run=name, samples=samples, limit=limit, slots=slots)
    _watch(client, name, detach)


def resume(
    name: Name,
    config: ConfigFile = None,
    settings: Settings = None,
    base_url: BaseUrl = None,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    deadline: Deadline = None,
    detach: Detach = False,
) -> None:
    """Go on with a run that was stopped or whose workers died.

    Its configuration is the stored one. Addresses, patience, prices, limits and `in_flight` may be
    changed here; what would generate something else is refused, and the field named.
    """
    client = Client()
    settings = [*(settings or ()), *_limits(client, max_tokens, max_cost, deadline)]
    if config or settings or base_url:
        stored = runs.stored_config(runs.find(client.db, name))
        runs.reconfigure(client.db, name, override(stored, config, settings, base_url))
    _again(client, name, detach, failed=False)


def retry(name: Name, detach: Detach = False) -> None:
    """Generate a run's failed items again, with a clean slate."""
    _again(Client(), name, detach, failed=True)


def cancel(name: Name) -> None:
    """Stop a run; finished trajectories stay, and `tirgen resume` goes on with the rest."""
    db = open_database()
    n = items.cancel(db, runs.find(db, name).id)
    console.print(f"{n} open items cancelled." if n else f"Run {name} has no open items.")


def _again(client: Client, name: str, detach: bool, *, failed: bool) -> None:
    run = runs.find(client.db, name)
    again = ItemState.FAILED if failed else ItemState.CANCELLED
    now = next(client.progress(name))
    if not now.n_open + now.items[again]:
        console.print(f"Run {name} has nothing left to do.")
        return
    chosen = runs.stored_config(run)
    if any(client.stack.is_nano(address.base_url) for address in runs.endpoints(chosen)):
        chosen = override(chosen, base_url=client.stack.start_nano())  # its port may be another
        runs.reconfigure(client.db, name, chosen)
    budgets.require_room(client.db, run.id)
    _announce_sandbox(client, chosen)
    runs.preflight(client.db, chosen)
    n = (items.retry if failed else items.reopen)(client.db, run.id)
    if n:
        console.print(f"{n} {again} items queued again.")
    client.work()
    _watch(client, name, detach)


def _limits(
    client: Client, max_tokens: int | None, max_cost: float | None, deadline: str | None
) -> list[str]:
    """As settings. A deadline that is counted from now is counted by the database's clock."""
    settings = []
    if max_tokens is not None:
        settings.append(f"limits.max_tokens={max_tokens}")
    if max_cost is not None:
        settings.append(f"limits.max_cost={max_cost}")
    if deadline is not None:
        with client.db.session() as session:
            now = session.execute(select(func.clock_timestamp())).scalar_one()
        settings.append(f'limits.deadline="{budgets.deadline(deadline, now).isoformat()}"')
    return settings


def _announce_sandbox(client: Client, config: RunConfig) -> None:
    """Where and behind which wall code will run. Raises SandboxError where it cannot run at all."""
    tool = config.tool
    if not client.stack.has_workers:
        where = f"at {tool.sandbox_url}" if tool.sandbox_url else "on the workers' hosts"
    elif tool.sandbox_url is not None:
        with backend(tool.sandbox_url, tool.minimum_tier) as remote:
            where = f"tier {remote.tier}, at {tool.sandbox_url}"
    else:
        where = f"tier {probe(tool.minimum_tier)}"
    console.print(f"sandbox: {where} (minimum {tool.minimum_tier})", highlight=False, markup=False)


def _watch(client: Client, name: str, detach: bool) -> None:
    """Show progress until the run ends. Ctrl-C stops the run, and leaves it to be resumed."""
    if detach:
        console.print(f"Run {name} goes on in the background: tirgen stats {name}")
        return
    try:
        with Progress(*_columns(console.width), console=console) as progress:
            done = _follow(client, name, progress)
    except KeyboardInterrupt:
        items.cancel(client.db, runs.find(client.db, name).id)
        console.print(f"\nStopped. Go on with: tirgen resume {name}")
        raise typer.Exit(130) from None
    stats(name)
    if done.stop_reason is not None:
        console.print(f"\nStopped by {done.stop_reason}", markup=False, highlight=False)
    if done.state is RunState.CANCELLED:
        raise typer.Exit(1)
    typer.echo(_next_steps(name))  # not wrapped: to be pasted


def _columns(width: int) -> list[ProgressColumn]:
    """What fits a terminal of that width, where only the facts are wrapped."""
    more: list[ProgressColumn] = [BarColumn(bar_width=24), TimeElapsedColumn()]
    return [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *(more if width >= 120 else []),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=False)),
    ]


def _follow(client: Client, name: str, progress: Progress) -> Funnel:
    task = progress.add_task(name, total=None, facts="")
    started, first = time.monotonic(), None
    config = runs.find(client.db, name).config
    for now in client.progress(name):
        with client.db.session() as session:
            so_far = budgets.spent(config, usage(session, now.run_id), now)
        closed = now.n_items - now.n_open
        first = closed if first is None else first
        rate = (closed - first) / (time.monotonic() - started)
        facts = _facts(now, closed, rate, so_far)
        progress.update(task, completed=closed, total=now.n_items, facts=facts)
    return now


def _facts(now: Funnel, closed: int, rate: float, so_far: budgets.Spent) -> str:
    vetted, failed = now.items[ItemState.VETTED], now.items[ItemState.FAILED]
    share = vetted / closed if closed else 0.0
    words = budgets.brief(so_far)
    return f"{rate:.1f}/s  vetted {share:.0%}  failed {failed}  {words}"


def _next_steps(name: str) -> str:
    """Lines to paste, with the program as it was called."""
    program = sys.argv[0] if sys.argv[0].endswith("tirgen") else "python -m tirgen"
    run = f'run == "{name}"'
    queries = (
        f"'{run} and vetted' --columns id,subject,n_calls,answer",
        f"'{run} and n_calls >= 2' --order -n_tokens --columns id,subject,n_calls,n_tokens,answer",
        f"'{run} and not vetted' --columns id,subject,reject_check,answer,reference",
    )
    lines = [f"  {program} query {query}" for query in queries]
    return "\n".join(["\nLook closer:", *lines, f"  {program} show ID"])
