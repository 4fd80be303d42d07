"""metrics: what Prometheus scrapes."""

from __future__ import annotations

from typing import Annotated

import typer

from shared.terminal import console
from tirgen.cli.common import open_database
from tirgen.metrics import EVERY, serve


def metrics(
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from other hosts.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 9464,
    every: Annotated[float, typer.Option(min=0, help="Seconds between two readings.")] = EVERY,
) -> None:
    """Serve Prometheus metrics of all runs and workers, one server per installation."""
    server, thread = serve(open_database(migrate=False), host, port, every)
    console.print(f"http://{host}:{server.server_port}/metrics")
    thread.join()
