"""Logs for machines: every line is one JSON object that says what it is about."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys

from shared.telemetry import JsonFormatter, about

PROGRAM = """
import logging
from shared.telemetry import about, log_json
log_json()
with about(run="first", item=7):
    logging.getLogger("shared.work").info("ours")
    logging.getLogger("somebody").info("theirs: not shown")
    logging.getLogger("somebody").warning("a\\nline \\x1b[31m")
"""


def test_lines_carry_the_ids_of_their_task_and_of_no_other() -> None:
    output = io.StringIO()
    log = logging.Logger("test")
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)

    async def work(item: int) -> None:
        with about(item=item):
            await asyncio.sleep(0)
            log.warning("item %d", item, extra={"seconds": 0.5, "odd": object()})

    async def main() -> None:
        with about(run="r"):
            await asyncio.gather(*(work(i) for i in range(5)))
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("after")

    asyncio.run(main())
    *lines, last = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [(one["run"], one["item"], one["message"]) for one in lines] == [
        ("r", i, f"item {i}") for i in range(5)
    ]
    assert {one["seconds"] for one in lines} == {0.5}
    assert "run" not in last
    assert "ValueError: why" in last["error"]


def test_a_process_that_logs_json_logs_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(one["level"], one["message"], one["item"]) for one in lines] == [
        ("INFO", "ours", 7), ("WARNING", "a\nline \x1b[31m", 7),
    ]  # fmt: skip
    assert "\x1b" not in done.stderr
