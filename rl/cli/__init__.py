"""`tirgen-rl`: train, evaluate, launch. `main` turns errors into messages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape

from rl.cli import evaluate, jobs, train
from shared.errors import TirgenError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train a policy that reasons with a Python tool, on snapshots of `tirgen`'s database.",
)
PANELS: dict[str, list[Callable[..., None]]] = {
    "Train": [train.sft, train.train],
    "Evaluate": [evaluate.compare],
    "Jobs": [jobs.launch, jobs.worker],
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("eval", rich_help_panel="Evaluate")(evaluate.evaluate)
app.add_typer(evaluate.app, name="analyze", rich_help_panel="Evaluate")
app.add_typer(jobs.app, name="jobs", rich_help_panel="Jobs")


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except TirgenError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
