"""The embedded PostgreSQL keeps its contract under every kind of crash."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from shared.errors import ConfigError, DatabaseError
from shared.store import embedded
from shared.store.database import resolve_url
from shared.store.embedded import EmbeddedPostgres

START = (
    "import sys, pathlib; from shared.store.embedded import EmbeddedPostgres;"
    "server = EmbeddedPostgres(pathlib.Path(sys.argv[1])); server.start();"
    "print(server.status().pid, flush=True); sys.stdin.read()"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path / "home")
    yield server
    server.stop()


def query(server: EmbeddedPostgres, text: str) -> object:
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        cursor = connection.execute(text.encode())
        return cursor.fetchone() if cursor.description else None


def starter(home: Path) -> subprocess.Popen[str]:
    """A process that starts the server, says its pid, and then waits for the end of its input."""
    return subprocess.Popen(
        [sys.executable, "-c", START, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said_pid(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_processes_that_start_at_once_share_one_server(tmp_path: Path) -> None:
    processes = [starter(tmp_path) for _ in range(4)]
    pids = {said_pid(process) for process in processes}
    for process in processes:
        process.communicate("")
    server = EmbeddedPostgres(tmp_path)
    assert pids == {server.status().pid}
    server.stop()
    assert not server.status().running


def test_server_outlives_a_killed_starter(server: EmbeddedPostgres) -> None:
    process = starter(server.home)
    pid = said_pid(process)
    process.kill()
    process.communicate()
    assert server.status().pid == pid
    assert query(server, "SELECT 1") == (1,)


def test_committed_rows_survive_kill_of_the_postmaster(server: EmbeddedPostgres) -> None:
    """`start` right after the kill, when the pid may still look alive, brings a new server."""
    server.start()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    killed = server.status().pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    server.start()
    assert server.status().pid not in (None, killed)
    assert query(server, "SELECT answer FROM kept") == (42,)


def test_pid_file_of_a_zombie_does_not_stop_the_start(server: EmbeddedPostgres) -> None:
    """PostgreSQL by itself refuses here (the control), because a zombie's pid exists."""
    server.start()
    server.stop()
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    facts = f"{zombie.pid}\n{server.data}\n0\n5432\n{server.socket_dir}\n\n0 0\nready\n"
    (server.data / "postmaster.pid").write_text(facts)
    assert not server.status().running
    with pytest.raises(DatabaseError, match="lock file"):
        server._run(
            embedded._Account.choose(), "pg_ctl", "start", "-w", "-D", str(server.data), "-l",
            str(server.log),
        )  # fmt: skip
    server.start()
    zombie.wait()
    assert query(server, "SELECT 1") == (1,)


def test_interrupted_initdb_is_begun_anew(server: EmbeddedPostgres) -> None:
    rubbish = server.home / "postgres.new" / "base"
    rubbish.mkdir(parents=True)
    server.start()
    assert query(server, "SELECT 1") == (1,)
    assert not rubbish.exists()


def test_no_permission_of_an_existing_folder_changes(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    folders = [private, *private.parents]
    before = [folder.stat().st_mode for folder in folders]
    server = EmbeddedPostgres(private / "home")
    server.start()
    server.stop()
    assert [folder.stat().st_mode for folder in folders] == before


def test_only_the_owner_can_reach_data_and_socket(server: EmbeddedPostgres) -> None:
    server.start()
    for folder in (server.data, server.socket_dir):
        assert folder.stat().st_mode & 0o077 == 0
    assert query(server, "SHOW listen_addresses") == ("",)
    assert query(server, "SHOW fsync") == ("on",)


def test_home_longer_than_a_socket_path_works(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / ("long" * 30))
    server.start()
    assert query(server, "SELECT 1") == (1,)
    server.stop()
    server.socket_dir.chmod(0o755)
    with pytest.raises(ConfigError, match="open to others"):
        server.start()
    shutil.rmtree(server.socket_dir)


def test_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    with pytest.raises(ConfigError) as caught:
        resolve_url({"TIRGEN_HOME": str(home)})
    assert str(home) in str(caught.value)
    assert "TIRGEN_HOME" in str(caught.value.remedy)


def test_failed_start_shows_the_log(server: EmbeddedPostgres) -> None:
    server.start()
    server.stop()
    with (server.data / "postgresql.conf").open("a") as conf:
        conf.write("\nno_such_setting = 1\n")
    with pytest.raises(DatabaseError, match="no_such_setting"):
        server.start()


def test_root_without_user_namespaces_runs_as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of consequence for root only; for everybody else the same start must work all the same."""
    monkeypatch.setattr(embedded, "_succeeds", lambda command: False)
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    server = EmbeddedPostgres(folder / "home")
    try:
        server.start()
        assert query(server, "SELECT 1") == (1,)
        owner = server.data.stat().st_uid
        assert owner != 0
    finally:
        server.stop()
        shutil.rmtree(folder)


def test_stop_without_a_server_does_nothing(server: EmbeddedPostgres) -> None:
    server.stop()
    assert not server.home.exists()
