"""`tirgen-rl`: train, evaluate, launch. `main` turns errors into messages."""

from __future__ import annotations

from collections.abc import Callable

import typer

from rl.cli import evaluate, jobs, train
from shared import terminal

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
    terminal.run(app)
