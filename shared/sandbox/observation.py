"""The text of an observation o_t: what the model is shown of a run.

"paper" follows the release (method.md 2): standard output on success, the last line of the error
otherwise, stripped, and long text as its two ends. Where the release errs, this does not: output of
a successful run is kept whole although it may contain the word "Error", a run that printed nothing
is told so (9.2 no. 6) instead of "Timed Out", and a timeout is named as one.
"plain" shows everything: standard output, then the traceback.
"""

from __future__ import annotations

from typing import Literal

from shared.sandbox.result import Outcome, RunResult

Style = Literal["plain", "paper"]

NO_OUTPUT = "(no output; use print)"
TIMED_OUT = "TimeoutError: the code ran too long"
_LONG, _END = 256, 128  # characters


def observe(result: RunResult, style: Style = "paper") -> str:
    """Raises ValueError for an infrastructure error: that is nothing a model may be shown."""
    match result.outcome:
        case Outcome.OK:
            text = result.stdout
        case Outcome.NO_OUTPUT:
            text = NO_OUTPUT
        case Outcome.TIMEOUT:
            text = TIMED_OUT if style == "paper" else f"{result.stdout}\n{TIMED_OUT}"
        case Outcome.MODEL_ERROR:
            text = _last_line(result) if style == "paper" else f"{result.stdout}\n{_error(result)}"
        case Outcome.INFRASTRUCTURE_ERROR:
            raise ValueError("an infrastructure error has no observation")
    text = text.strip()
    if style == "paper" and len(text) >= _LONG:
        text = f"{text[:_END]}...{text[-_END:]}"
    return text


def _error(result: RunResult) -> str:
    """The traceback where there is one; a killed process has only a name and a message."""
    if result.error is None:
        return result.stderr
    error = result.error
    return error.traceback or f"{error.type}: {error.message}".removesuffix(": ")


def _last_line(result: RunResult) -> str:
    lines = _error(result).strip().splitlines()
    return lines[-1] if lines else "Error"
