"""SandboxFusion's `/run_code` (bytedance/SandboxFusion, sandbox/server/sandbox_api.py), both ways.

Requests, replies, and what they mean in our outcomes. What we add is ignored by others: `seed` in
a request, and our whole result under `tirgen` in a reply, so that nothing is lost between two of
ours. A foreign reply knows less: memory and bytes cut are then 0, and the tier is `remote`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field, InstanceOf, ValidationError

from shared.sandbox.result import CodeError, Outcome, RunResult, Tier

MAX_TIMEOUT = 600.0  # seconds
OURS = "tirgen"  # the key of a reply that holds our own result


class RunStatus(StrEnum):
    SUCCESS = "Success"
    FAILED = "Failed"  # a non-zero exit status, or no time left
    SANDBOX_ERROR = "SandboxError"


class CommandStatus(StrEnum):
    FINISHED = "Finished"
    TIME_LIMIT = "TimeLimitExceeded"
    ERROR = "Error"


class RunCodeRequest(BaseModel):
    """A request as verl and SandboxFusion's own client send it; unknown keys are ignored.

    Text may hold lone surrogates, which is why its type alone is checked.
    """

    code: InstanceOf[str]
    language: str = "python"
    run_timeout: float = Field(default=10.0, gt=0, le=MAX_TIMEOUT)
    stdin: InstanceOf[str] | None = None
    files: dict[str, Any] = {}
    fetch_files: list[str] = []
    seed: int = 0

    def unsupported(self) -> str | None:
        """What is asked for that we do not have, or None."""
        if self.language != "python":
            return f"language {self.language!r}: this server runs python only"
        if self.files or self.fetch_files:
            return "files and fetch_files: this server takes and gives no files"
        return None


def request_body(code: str, seed: int, timeout: float) -> dict[str, Any]:
    """A request to any server of this protocol. Python has nothing to compile."""
    return {"code": code, "language": "python", "run_timeout": timeout, "compile_timeout": timeout,
            "stdin": None, "files": {}, "fetch_files": [], "seed": seed}  # fmt: skip


def reply_body(result: RunResult) -> dict[str, Any]:
    """Our result as a reply of this protocol."""
    status, message, command = RunStatus.FAILED, "", CommandStatus.FINISHED
    return_code: int | None = None
    match result.outcome:
        case Outcome.OK | Outcome.NO_OUTPUT:
            status, return_code = RunStatus.SUCCESS, 0
        case Outcome.MODEL_ERROR:
            return_code = _exit_status(result.error)
        case Outcome.TIMEOUT:
            command = CommandStatus.TIME_LIMIT
        case Outcome.INFRASTRUCTURE_ERROR:
            status, command = RunStatus.SANDBOX_ERROR, CommandStatus.ERROR
            message = result.stderr or "the sandbox failed"
    run = {
        "status": command,
        "execution_time": result.duration,
        "cpu_time": result.cpu_time,
        "return_code": return_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
    }
    return {"status": status, "message": message, "compile_result": None, "run_result": run,
            "executor_pod_name": None, "files": {}, OURS: asdict(result)}  # fmt: skip


def _exit_status(error: CodeError | None) -> int:
    """As `subprocess` counts: minus the signal, or what the program asked for, or 1."""
    if error is None:
        return 1
    if error.type in signal.Signals.__members__:
        return -signal.Signals[error.type]
    if error.type == "SystemExit" and (found := re.search(r"(\d+)$", error.message)):
        return int(found[1]) & 0xFF or 1
    return 1


class _Command(BaseModel):
    status: CommandStatus
    execution_time: float | None = None
    cpu_time: float | None = None  # newer servers
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class _Reply(BaseModel):
    status: RunStatus
    message: str = ""
    compile_result: _Command | None = None
    run_result: _Command | None = None


class ReplyError(Exception):
    """A reply that says nothing about the run: not of this protocol, or a failure of the server."""


def result_of(reply: object) -> RunResult:
    """What a decoded reply says about the run. Raises ReplyError."""
    if isinstance(reply, dict) and isinstance(ours := reply.get(OURS), dict):
        return _our_result(ours)
    try:
        read = _Reply.model_validate(reply)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReplyError(f"not a reply of /run_code: {where or 'body'}: {first['msg']}") from error
    if read.status is RunStatus.SANDBOX_ERROR:
        raise ReplyError(f"the server says SandboxError: {read.message[:2000] or 'no reason'}")
    command = read.run_result or read.compile_result
    if command is None or command.status is CommandStatus.ERROR:
        raise ReplyError(f"the server says {read.status} without a result")
    return _foreign_result(read.status, command)


def _our_result(ours: Mapping[str, Any]) -> RunResult:
    try:
        result = RunResult.from_json(ours)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"the server's own result cannot be read: {error}") from error
    texts, numbers = (result.stdout, result.stderr), (result.duration, result.cpu_time)
    if not all(isinstance(t, str) for t in texts):
        raise ReplyError("the server's own result cannot be read: output is no text")
    if not all(isinstance(n, (int, float)) for n in (*numbers, result.peak_memory)):
        raise ReplyError("the server's own result cannot be read: a measure is no number")
    if result.outcome is Outcome.INFRASTRUCTURE_ERROR:
        raise ReplyError(result.stderr or "the server's sandbox failed")
    return result


def _foreign_result(status: RunStatus, command: _Command) -> RunResult:
    stdout, stderr = command.stdout or "", command.stderr or ""
    error: CodeError | None = None
    if command.status is CommandStatus.TIME_LIMIT:
        outcome = Outcome.TIMEOUT
        error = CodeError("TimeLimit", "the server's time limit", None, "")
    elif status is RunStatus.SUCCESS:
        outcome = Outcome.OK if stdout.strip() else Outcome.NO_OUTPUT
    else:
        outcome = Outcome.MODEL_ERROR
        stderr = _without_script_path(stderr)
        error = _error_in(stderr, command.return_code)
    return RunResult(outcome, stdout, stderr, error, Tier.REMOTE, command.execution_time or 0.0,
                     command.cpu_time or 0.0, 0, 0)  # fmt: skip


_FRAME = re.compile(r'^\s+File "([^"]+)", line (\d+)', re.MULTILINE)
_LAST = re.compile(r"([A-Za-z_][\w.]*)(?:: (.*))?")


def _without_script_path(stderr: str) -> str:
    """The script lies in a folder with a random name; the model sees `<code>`, as it does here."""
    script = _FRAME.search(stderr)
    return stderr.replace(f'"{script[1]}"', '"<code>"') if script else stderr


def _error_in(stderr: str, return_code: int | None) -> CodeError:
    """The exception that a traceback on standard error ends with."""
    lines = stderr.strip().splitlines()
    last = _LAST.fullmatch(lines[-1]) if lines else None
    mine = [frame for frame in _FRAME.finditer(stderr) if frame[1] == "<code>"]
    if last and mine:
        kind = last[1].rpartition(".")[2]
        start = max(0, stderr.rfind("Traceback (most recent call last):"))
        return CodeError(kind, last[2] or "", int(mine[-1][2]), stderr[start:].rstrip("\n"))
    number = 0 if return_code is None else -return_code if return_code < 0 else return_code - 128
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        return CodeError(name, f"killed by {name}", None, "")
    return CodeError("SystemExit", f"ended with exit status {return_code}", None, "")
