"""The command line: one line to generate, one to look. `main` turns errors into messages."""

from __future__ import annotations

from collections.abc import Callable

import typer

from shared import terminal
from tirgen.cli import (
    curate,
    db,
    generate,
    metrics,
    read,
    runs,
    sandbox,
    snapshot,
    stack,
    verify,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn math problems into vetted, tool-integrated reasoning trajectories in PostgreSQL.",
)

PANELS: dict[str, list[Callable[..., None]]] = {
    "Generate": [generate.generate, generate.resume, generate.retry, generate.cancel],
    "Look": [read.query, read.show, read.stats],
    "Curate": [curate.curate, verify.verify, verify.consensus],
    "The stack": [stack.up, stack.down, stack.status, stack.doctor, stack.worker, metrics.metrics],
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(runs.app, name="runs", rich_help_panel="Look")
app.add_typer(curate.filters_app, name="filters", rich_help_panel="Curate")
app.add_typer(snapshot.app, name="snapshot", rich_help_panel="Curate")
app.add_typer(db.app, name="db", rich_help_panel="The stack")
app.add_typer(sandbox.app, name="sandbox", rich_help_panel="The stack")


def main() -> None:
    terminal.run(app)
