"""runs: which there are; runs delete."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shared.store import ItemState
from shared.store.queries import Funnel, funnels
from shared.store.retention import delete_run, extent
from shared.terminal import Format, age, console, json_text, share, table
from tirgen.cli.common import open_database

app = typer.Typer(invoke_without_command=True, no_args_is_help=False)


@app.callback()
def runs(context: typer.Context, format: Annotated[Format, typer.Option()] = Format.TABLE) -> None:
    """List the runs, newest first; `tirgen runs delete RUN` deletes one."""
    if context.invoked_subcommand is not None:
        return
    with open_database().session() as session:
        found = funnels(session)
    if format is Format.JSON:
        typer.echo(json_text([_run_json(one) for one in found], indent=2))
    elif found:
        names = ("run", "state", "done", "vetted", "rejected", "failed", "yield", "age")
        console.print(table(names, map(_run_row, found)))
    else:
        console.print("No runs yet: tirgen generate nano --limit 10", style="dim")


@app.command()
def delete(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a run with all that hangs on it; refused while a snapshot refers to it."""
    db = open_database()
    found = extent(db, run)
    told = ", ".join(f"{n} {what}" for what, n in found.items())
    if not yes:
        typer.confirm(f"Delete {run!r} with {told}? There is no way back", abort=True)
    delete_run(db, run)
    console.print(f"deleted: {run} with {told}", markup=False, highlight=False)


def _run_row(run: Funnel) -> tuple[Any, ...]:
    items = run.items
    ended = (items[ItemState.VETTED], items[ItemState.REJECTED], items[ItemState.FAILED])
    done = f"{run.n_items - run.n_open}/{run.n_items}"
    rate = share(items[ItemState.VETTED], sum(ended))
    return (run.name, run.state.value, done, *ended, rate, age(run.created_at))


def _run_json(run: Funnel) -> dict[str, Any]:
    ended = sum(run.items[s] for s in (ItemState.VETTED, ItemState.REJECTED, ItemState.FAILED))
    return {
        "run": run.name,
        "kind": run.kind,
        "state": run.state,
        "created_at": run.created_at,
        "finished_at": run.finished_at,
        "n_items": run.n_items,
        "n_open": run.n_open,
        "items": dict(run.items),
        "rejected": dict(run.rejected),
        "failed": dict(run.failed),
        "yield": run.items[ItemState.VETTED] / ended if ended else None,
        "reconciles": run.reconciles,
    }
