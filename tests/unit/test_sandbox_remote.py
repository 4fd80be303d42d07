"""The remote adapter: every status has its outcome, and every fault of a server its clear text."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tenacity import wait_none

from shared.errors import ConfigError, SandboxError
from shared.sandbox import Limits, Outcome, RunResult, Sandbox, Tier, remote
from shared.sandbox.fusion import ReplyError, reply_body, result_of
from shared.sandbox.remote import RemoteSandbox
from tests.fake_endpoint import FakeEndpoint, Reply, ok
from tests.served import served


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait for nothing."""
    monkeypatch.setattr(remote, "_BACKOFF", wait_none())
    monkeypatch.delenv(remote.TOKEN, raising=False)


def command(status: str = "Finished", code: int | None = 0, out: str = "", err: str = "") -> Any:
    return {"status": status, "execution_time": 0.25, "return_code": code, "stdout": out,
            "stderr": err}  # fmt: skip


def foreign(status: str, run: Any = None, message: str = "", compiled: Any = None) -> Any:
    """A reply as SandboxFusion makes it."""
    return {"status": status, "message": message, "compile_result": compiled, "run_result": run,
            "executor_pod_name": None, "files": {}}  # fmt: skip


TRACE = (
    'Traceback (most recent call last):\n  File "/tmp/tmpa1/tmpb2.py", line 3, in <module>\n    '
    'f()\n  File "/tmp/tmpa1/tmpb2.py", line 2, in f\n    1 / 0\n  File "/usr/lib/x.py", line 9, '
    "in g\nZeroDivisionError: division by zero\n"
)
SYNTAX = '  File "/tmp/x/y.py", line 4\n    a = = 1\n        ^\nSyntaxError: invalid syntax\n'


@pytest.mark.parametrize(
    ("reply", "outcome", "error"),
    [
        (foreign("Success", command(out="4\n")), Outcome.OK, None),
        (foreign("Success", command(out=" \n")), Outcome.NO_OUTPUT, None),
        (foreign("Success", command(out="4\n"), compiled=command()), Outcome.OK, None),
        (foreign("Failed", command("TimeLimitExceeded", None, "1")), Outcome.TIMEOUT, "TimeLimit"),
        (foreign("Failed", command(code=1, err=TRACE)), Outcome.MODEL_ERROR, "ZeroDivisionError"),
        (foreign("Failed", command(code=1, err=SYNTAX)), Outcome.MODEL_ERROR, "SyntaxError"),
        (foreign("Failed", command(code=3)), Outcome.MODEL_ERROR, "SystemExit"),
        (foreign("Failed", command(code=-11)), Outcome.MODEL_ERROR, "SIGSEGV"),
        (foreign("Failed", command(code=137)), Outcome.MODEL_ERROR, "SIGKILL"),
        (foreign("Failed", command(code=1, err="just: words")), Outcome.MODEL_ERROR, "SystemExit"),
        (foreign("Failed", None, compiled=command(code=2)), Outcome.MODEL_ERROR, "SystemExit"),
    ],
)
def test_every_status_of_a_foreign_server_has_its_outcome(
    reply: Any, outcome: Outcome, error: str | None
) -> None:
    result = result_of(reply)
    assert result.outcome is outcome
    assert (result.error.type if result.error else None) == error
    assert (result.tier, result.duration) == (Tier.REMOTE, 0.25)


def test_an_exception_is_read_from_the_traceback_without_the_servers_random_path() -> None:
    result = result_of(foreign("Failed", command(code=1, err="warned\n" + TRACE)))
    assert result.error is not None
    assert (result.error.message, result.error.line) == ("division by zero", 2)
    assert result.error.traceback.startswith("Traceback (most recent call last):\n")
    assert "/tmp/" not in result.stderr + result.error.traceback
    assert result_of(foreign("Failed", command(code=1, err=SYNTAX))).error.line == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (foreign("SandboxError", None, "no pod"), "no pod"),
        (foreign("SandboxError", command("Error", None)), "no reason"),
        (foreign("Failed", command("Error", None)), "without a result"),
        (foreign("Success"), "without a result"),
        (foreign("Wonderful", command()), "status"),
        (foreign("Success", command("Done")), "run_result.status"),
        (foreign("Success", {**command(), "stdout": 5}), "run_result.stdout"),
        ({}, "status"),
        ([], "body"),
        (None, "body"),
        ("ok", "body"),
        ({"tirgen": {"outcome": "ok"}}, "own result"),
        ({"tirgen": {"outcome": "splendid"}}, "own result"),
    ],
)
def test_a_reply_that_says_nothing_about_the_run_is_no_result(reply: Any, says: str) -> None:
    with pytest.raises(ReplyError, match=says):
        result_of(reply)


def test_between_two_of_ours_nothing_is_lost() -> None:
    with Sandbox(zygotes=1, preload=(), warmup="") as sandbox:
        for code in (
            "print(1)",
            "1 / 0",
            "while True: pass",
            "print('é\\0\\x1b')",
            "print('a'*99999)",
        ):
            result = sandbox.run(code, timeout=0.5)
            assert result_of(json.loads(json.dumps(reply_body(result)))) == result
    broken = reply_body(sandbox.infrastructure_error("gone"))
    with pytest.raises(ReplyError, match="gone"):
        result_of(broken)


# ---- servers in all conditions -------------------------------------------------------------------

Answer = Callable[[Any], Reply]


def fusion(answer: Answer, health: Reply = Reply(status=404)) -> FakeEndpoint:
    """A server of the protocol: its probes, and `answer` to /run_code."""

    def script(path: str, body: Any) -> Reply:
        match path:
            case "/v1/ping":
                return ok("pong")
            case "/health":
                return health
            case "/run_code":
                return answer(body)
        return Reply(status=404)

    return FakeEndpoint(script)


def url_of(server: FakeEndpoint) -> str:
    return server.base_url.removesuffix("/v1")


def test_a_foreign_server_gets_what_it_knows_and_its_runs_are_called_remote() -> None:
    with fusion(lambda body: ok(foreign("Success", command(out=body["code"])))) as server:
        with RemoteSandbox(url_of(server) + "/run_code") as sandbox:
            assert sandbox.tier is Tier.REMOTE
            result = sandbox.run("print(1)", seed=5, timeout=7)
        assert (result.outcome, result.stdout, result.tier) == (
            Outcome.OK, "print(1)", Tier.REMOTE,
        )  # fmt: skip
        sent = server.requests[-1]
        assert (sent.path, sent.headers["content-type"]) == ("/run_code", "application/json")
        assert sent.json == {
            "code": "print(1)", "language": "python", "run_timeout": 7, "compile_timeout": 7,
            "stdin": None, "files": {}, "fetch_files": [], "seed": 5,
        }  # fmt: skip


FAULTS: dict[str, tuple[Reply, str]] = {
    "HTML": (Reply(b"<html>nginx</html>"), "not JSON"),
    "nothing": (Reply(b""), "not JSON"),
    "nested without end": (Reply(b"[" * 200_000), "not JSON"),
    "another protocol": (ok({"result": 42}), "not a reply of /run_code"),
    "its own failure": (ok(foreign("SandboxError", message="disk full")), "disk full"),
    "an internal error": (Reply(b"oops", 500), "HTTP 500: oops"),
    "bad request": (Reply(b'{"detail": "python only"}', 422), "python only"),
    "always overloaded": (Reply(b"busy", 503), "HTTP 503: busy"),
    "always resets": (Reply(reset=True), "cannot be used"),
    "a redirect": (Reply(b"", 302, {"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
    "the token is wrong now": (Reply(b"no", 401), "TIRGEN_SANDBOX_TOKEN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_server_is_an_infrastructure_error_that_says_which(name: str) -> None:
    reply, says = FAULTS[name]
    with (
        fusion(lambda _: reply) as server,
        RemoteSandbox(url_of(server), token="s3cr3t") as sandbox,
    ):
        result = sandbox.run("print(1)", timeout=5)
    assert result.outcome is Outcome.INFRASTRUCTURE_ERROR
    assert says in result.stderr
    assert "s3cr3t" not in result.stderr
    assert result.error is not None
    assert result.error.type == "Infrastructure"


@pytest.mark.parametrize(
    "first", [Reply(reset=True), Reply(b"", 502), Reply(b"", 503), Reply(b"", 504)]
)
def test_what_may_pass_is_tried_again(first: Reply) -> None:
    replies = [first, first, ok(foreign("Success", command(out="1")))]
    with fusion(lambda _: replies.pop(0)) as server, RemoteSandbox(url_of(server)) as sandbox:
        assert sandbox.run("print(1)").stdout == "1"
    assert replies == []


def test_what_will_not_pass_is_not_tried_again() -> None:
    with fusion(lambda _: Reply(b"", 500)) as server, RemoteSandbox(url_of(server)) as sandbox:
        sandbox.run("print(1)")
        assert [r.path for r in server.requests].count("/run_code") == 1


def test_a_server_that_hangs_costs_only_the_patience() -> None:
    """One that sends its head and stops, one that sends nothing at all, one that trickles."""
    silent = threading.Event()

    def quiet(_: Any) -> Reply:
        silent.wait(60)
        return Reply(b"")

    drip = (b" " for _ in range(100_000))
    answers = (lambda _: Reply(stall=True), quiet, lambda _: Reply(chunks=drip, pause=0.05))

    class Short(Limits):
        def wall(self, timeout: float) -> float:
            return timeout

    for answer in answers:
        with (
            fusion(answer) as server,
            RemoteSandbox(url_of(server), limits=Short(), patience=0.0) as sandbox,
        ):
            result = sandbox.run("print(1)", timeout=0.1)
        assert result.outcome is Outcome.INFRASTRUCTURE_ERROR
        assert "did not answer within" in result.stderr
    silent.set()


def test_a_reply_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_REPLY", 1 << 16)
    endless = (b"x" * 4096 for _ in iter(int, 1))
    with (
        fusion(lambda _: Reply(chunks=endless)) as server,
        RemoteSandbox(url_of(server)) as sandbox,
    ):
        assert "longer than 65536 bytes" in sandbox.run("print(1)").stderr


def test_output_that_a_foreign_server_kept_is_cut_to_our_limit() -> None:
    long = foreign("Success", command(out="é" * 40_000))
    with fusion(lambda _: ok(long)) as server, RemoteSandbox(url_of(server)) as sandbox:
        result = sandbox.run("print(1)")
    assert len(result.stdout.encode()) == sandbox.limits.output == 65536
    assert result.bytes_cut == 80_000 - 65536


def test_a_dead_server_is_found_when_it_is_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SandboxError, match="cannot be used") as caught, RemoteSandbox(url):
        pass
    assert caught.value.where == url
    assert "tirgen sandbox serve" in (caught.value.remedy or "")


def test_a_server_that_dies_later_is_an_infrastructure_error() -> None:
    down = threading.Event()

    def script(path: str, body: Any) -> Reply:
        return Reply(reset=True) if down.is_set() else ok("pong")

    with FakeEndpoint(script) as server, RemoteSandbox(url_of(server)) as sandbox:
        down.set()
        result = sandbox.run("print(1)")
    assert result.outcome is Outcome.INFRASTRUCTURE_ERROR
    assert "cannot be used" in result.stderr


def test_what_is_no_sandbox_server_is_refused() -> None:
    with FakeEndpoint(lambda *_: Reply(b"hello", 404)) as server:
        sandbox = RemoteSandbox(url_of(server))
        with pytest.raises(SandboxError, match="no sandbox server"):
            sandbox.open()
    for url in ("127.0.0.1:8080", "ftp://x", "http://", "http://u:p@h", "http://h?x=1"):
        with pytest.raises(ConfigError):
            RemoteSandbox(url)


def test_a_server_of_ours_must_reach_the_minimum_tier() -> None:
    with fusion(lambda _: ok({}), ok({"status": "ok", "tier": "C"})) as server:
        with pytest.raises(SandboxError, match="has tier C, and B is the minimum"):
            RemoteSandbox(url_of(server)).open()
        with RemoteSandbox(url_of(server), minimum_tier=Tier.C) as sandbox:
            assert sandbox.tier is Tier.C


def test_the_token_is_sent_and_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "a-token-of-some-length"
    with Sandbox(zygotes=1, preload=(), warmup="") as local, served(local, token) as url:
        with pytest.raises(SandboxError, match="refuses us"), RemoteSandbox(url, token="wrong"):
            pass
        monkeypatch.setenv(remote.TOKEN, token)
        with RemoteSandbox(url) as sandbox:
            assert sandbox.tier is local.tier
            assert sandbox.run("print(6 * 7)").stdout == "42\n"


def test_it_must_be_open() -> None:
    sandbox = RemoteSandbox("http://127.0.0.1:9")
    with pytest.raises(SandboxError, match="not open"):
        sandbox.run("print(1)")
    with pytest.raises(SandboxError, match="not open"):
        asyncio.run(sandbox.arun("print(1)"))


def test_many_callers_of_many_event_loops_share_one() -> None:
    def echo(body: Any) -> Reply:
        return ok(foreign("Success", command(out=body["code"])))

    with fusion(echo) as server, RemoteSandbox(url_of(server)) as sandbox:

        async def many(start: int) -> list[RunResult]:
            runs = [sandbox.arun(str(i)) for i in range(start, start + 100)]
            return await asyncio.gather(*runs)

        for start in (0, 100):
            results = asyncio.run(many(start))
            assert [r.stdout for r in results] == [str(i) for i in range(start, start + 100)]
