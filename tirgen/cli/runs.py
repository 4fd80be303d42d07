"""runs: which there are; runs delete."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from sqlalchemy import select

from shared.store import ItemState
from shared.store.models import RunRow, RunState
from shared.store.queries import Funnel, funnels, usages
from shared.store.retention import delete_run, extent
from shared.terminal import Format, age, console, json_text, share, table
from tirgen import budgets
from tirgen.cli.common import open_database

app = typer.Typer(invoke_without_command=True, no_args_is_help=False)


@app.callback()
def runs(context: typer.Context, format: Annotated[Format, typer.Option()] = Format.TABLE) -> None:
    """List the runs, newest first; `tirgen runs delete RUN` deletes one."""
    if context.invoked_subcommand is not None:
        return
    with open_database().session() as session:
        found = funnels(session)
        used = usages(session, [one.run_id for one in found])
        ids = [one.run_id for one in found]
        rows = session.execute(select(RunRow.id, RunRow.config).where(RunRow.id.in_(ids)))
        configs = {row.id: row.config for row in rows}
    cost = {n.run_id: budgets.spent(configs[n.run_id], used[n.run_id], n) for n in found}
    if format is Format.JSON:
        shown = [_run_json(one) | _cost_json(cost[one.run_id]) for one in found]
        typer.echo(json_text(shown, indent=2))
    elif found:
        names = ("run", "state", "done", "vetted", "rejected", "failed", "yield", "age", "used")
        lines = [(*_run_row(one), budgets.brief(cost[one.run_id])) for one in found]
        console.print(table(names, lines))
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
    state = run.state.value
    if run.stop_reason is not None and run.state is not RunState.DONE:
        state += f" ({run.stop_reason.partition(':')[0]})"
    return (run.name, state, done, *ended, rate, age(run.created_at))


def _run_json(run: Funnel) -> dict[str, Any]:
    ended = sum(run.items[s] for s in (ItemState.VETTED, ItemState.REJECTED, ItemState.FAILED))
    return {
        "run": run.name,
        "kind": run.kind,
        "state": run.state,
        "created_at": run.created_at,
        "finished_at": run.finished_at,
        "stop_reason": run.stop_reason,
        "n_items": run.n_items,
        "n_open": run.n_open,
        "items": dict(run.items),
        "rejected": dict(run.rejected),
        "failed": dict(run.failed),
        "yield": run.items[ItemState.VETTED] / ended if ended else None,
        "reconciles": run.reconciles,
    }


def _cost_json(so_far: budgets.Spent) -> dict[str, Any]:
    """`projected`: tokens and cost of the whole run; null while nothing is finished."""
    whole = so_far.projected()
    projected = None if whole is None else {"tokens": round(whole[0]), "cost": whole[1]}
    return {"tokens": so_far.tokens, "cost": so_far.cost, "projected": projected}
