"""Commands that look and change nothing: query, show, stats."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from shared.errors import ConfigError
from shared.terminal import Format, console, json_text, table
from tirgen import query as queries
from tirgen.cli import report
from tirgen.cli import show as showing
from tirgen.cli.common import open_database
from tirgen.cli.export import WRITERS
from tirgen.fields import FIELDS, FUNCTIONS, STEP_FIELDS
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
    columns: Annotated[
        str,
        typer.Option(help="Fields to show, separated by commas; with --group-by, to average."),
    ] = "",
    order: Annotated[
        str, typer.Option(help="Fields to sort by; a minus for descending: -n_calls,id.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Rows; {TABLE_ROWS} for a table, else all.")
    ] = None,
    after: Annotated[
        int | None, typer.Option(help="Next page: the id of the last trajectory of this one.")
    ] = None,
    group_by: Annotated[
        str, typer.Option(help="Count by these fields, with the rate of vetted ones.")
    ] = "",
    count: Annotated[bool, typer.Option("--count", help="Only count.")] = False,
    format: Annotated[QueryFormat, typer.Option(help="Into a file with > FILE.")] = (
        QueryFormat.TABLE
    ),
    fields: Annotated[bool, typer.Option("--fields", help="List every field and stop.")] = False,
) -> None:
    """Find trajectories: fields, literals, == != < <= > >= in is, and, or, not, any_step(...).

    tirgen query 'vetted and n_calls >= 2 and subject != "Algebra"' --order -n_calls
    """
    if fields:
        _list_fields(format)
        return
    is_table = format is QueryFormat.TABLE
    shown = limit or (TABLE_ROWS if is_table else None)
    if group_by or count:
        if order or after is not None:
            what = "groups have an order of their own: the largest first"
            raise ConfigError(what, where="--group-by", remedy="leave out --order and --after")
        groups = queries.Groups(expression, _names(group_by), _names(columns), shown)
        queries.check(groups)  # a mistake in it is found before the database is even started
        with queries.grouped(open_database(), groups) as rows:
            if is_table:
                _print(groups.columns, list(rows))
            else:
                WRITERS[format](groups.columns, rows, sys.stdout)
        return
    names = _names(columns) or queries.DEFAULT_COLUMNS
    # One row more than a table shows tells whether there are more: counting all could take long.
    fetched = shown + 1 if is_table and shown is not None else shown
    wanted = queries.Query(expression, names, _names(order), fetched, after)
    queries.check(wanted)
    with queries.run(open_database(), wanted) as rows:
        if not is_table:
            WRITERS[format](queries.kinds(names), rows, sys.stdout)
            return
        listed = list(rows)
    _print(names, listed[:shown])
    if len(listed) == fetched:
        last = dict(zip(names, listed[-2], strict=True)).get("id")
        page = "" if last is None else f", --after {last} for the next page"
        hint = f"There are more: --limit N{page}, --count, --format jsonl for all of them."
        console.print(hint, style="dim", highlight=False)


def _print(columns: Iterable[str], rows: Sequence[tuple[Any, ...]]) -> None:
    if rows:
        console.print(table(list(columns), rows))
    else:
        console.print("No trajectory is like that.", style="dim")


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
    scopes = {"trajectory": FIELDS, "step": STEP_FIELDS}
    if format is not QueryFormat.TABLE:
        listed = [
            {
                "field": f.name, "of": scope, "type": f.kind, "indexed": f.indexed,
                "description": f.description, "values": f.values,
            }
            for scope, fields in scopes.items()
            for f in fields.values()
        ]  # fmt: skip
        listed += [{"function": f, "description": what} for f, what in FUNCTIONS.items()]
        typer.echo(json_text(listed, indent=2))
        return
    for scope, fields in scopes.items():
        rows = [
            (
                f.name, f.kind.value, "indexed" if f.indexed else "slow",
                Text(f"{f.description}{': ' if f.values else ''}{', '.join(f.values)}"),
            )
            for f in fields.values()
        ]  # fmt: skip
        console.print(table((f"field of a {scope}", "type", "speed", "what it is"), rows))
        console.print()
    functions = [(name, Text(what)) for name, what in FUNCTIONS.items()]
    console.print(table(("function", "what it says"), functions))
    slow = "slow: rare rows are found by reading the table; fine beside an indexed condition."
    typer.echo(f"\n{slow}\n\nExamples:\n  " + "\n  ".join(queries.EXAMPLES))
