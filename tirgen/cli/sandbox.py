"""tirgen sandbox: serve it to others' trainers, try it, check a backend."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import InputError
from shared.optional import require
from shared.sandbox import Outcome, Sandbox, Tier
from shared.sandbox.backend import backend
from shared.sandbox.remote import TOKEN
from shared.terminal import Format, console, json_text, visible

app = typer.Typer(no_args_is_help=True, help="The Python tool by itself.")

Url = Annotated[
    str | None,
    typer.Option(help="A server of SandboxFusion's /run_code instead of this host's sandbox."),
]
Minimum = Annotated[Tier, typer.Option(help="Refuse a weaker tier than this.")]


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN, help="What clients must send.", show_envvar=True)
    ] = None,
    zygotes: Annotated[int | None, typer.Option(min=1, help="Runs at once; the cores.")] = None,
    memory: Annotated[int, typer.Option(min=16, help="MiB that one run may use.")] = 1024,
    minimum_tier: Minimum = Tier.B,
) -> None:
    """Serve /run_code as SandboxFusion does, for verl and other trainers; SIGTERM ends it."""
    require("uvicorn", need="tirgen sandbox serve", install="tirgen[nano]")
    require("fastapi", need="tirgen sandbox serve", install="tirgen[nano]")
    from shared.sandbox.serve import ServedLimits
    from shared.sandbox.serve import serve as listen

    limits = ServedLimits(memory=memory << 20)
    with Sandbox(zygotes=zygotes, minimum_tier=minimum_tier, limits=limits) as sandbox:

        def announce(url: str) -> None:
            typer.echo(f"sandbox: {url}/run_code, tier {sandbox.tier}, {sandbox.zygotes} at once")

        listen(sandbox, host, port, token or None, announce)


@app.command()
def run(
    file: Annotated[str, typer.Argument(help="A Python file, or - for standard input.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    timeout: Annotated[float, typer.Option(min=0.01, max=600, help="CPU seconds.")] = 10.0,
    url: Url = None,
    minimum_tier: Minimum = Tier.B,
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """Run a program in the sandbox; exit code 0 if it succeeded.

    Its output goes to standard output and standard error, what became of it to standard error.
    """
    try:
        code = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the program: {error}", where=file) from error
    with backend(url, minimum_tier) as sandbox:
        result = sandbox.run(code, seed=seed, timeout=timeout)
    if format is Format.JSON:
        typer.echo(json_text(asdict(result)))
    else:
        typer.echo(visible(result.stdout), nl=False)
        typer.echo(visible(result.stderr), nl=False, err=True)
        typer.echo(
            f"[{result.outcome}, tier {result.tier}, {result.duration * 1000:.0f} ms, CPU "
            f"{result.cpu_time * 1000:.0f} ms, {result.peak_memory >> 20} MiB]",
            err=True,
        )
        if result.bytes_cut:
            typer.echo(f"[{result.bytes_cut} bytes of output were cut]", err=True)
    if result.outcome not in (Outcome.OK, Outcome.NO_OUTPUT):
        raise typer.Exit(1)


@app.command()
def check(url: Url = None, minimum_tier: Minimum = Tier.B) -> None:
    """Does a backend keep what a sandbox promises? Prints every claim that it breaks."""
    from shared.sandbox import conformance

    with backend(url, minimum_tier) as sandbox:
        failures = conformance.check(sandbox, conformance.CASES)
        n, tier = len(conformance.CASES), sandbox.tier
    for failure in failures:
        console.print(f"[red]fail[/] {failure.claim}", highlight=False)
        console.print(f"     {visible(failure.what)}", markup=False, highlight=False)
    console.print(f"{n - len(failures)} of {n} claims hold at tier {tier}.")
    if failures:
        raise typer.Exit(1)
