"""The Python tool: model code runs in a jail forked from a warm interpreter.

    with Sandbox() as s:
        result = s.run(code, seed=0, timeout=10)

`Sandbox` and what it needs are loaded on first use, so that naming a type costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.sandbox.limits import Limits
from shared.sandbox.result import CodeError, Outcome, RunResult, Tier

if TYPE_CHECKING:
    from shared.sandbox.pool import Sandbox
    from shared.sandbox.session import Session

__all__ = ["CodeError", "Limits", "Outcome", "RunResult", "Sandbox", "Session", "Tier"]


def __getattr__(name: str) -> Any:
    if name == "Sandbox":
        from shared.sandbox.pool import Sandbox

        return Sandbox
    if name == "Session":
        from shared.sandbox.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
