"""What one run of model code came to: a typed outcome and the facts beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """The typed outcome of a tool call.

    Only `INFRASTRUCTURE_ERROR` is nobody's fault in the model: it is retried, then excluded, and
    never becomes a reward or a verdict.
    """

    OK = "ok"
    MODEL_ERROR = "model_error"
    TIMEOUT = "timeout"
    NO_OUTPUT = "no_output"
    INFRASTRUCTURE_ERROR = "infrastructure_error"


class Tier(StrEnum):
    """How a run was confined, strongest first (docs/architecture.md, Sandbox)."""

    A = "A"  # own namespaces + Landlock + seccomp + rlimits
    B = "B"  # Landlock + seccomp + rlimits
    C = "C"  # seccomp + rlimits
    D = "D"  # nothing
    REMOTE = "remote"  # by another's server, which does not say how (shared/sandbox/fusion.py)


@dataclass(frozen=True, slots=True)
class CodeError:
    """The exception that ended a run, as the model's own code raised it."""

    type: str
    message: str
    line: int | None
    traceback: str  # only frames of the model's code; no path of the host


@dataclass(frozen=True, slots=True)
class RunResult:
    """One finished run. Times in seconds, memory and cut output in bytes.

    `replayed`: a session's earlier cells had to be run again before this one, because the processes
    that held its state were lost.
    """

    outcome: Outcome
    stdout: str
    stderr: str
    error: CodeError | None
    tier: Tier
    duration: float
    cpu_time: float
    peak_memory: int
    bytes_cut: int
    replayed: bool = False

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> RunResult:
        """Inverse of `dataclasses.asdict` after a trip through JSON."""
        error = CodeError(**body["error"]) if body["error"] else None
        return cls(
            **{
                **body,
                "outcome": Outcome(body["outcome"]),
                "tier": Tier(body["tier"]),
                "error": error,
            }
        )
