"""The whole service on nano: `tirgen generate nano --limit 320` in a home of its own.

Prints JSON lines: vetted share, finished items and completion tokens per second of the run, and the
wall time of the command from nothing (embedded PostgreSQL created, policy and worker started).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

LIMIT = 320


def tirgen(home: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "tirgen", *arguments]
    environment = {**os.environ, "TIRGEN_HOME": home}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def report(metric: str, value: float, unit: str) -> None:
    line: dict[str, Any] = {"bench": "generate", "metric": metric, "value": round(value, 3)}
    print(json.dumps({**line, "unit": unit, "peer": None, "ratio": None}))


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        try:
            for metric in ("wall time, from nothing", "wall time, stack up"):
                started = time.monotonic()
                run = metric.replace(" ", "-")
                tirgen(home, "generate", "nano", "--limit", str(LIMIT), "--run", run)
                report(metric, time.monotonic() - started, "s")
            stats = json.loads(tirgen(home, "stats", run, "--format", "json"))
        finally:
            tirgen(home, "down")
    report("vetted share", stats["yield"], "share")
    report("finished items", stats["finished_per_minute"] / 60, "1/s")
    tokens = sum(role["completion_tokens"] for role in stats["usage"])
    report("completion tokens", tokens / stats["elapsed"], "1/s")


if __name__ == "__main__":
    main()
