"""Commands that look and change nothing: query, show, stats, runs; and the schema's: db."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from shared.store import ItemState, migrate
from shared.store.queries import Funnel, funnels
from tirgen import query as queries
from tirgen.cli import report
from tirgen.cli import show as showing
from tirgen.cli.common import Format, console, open_database
from tirgen.cli.export import WRITERS
from tirgen.cli.render import age, json_text, share, table
from tirgen.fields import FIELDS
from tirgen.stats import failures as failed_items
from tirgen.stats import gather

TABLE_ROWS = 20  # that a table shows unless told otherwise


class QueryFormat(StrEnum):
    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


def query(
    expression: Annotated[
        str, typer.Argument(metavar="[EXPR]", help="What to select; everything if left out.")
    ] = "",
    columns: Annotated[str, typer.Option(help="Fields to show, separated by commas.")] = ",".join(
        queries.DEFAULT_COLUMNS
    ),
    order: Annotated[
        str, typer.Option(help="Fields to sort by; a minus for descending: -n_calls,id.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Rows; {TABLE_ROWS} for a table, else all.")
    ] = None,
    format: Annotated[QueryFormat, typer.Option(help="Into a file with > FILE.")] = (
        QueryFormat.TABLE
    ),
    fields: Annotated[bool, typer.Option("--fields", help="List every field and stop.")] = False,
) -> None:
    """Find trajectories: fields, literals, == != < <= > >= in is, and, or, not.

    tirgen query 'vetted and n_calls >= 2 and subject != "Algebra"' --order -n_calls
    """
    if fields:
        _list_fields(format)
        return
    names = _names(columns)
    is_table = format is QueryFormat.TABLE
    wanted = queries.Query(
        expression, names, _names(order), limit or (TABLE_ROWS if is_table else None)
    )
    queries.statement(wanted)  # a mistake in it is found before the database is even started
    db = open_database()
    with queries.run(db, wanted) as rows:
        if not is_table:
            WRITERS[format](names, rows, sys.stdout)
            return
        listed = list(rows)
    if not listed:
        console.print("No trajectory is like that.", style="dim")
        return
    console.print(table(names, listed))
    more = queries.count(db, expression) - len(listed) if len(listed) == wanted.limit else 0
    if more > 0:
        hint = f"{more} more: --limit N shows more, --format jsonl all of them."
        console.print(hint, style="dim", highlight=False)


def show(
    id: Annotated[int, typer.Argument(help="The trajectory's id, as `tirgen query` lists it.")],
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """Show one trajectory: its steps, code, observations, verdicts."""
    shown = showing.load(open_database(), id)
    if format is Format.JSON:
        typer.echo(json_text(shown.to_json(), indent=2))
    else:
        for part in showing.page(shown):
            console.print(part, highlight=False)


def stats(
    run: Annotated[str, typer.Argument(help="The run's name, see `tirgen runs`.")],
    plot: Annotated[Path | None, typer.Option(help="Draw it: FILE.png, .svg, .pdf.")] = None,
    failures: Annotated[bool, typer.Option("--failures", help="List every failed item.")] = False,
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """Show what became of a run: funnel, rates, cost."""
    if failures:
        _list_failures(run, format)
        return
    found = gather(open_database(), run)
    if format is Format.JSON:
        typer.echo(json_text(found.to_json(), indent=2))
    else:
        for part in report.page(found):
            console.print(part, highlight=False)
    if plot is not None:
        from tirgen.plot import plot as draw

        draw(found, plot)


def runs(format: Annotated[Format, typer.Option()] = Format.TABLE) -> None:
    """List the runs, newest first."""
    with open_database().session() as session:
        found = funnels(session)
    if format is Format.JSON:
        typer.echo(json_text([_run_json(one) for one in found], indent=2))
    elif found:
        names = ("run", "state", "done", "vetted", "rejected", "failed", "yield", "age")
        console.print(table(names, map(_run_row, found)))
    else:
        console.print("No runs yet: tirgen generate nano --limit 10", style="dim")


db_app = typer.Typer(no_args_is_help=True, help="The database's schema.")


@db_app.command()
def upgrade() -> None:
    """Bring the schema up to this version of the program."""
    db = open_database(migrate=False)
    before = migrate.current(db)
    migrate.upgrade(db)
    console.print(_schema(before, migrate.current(db)), highlight=False)


@db_app.command()
def address() -> None:
    """Where the database is, as psql takes it: psql "$(tirgen db address)". May hold a password."""
    typer.echo(open_database(migrate=False).conninfo)


@db_app.command()
def current() -> None:
    """Show the schema's version; exit code 1 unless it is the one that this program needs."""
    db = open_database(migrate=False)
    found, head = migrate.current(db), migrate.head()
    console.print(f"{found or 'no schema'} in {db.location}", markup=False, highlight=False)
    if found != head:
        console.print(f"this program needs {head}: tirgen db upgrade", style="red", highlight=False)
        raise typer.Exit(1)


def _schema(before: str | None, after: str | None) -> str:
    return f"{after}, as before" if before == after else f"{before or 'no schema'} -> {after}"


def _list_failures(run: str, format: Format) -> None:
    found = failed_items(open_database(), run)
    if format is Format.JSON:
        typer.echo(json_text([asdict(one) for one in found], indent=2))
    elif found:
        rows = [
            (f.error_class, f.item, f.problem_id, f.attempts, report.brief(f.text)) for f in found
        ]
        console.print(table(("error", "item", "problem", "attempts", "message"), rows))
    else:
        console.print(f"No item of {run} has failed.", style="dim")


def _names(listed: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))


def _list_fields(format: QueryFormat) -> None:
    rows = [(f.name, f.kind.value, f.description, f.values) for f in FIELDS.values()]
    if format is QueryFormat.TABLE:
        described = (
            (name, kind, Text(f"{what}{': ' if values else ''}{', '.join(values)}"))
            for name, kind, what, values in rows
        )
        console.print(table(("field", "type", "what it is"), described))
        typer.echo("\nExamples:\n  " + "\n  ".join(queries.EXAMPLES))
    else:
        names = ("field", "type", "description", "values")
        typer.echo(json_text([dict(zip(names, row, strict=True)) for row in rows], indent=2))


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
