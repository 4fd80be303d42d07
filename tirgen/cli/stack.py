"""up, down, status, doctor, worker: the stack and what each part needs."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import takewhile
from textwrap import indent
from typing import Annotated

import typer
from rich.table import Table

from shared.endpoints import Endpoint, EndpointConfig
from shared.errors import DatabaseError, SandboxError, TirgenError
from shared.sandbox import Sandbox
from shared.sandbox.diagnose import NEEDS, diagnose
from shared.store import migrate
from shared.store.database import Database, resolve_url
from shared.terminal import Format, console
from shared.terminal import table as facts_table
from shared.work.celery_app import check_broker, make_app, prepare_broker
from shared.work.slices import GRACE_SECONDS
from tirgen.cli.common import open_database
from tirgen.config import Tool
from tirgen.live import Server, servers
from tirgen.stack import Stack


def up() -> None:
    """Start database, policy and worker, and bring the database's schema up to date."""
    stack = Stack()
    if not stack.database_url:
        stack.postgres.start()
    open_database().close()
    stack.up()
    _print_status(stack)


def down() -> None:
    """Stop what `up` started. A worker first finishes or gives back what it is working on."""
    Stack().down()


def status(format: Annotated[Format, typer.Option()] = Format.TABLE) -> None:
    """Which parts run, and where; how the workers see the servers of the models."""
    stack = Stack()
    if format is Format.TABLE:
        _print_status(stack)
        return
    rows: list[dict[str, object]] = [
        {"part": p.name, "running": p.running, "detail": p.detail} for p in stack.status()
    ]
    for one in _servers(stack):
        facts = {"running": one.breaker == "closed", "detail": one.base_url}
        rows.append({"part": "endpoint", **facts, **asdict(one)})
    typer.echo(json.dumps(rows))


def _servers(stack: Stack) -> list[Server]:
    """None where the database is down, or not yet of this version."""
    if not stack.database_url and not stack.postgres.status().running:
        return []
    db = open_database(migrate=False)
    try:
        return servers(db)
    except DatabaseError:
        return []
    finally:
        db.close()


def _print_status(stack: Stack) -> None:
    table = Table("part", "state", "where", box=None)
    for part in stack.status():
        table.add_row(part.name, "[green]up" if part.running else "[yellow]down", part.detail)
    console.print(table)
    found = _servers(stack)
    if found:
        names = ("endpoint", "roles", "run", "worker", "in flight", "breaker", "req/s", "latency")
        rows = [
            (
                one.base_url, one.roles, one.run, one.owner,
                f"{one.in_flight} of {one.max_in_flight}", one.breaker,
                f"{one.requests_per_second:.1f}", f"{one.latency:.2f} s",
            )
            for one in found
        ]  # fmt: skip
        console.print(facts_table(names, rows))


def worker(
    processes: Annotated[int, typer.Option(help="Celery child processes.", min=1)] = 1,
    grace: Annotated[
        float, typer.Option(help="Seconds that samples in flight may take after SIGTERM.", min=0)
    ] = GRACE_SECONDS,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="One JSON object a line, with run and item.")
    ] = False,
    events: Annotated[
        bool, typer.Option("--events", help="Send Celery's events, for Flower.")
    ] = False,
) -> None:
    """A Celery worker of the `generate` queue with the right settings; SIGTERM drains it."""
    from tirgen.worker import serve  # brings LangGraph, a second that no other command needs

    serve(open_database(), processes, grace=grace, json_logs=json_logs, events=events)


def doctor() -> None:
    """Check every part, and say what to do about those that do not work."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", lambda: sys.version.split()[0]),
        ("database", _database),
        ("broker", _broker),
        ("policy", _policy),
        ("sandbox", _sandbox),
        ("gpu", _gpu),
    ]
    failed = False
    for name, check in checks:
        try:
            said = check()
            console.print(f"[green]ok  [/] {name:9} ", end="")
            console.print(said, markup=False, highlight=False, soft_wrap=True)
        except TirgenError as error:
            failed = True
            console.print(f"[red]fail[/] {name:9} ", end="")
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _database() -> str:
    db = Database(resolve_url())
    try:
        return f"{db.location}, schema {migrate.current(db) or 'empty: tirgen db upgrade'}"
    finally:
        db.close()


def _broker() -> str:
    db = open_database()
    app = make_app(db)
    prepare_broker(db, app)
    check_broker(app)
    if app.conf.broker_url.startswith("pgmq"):
        return "pgmq, on the database"
    return str(app.connection_for_write().as_uri())  # without the password


def _policy() -> str:
    stack = Stack()
    url = stack.start_nano()

    async def ask() -> str:
        async with Endpoint(EndpointConfig(base_url=url, model="nano")) as endpoint:
            return ", ".join(await endpoint.check())

    if stack.base_url:
        return f"{url} (TIRGEN_BASE_URL; `tirgen generate` checks the models)"
    return f"{url}: {asyncio.run(ask())}"


def _sandbox() -> str:
    """The tier that holds, and for each one above it why it does not and what would change that."""
    minimum = Tool().minimum_tier
    findings = diagnose()
    missing = list(takewhile(lambda finding: not finding.holds, findings))
    explained = [
        f"tier {f.tier} ({NEEDS[f.tier]}) does not hold: {f.reason}\n"
        + "\n".join(f"  to do: {remedy}" for remedy in f.remedies)
        for f in missing
    ]
    if len(missing) == len(findings) or findings[len(missing)].tier > minimum:
        raise SandboxError(
            f"No tier of {minimum} (the default of tool.minimum_tier) or stronger holds here:\n"
            + "\n".join(explained)
        )
    with Sandbox(zygotes=1, minimum_tier=minimum) as sandbox:
        result = sandbox.run("print(6 * 7)")
    summary = (
        f"tier {result.tier} ({NEEDS[result.tier]}), minimum {minimum}, "
        f"a run took {result.duration * 1000:.0f} ms"
    )
    return indent("\n".join([summary, *explained]), " " * 15).lstrip()


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none found (only vLLM and the trainer want one)"
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
