"""SIGTERM, Ctrl-C, a closed terminal, a cancelled run: nothing finished is lost or made twice."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shlex
import signal
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.acceptance.home import COMMAND, Home, alive, until
from tests.fake_endpoint import FakeEndpoint, Reply
from tests.scripted import Server, http, speech

N = 40


class Gated:
    """A model that answers as often as it is let, and else makes its callers wait."""

    def __init__(self) -> None:
        self.words = http(Server(speech("SEVEN is the answer: \\boxed{7}")))
        self.permits = threading.Semaphore(0)
        self.waiting = 0
        self.broken = False
        self.server = FakeEndpoint(self.answer)

    def answer(self, path: str, body: Any) -> Reply:
        if path == "/v1/completions":
            self.waiting += 1
            while not self.permits.acquire(timeout=0.1):
                if self.server.closing.is_set():
                    break
            self.waiting -= 1
            if self.broken:
                return Reply(b"<html>out of order</html>")
        return self.words(path, body)

    def let(self, n: int) -> None:
        self.permits.release(n)

    @contextmanager
    def running(
        self, home: Home, run: str, n: int, *options: str
    ) -> Iterator[subprocess.Popen[str]]:
        """`tirgen generate` in the foreground, three samples in flight."""
        file = home.folder / f"{run}.jsonl"
        rows = [{"problem": f"{run}: is {i} seven?", "answer": "7"} for i in range(n)]
        file.write_text("\n".join(map(json.dumps, rows)))
        where = ["--base-url", self.server.base_url, "--model", "fake", "--set", "in_flight=3"]
        command = home.start(
            "generate", str(file), "--run", run, *where, *options, stdout=subprocess.DEVNULL
        )
        try:
            until(lambda: self.waiting > 0, "the model is asked")
            yield command
        finally:
            command.kill()
            command.wait()


@pytest.fixture
def gated() -> Iterator[Gated]:
    gated = Gated()
    with gated.server:
        yield gated


def test_a_detached_run_survives_its_terminal(victim: Home) -> None:
    """The terminal is closed, its session gets SIGHUP, and the run ends all the same."""
    assert victim.quick("down").code == 0  # so that database and worker start in this terminal
    leader, follower = pty.openpty()
    asked = ["generate", "nano", "--limit", "12", "--run", "hangup", "--detach"]

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)

    shell = subprocess.Popen(
        ["sh", "-c", f"{shlex.join([*COMMAND, *asked])}; echo returned $?; exec sleep 600"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=victim.environ,
        preexec_fn=own_terminal,
    )
    os.close(follower)
    said = b""
    while b"returned" not in said:
        said += os.read(leader, 4096)
    assert b"returned 0" in said
    assert b"goes on in the background" in said
    assert len(victim.finished("hangup")) < 12, "it returned before the run was over"
    os.close(leader)
    assert shell.wait(10) == -signal.SIGHUP
    victim.wait_done("hangup")
    victim.assert_reconciles("hangup", 12)


def test_ctrl_c_stops_a_run_that_resume_completes(victim: Home) -> None:
    """Exit code 130, at once, and the message is the command that goes on with it."""
    command = victim.start(
        "generate", "nano", "--limit", str(N), "--run", "stopped", "--set", "in_flight=2"
    )
    until(lambda: victim.count("stopped", "state IN ('vetted', 'rejected')") >= 3, "it runs")
    command.send_signal(signal.SIGINT)
    text, _ = command.communicate(timeout=20)
    assert command.returncode == 130, text
    assert "tirgen resume stopped" in text
    assert victim.state("stopped") == "cancelled"
    before = victim.finished("stopped")
    assert 3 <= len(before) < N
    said = victim.quick("resume", "stopped")
    assert said.code == 0, said
    victim.assert_reconciles("stopped", N)
    assert before.items() <= victim.finished("stopped").items()
    assert victim.count("stopped", "failures + kills > 0") == 0


def test_cancel_ends_a_run_and_its_watcher(victim: Home, gated: Gated) -> None:
    """From another terminal; what was in flight is dropped, and the run can be resumed."""
    with gated.running(victim, "unwanted", 6) as command:
        gated.let(2)
        until(lambda: len(victim.finished("unwanted")) == 2, "two are finished")
        said = victim.quick("cancel", "unwanted")
        assert said.code == 0, said
        assert "4 open items cancelled" in said.text
        assert command.wait(20) == 1
    assert victim.count("unwanted", "state = 'cancelled'") == 4
    assert victim.quick("cancel", "unwanted").code == 0
    gated.let(1000)
    said = victim.quick("resume", "unwanted")
    assert said.code == 0, said
    victim.assert_reconciles("unwanted", 6)


def test_sigterm_drains_the_worker(victim: Home, gated: Gated) -> None:
    """What is in flight is finished, nothing more is begun, and it counts as no failure."""
    with gated.running(victim, "drained", 9) as command:
        until(lambda: gated.waiting == 3, "three are in flight")
        command.kill()  # it would start another worker
        command.wait()
        worker, log = victim.worker(), victim.folder / "worker.log"
        said = log.read_text().count("Warm shutdown")
        worker.terminate()
        until(lambda: log.read_text().count("Warm shutdown") > said, "the worker knows")
        gated.let(1000)
        until(lambda: not alive(worker), "the worker has ended")
    assert victim.count("drained", "state IN ('vetted', 'rejected') AND attempt = 1") == 3
    assert victim.count("drained", "state = 'queued' AND attempt = 0") == 6
    assert victim.tirgen("up").code == 0
    victim.wait_done("drained")
    victim.assert_reconciles("drained", 9)
    assert victim.count("drained", "failures + kills > 0") == 0


def test_retry_generates_failed_items_again(victim: Home, gated: Gated) -> None:
    """And only those: the finished ones stay as they are."""
    with gated.running(victim, "flaky", 4, "--set", "in_flight=1") as command:
        gated.let(1)
        until(lambda: len(victim.finished("flaky")) == 1, "one is finished")
        gated.broken = True
        gated.let(1000)
        assert command.wait(40) == 0
    victim.assert_reconciles("flaky", 4)
    before = victim.finished("flaky")
    assert victim.count("flaky", "state = 'failed' AND error_class = 'bad_reply'") >= 2
    gated.broken = False
    said = victim.quick("retry", "flaky")
    assert said.code == 0, said
    assert "failed items queued again" in said.text
    victim.assert_reconciles("flaky", 4)
    assert victim.count("flaky", "state = 'failed'") == 0
    assert before.items() <= victim.finished("flaky").items()
    assert "nothing left to do" in victim.quick("retry", "flaky").text


def test_resume_finds_a_dead_model_before_it_queues_anything(victim: Home) -> None:
    """Else a worker would take the items, and fail every one of them."""
    gated = Gated()
    with gated.server, gated.running(victim, "orphan", 3) as command:
        command.send_signal(signal.SIGINT)
        assert command.wait(20) == 130
    said = victim.quick("resume", "orphan")
    assert said.code == 1, said
    assert "cannot be reached" in said.text
    assert victim.state("orphan") == "cancelled"
    assert victim.count("orphan", "state = 'cancelled' AND failures = 0") == 3
