"""A TIRGEN_HOME of a test's own, and `tirgen` on it as a person types it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import psycopg

from shared.store.embedded import EmbeddedPostgres
from tests.processes import kill
from tirgen.cli import main

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tirgen"]
SGR = re.compile(r"\x1b\[[0-9;]*m")


class Said:
    """What a command left behind: exit code, and both streams in one text."""

    def __init__(self, code: int, text: str) -> None:
        self.code, self.text = code, SGR.sub("", text)

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.text}"


class Home:
    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder, self.extra = folder, environ
        self.postgres = EmbeddedPostgres(folder)

    @property
    def environ(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TIRGEN_", "OPENAI_"))}
        ours = {"TIRGEN_HOME": str(self.folder), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        return kept | ours | self.extra

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        given = {**streams, "stderr": subprocess.STDOUT, "env": self.environ, **options}
        return subprocess.Popen([*COMMAND, *arguments], **given)

    def tirgen(self, *arguments: str, timeout: float = 55.0) -> Said:
        """In a process of its own."""
        with self.start(*arguments) as process:
            try:
                text, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Said(process.returncode, text)

    def quick(self, *arguments: str) -> Said:
        """In this process, which spares the seconds of starting another: the same `main`."""
        output = io.StringIO()
        code = 0
        with (
            mock.patch.dict(os.environ, self.environ, clear=True),
            mock.patch.object(sys, "argv", ["tirgen", *arguments]),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        return Said(code, output.getvalue())

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.postgres.conninfo, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def count(self, run: str, condition: str = "true") -> int:
        """Work items of a run."""
        query = f"SELECT count(*) FROM work_items WHERE ({condition}) \
            AND run_id = (SELECT id FROM runs WHERE name = %s)"
        return int(self.sql(query, run)[0][0])

    def finished(self, run: str) -> dict[int, tuple[int, str]]:
        """item -> (trajectory's id, content hash); fails if an item has two trajectories."""
        rows = self.sql(
            "SELECT t.item_id, t.id, content_hash FROM trajectories t \
                JOIN runs r ON r.id = t.run_id WHERE r.name = %s",
            run,
        )
        found = {item: (id, digest) for item, id, digest in rows}
        assert len(found) == len(rows)
        return found

    def state(self, run: str) -> str | None:
        rows = self.sql("SELECT state FROM runs WHERE name = %s", run)
        return rows[0][0] if rows else None

    def wait_done(self, run: str, seconds: float = 45.0) -> None:
        until(lambda: self.state(run) == "done", f"{run} is done", seconds)

    def assert_reconciles(self, run: str, n: int) -> None:
        """Every item is at one end, with a trajectory exactly where it should have one."""
        assert self.state(run) == "done"
        assert self.count(run) == n
        assert self.count(run, "state IN ('vetted', 'rejected', 'failed')") == n
        assert self.count(run, "(state = 'rejected') <> (reject_check IS NOT NULL)") == 0
        assert self.count(run, "state = 'failed' AND error_class IS NULL") == 0
        made = self.finished(run)
        assert len(made) == self.count(run, "state <> 'failed'")
        ids = tuple(made) or (0,)
        assert self.count(run, f"id IN ({', '.join(map(str, ids))}) AND state = 'failed'") == 0

    def leases_run_out(self) -> None:
        """What half a minute does to leases that nobody extends, without waiting for it."""
        self.sql("UPDATE work_items SET lease_until = now() WHERE state = 'leased'")
        self.sql("UPDATE run_slots SET alive_until = now()")

    def worker(self) -> psutil.Process:
        return psutil.Process(int((self.folder / "worker.pid").read_text()))

    def postmaster(self) -> psutil.Process:
        pid = self.postgres.status().pid
        assert pid is not None
        return psutil.Process(pid)

    def processes(self) -> list[psutil.Process]:
        """Whatever belongs to this home: by its environment, its folder, or a parent that does."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                home = process.environ().get("TIRGEN_HOME")
                if home == str(self.folder) or Path(process.cwd()) == self.postgres.data:
                    for one in (process, *process.children(recursive=True)):
                        found[one.pid] = one
        found.pop(os.getpid(), None)
        return list(found.values())


def alive(process: psutil.Process) -> bool:
    """A zombie is not: the init process of a container may leave it forever."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], bool], what: str, seconds: float = 45.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.05)


@contextmanager
def opened(folder: Path, **environ: str) -> Iterator[Home]:
    """A home that is taken down at the end, whatever state it is in."""
    home = Home(folder, **environ)
    try:
        yield home
    finally:
        said = home.tirgen("down")
        left = home.processes()
        kill(*left)
        assert said.code == 0, said
        assert not left, "`tirgen down` left processes"
