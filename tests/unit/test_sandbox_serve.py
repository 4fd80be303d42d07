"""`tirgen sandbox serve`: SandboxFusion's clients use it unchanged, and strangers do not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest

from shared.errors import ConfigError
from shared.sandbox import CodeError, Outcome, RunResult, Sandbox, Tier
from shared.sandbox import serve as serving
from shared.sandbox.fusion import reply_body
from tests.served import served

TOKEN = "a-token-of-some-length"
JSON = {"Content-Type": "application/json", "Accept": "application/json"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One bare zygote, so that a run which is not killed shows."""
    limits = serving.ServedLimits()
    with (
        Sandbox(zygotes=1, preload=(), warmup="", limits=limits) as sandbox,
        served(sandbox) as address,
    ):
        yield address


def verl_request(code: str, stdin: str | None = None, timeout: int = 10) -> bytes:
    """What verl/utils/reward_score/sandbox_fusion/utils.py sends."""
    return json.dumps(
        {
            "compile_timeout": timeout,
            "run_timeout": timeout,
            "code": code,
            "stdin": stdin,
            "memory_limit_MB": 1024,
            "language": "python",
            "files": {},
            "fetch_files": [],
        }
    ).encode()


def ask(url: str, body: bytes | str, headers: dict[str, str] | None = None) -> httpx2.Response:
    return httpx2.post(
        f"{url}/run_code", content=body, headers=JSON | (headers or {}), timeout=60, trust_env=False
    )


def run(url: str, code: str, stdin: str | None = None, timeout: int = 10) -> dict[str, Any]:
    response = ask(url, verl_request(code, stdin, timeout))
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


# ---- clients of others ---------------------------------------------------------------------------


def test_verl_reads_a_success(url: str) -> None:
    reply = run(url, "import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (reply["status"], reply["message"], reply["compile_result"]) == ("Success", "", None)
    done = reply["run_result"]
    assert (done["status"], done["return_code"]) == ("Finished", 0)
    assert done["stdout"] + done["stderr"] == "out\nerr\n"
    assert done["execution_time"] > 0


def test_verl_tells_runtime_errors_from_timeouts(url: str) -> None:
    """Failed + Finished + a non-zero status is -2 there, Failed + TimeLimitExceeded is -3."""
    failed = run(url, "print(1)\n1 / 0")
    assert (failed["status"], failed["run_result"]["status"]) == ("Failed", "Finished")
    assert failed["run_result"]["return_code"] == 1
    assert "ZeroDivisionError" in failed["run_result"]["stderr"]
    late = run(url, "print('partial')\nwhile True: pass", timeout=1)
    assert (late["status"], late["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
    assert late["run_result"]["stdout"] == "partial\n"


def test_the_request_of_sandbox_fusions_own_client_is_understood(url: str) -> None:
    """sandbox_fusion.run_code posts RunCodeRequest(...).dict(); its probe is /v1/ping."""
    body = {"compile_timeout": 10, "run_timeout": 10, "code": "print(123)", "stdin": None,
            "language": "python", "files": {}, "fetch_files": [], "args": []}  # fmt: skip
    reply = ask(url, json.dumps(body)).json()
    known = {"status", "message", "compile_result", "run_result", "executor_pod_name", "files"}
    assert known <= set(reply)
    assert reply["run_result"]["stdout"] == "123\n"
    assert httpx2.get(f"{url}/v1/ping", trust_env=False).json() == "pong"


@pytest.mark.parametrize(
    ("code", "stdin", "stdout"),
    [
        ("print(int(input()) + int(input()))", "3\n4\n", "7\n"),
        ("import sys; print(sys.stdin.read().split())", "a b\nc", "['a', 'b', 'c']\n"),
        ("print(len(open(0).read()))", "x" * 300_000, "300000\n"),
        ("print(input())", "x" * 300_000, "x" * 65536),
        ("import sys\nfor line in sys.stdin: print(line, end='')", "é\n", "é\n"),
        ("print(1)", "never read" * 50_000, "1\n"),
        ("from __future__ import annotations\nprint(input())", "z", "z\n"),
        ("feed = 1\nprint('__start__' in globals(), __name__)", "x", "False __main__\n"),
    ],
    ids=["input", "read", "long", "long line, cut", "lines", "unread", "future", "no traces"],
)
def test_a_program_reads_the_standard_input_of_its_request(
    url: str, code: str, stdin: str, stdout: str
) -> None:
    reply = run(url, code, stdin)
    assert reply["status"] == "Success", reply
    assert reply["run_result"]["stdout"] == stdout


def test_an_error_of_a_program_with_input_has_its_own_line(url: str) -> None:
    reply = run(url, "x = input()\n\nraise ValueError(x)", "why")
    error = reply["tirgen"]["error"]
    assert (error["type"], error["message"], error["line"]) == ("ValueError", "why", 3)
    assert run(url, "x = (", "why")["tirgen"]["error"]["type"] == "SyntaxError"
    assert run(url, "input(); input()", "one")["tirgen"]["error"]["type"] == "EOFError"


@pytest.mark.parametrize(
    ("outcome", "error", "status", "command", "code"),
    [
        (Outcome.OK, None, "Success", "Finished", 0),
        (Outcome.NO_OUTPUT, None, "Success", "Finished", 0),
        (Outcome.MODEL_ERROR, ("ValueError", "3"), "Failed", "Finished", 1),
        (Outcome.MODEL_ERROR, ("SystemExit", "3"), "Failed", "Finished", 3),
        (Outcome.MODEL_ERROR, ("SystemExit", "256"), "Failed", "Finished", 1),
        (Outcome.MODEL_ERROR, ("SystemExit", "ended with exit status 7"), "Failed", "Finished", 7),
        (Outcome.MODEL_ERROR, ("SIGSEGV", ""), "Failed", "Finished", -11),
        (Outcome.TIMEOUT, ("TimeLimit", ""), "Failed", "TimeLimitExceeded", None),
        (Outcome.INFRASTRUCTURE_ERROR, ("x", ""), "SandboxError", "Error", None),
    ],
)
def test_every_outcome_has_its_status(
    outcome: Outcome, error: tuple[str, str] | None, status: str, command: str, code: int | None
) -> None:
    fault = CodeError(error[0], error[1], None, "") if error else None
    reply = reply_body(RunResult(outcome, "o", "e", fault, Tier.A, 0.1, 0.1, 1, 0))
    done = reply["run_result"]
    assert (reply["status"], done["status"], done["return_code"]) == (status, command, code)
    assert bool(reply["message"]) == (status == "SandboxError")


# ---- what is refused -----------------------------------------------------------------------------

BAD = {
    "not JSON": (b"{", 400),
    "not Unicode": (b'{"code": "\xff"}', 400),
    "nested without end": (b"[" * 200_000, 400),
    "a list": (b"[]", 422),
    "no code": (b'{"language": "python"}', 422),
    "code is a number": (b'{"code": 1}', 422),
    "no time": (b'{"code": "1", "run_timeout": 0}', 422),
    "time without end": (b'{"code": "1", "run_timeout": Infinity}', 422),
    "no number of seconds": (b'{"code": "1", "run_timeout": NaN}', 422),
    "too much time": (b'{"code": "1", "run_timeout": 601}', 422),
    "another language": (b'{"code": "1", "language": "bash"}', 422),
    "files": (b'{"code": "1", "files": {"a": "YQ=="}}', 422),
    "files to fetch": (b'{"code": "1", "fetch_files": ["/etc/passwd"]}', 422),
    "too long": (b'{"code": "' + b"x" * serving.MAX_BODY + b'"}', 413),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_request_is_refused_with_a_reason_and_the_server_goes_on(
    url: str, name: str
) -> None:
    body, status = BAD[name]
    response = ask(url, body)
    assert response.status_code == status, response.text
    assert response.json()["detail"]
    assert run(url, "print(1)")["run_result"]["stdout"] == "1\n"


def test_other_content_types_are_refused(url: str) -> None:
    """A web page can post a form to loopback without asking; it cannot post JSON."""
    assert ask(url, verl_request("1"), {"Content-Type": "text/plain"}).status_code == 415


def test_without_a_token_only_loopback_names_are_served(url: str) -> None:
    """A page of evil.example whose name was pointed at 127.0.0.1 says whose it is."""
    assert ask(url, verl_request("1"), {"Host": "evil.example"}).status_code == 403
    assert ask(url, verl_request("1"), {"Host": "localhost:1234"}).status_code == 200


class Waiting:
    """A sandbox whose runs never end by themselves."""

    tier, zygotes = Tier.A, 1

    def __init__(self) -> None:
        self.started, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)

    async def arun(self, code: str, *, seed: int, timeout: float) -> RunResult:
        self.started.release()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.release()
        raise AssertionError


def test_with_a_token_every_request_needs_it() -> None:
    class Answering(Waiting):
        async def arun(self, code: str, *, seed: int, timeout: float) -> RunResult:
            return RunResult(Outcome.OK, "1", "", None, Tier.A, 0.1, 0.1, 1, 0)

    with served(Answering(), TOKEN) as url:
        body = verl_request("print(1)")
        for wrong in (None, "Bearer nonsense", TOKEN, "Basic ***", f"Bearer {TOKEN}x", "Bearer"):
            headers = JSON if wrong is None else JSON | {"Authorization": wrong}
            response = httpx2.post(
                f"{url}/run_code", content=body, headers=headers, trust_env=False
            )
            assert response.status_code == 401, wrong
            assert TOKEN not in response.text
        assert httpx2.get(f"{url}/health", trust_env=False).status_code == 401
        assert ask(url, body, {"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        in_url = url.replace("http://", f"http://any:{TOKEN}@")
        assert ask(in_url, body).status_code == 200
        assert ask(in_url, body, {"Host": "sandbox.example"}).status_code == 200


def test_only_loopback_may_go_without_a_token() -> None:
    sandbox = Waiting()

    def must_not_listen(url: str) -> None:
        raise AssertionError(url)

    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(ConfigError, match="needs a token"):
            serving.serve(sandbox, host, 0, None, must_not_listen)  # type: ignore[arg-type]
    for token in ("short", "x" * 15, "with a space in the midst"):
        with pytest.raises(ConfigError, match="at least 16"):
            serving.serve(sandbox, "127.0.0.1", 0, token, must_not_listen)  # type: ignore[arg-type]
    assert [serving.is_loopback(h) for h in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == (
        [True] * 4
    )


def test_more_than_may_wait_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_WAITING", 1)
    sandbox = Waiting()
    with served(sandbox) as url:
        address = url.removeprefix("http://").split(":")
        request = (
            b"POST /run_code HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        body = verl_request("1")
        request += b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        open_ones = [socket.create_connection((address[0], int(address[1]))) for _ in range(2)]
        for connection in open_ones:
            connection.sendall(request)
            assert sandbox.started.acquire(timeout=30)
        busy = ask(url, body)
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
        assert httpx2.get(f"{url}/health", trust_env=False).json()["under_way"] == 2
        open_ones.pop().close()
        assert sandbox.cancelled.acquire(timeout=30)
        open_ones.pop().close()
        assert sandbox.cancelled.acquire(timeout=30)


# ---- lives and deaths ----------------------------------------------------------------------------


def test_a_client_that_leaves_takes_its_run_with_it(url: str) -> None:
    """The only zygote would otherwise be busy for 500 s of CPU time."""
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{url}/run_code", content=verl_request("while True: pass", timeout=500),
                    headers=JSON, timeout=0.5, trust_env=False)  # fmt: skip
    assert run(url, "print(1)")["run_result"]["stdout"] == "1\n"


def test_the_command_serves_until_sigterm_and_leaves_nothing(tmp_path: Any) -> None:
    program = [sys.executable, "-m", "tirgen", "sandbox", "serve", "--port", "0", "--zygotes", "1"]
    server = subprocess.Popen(
        program, stdout=subprocess.PIPE, text=True, env=os.environ | {"TIRGEN_SANDBOX_TOKEN": TOKEN}
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("sandbox: http://127.0.0.1:"), line
    assert TOKEN not in line
    url = line.split()[1].removesuffix("/run_code,")
    body = verl_request("import sympy\nprint(sympy.factorint(6))")
    assert ask(url, body).status_code == 401
    reply = ask(url, body, {"Authorization": f"Bearer {TOKEN}"})
    assert reply.json()["run_result"]["stdout"] == "{2: 1, 3: 1}\n"
    below = psutil.Process(server.pid).children(recursive=True)
    assert below, "control: the zygote is seen"
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) in (0, -signal.SIGTERM)
    server.stdout.close()
    assert not psutil.wait_procs(below, timeout=30)[1]
