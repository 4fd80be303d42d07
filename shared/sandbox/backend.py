"""What a caller of the sandbox may count on, wherever the code runs."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from shared.sandbox.load import Load
from shared.sandbox.pool import Sandbox
from shared.sandbox.remote import RemoteSandbox
from shared.sandbox.result import RunResult, Tier


class Backend(Protocol):
    """`Sandbox` and `RemoteSandbox`; what both must do is in conformance.py.

    `tier` is known once it is open. A run that could not be made is an infrastructure error, never
    an exception; cancelling `arun` kills the run.
    """

    tier: Tier | None
    load: Load

    def run(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult: ...

    async def arun(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def backend(url: str | None, minimum_tier: Tier) -> Backend:
    """This host's sandbox, or the server at `url`; still to be opened."""
    if url is not None:
        return RemoteSandbox(url, minimum_tier=minimum_tier)
    return Sandbox(minimum_tier=minimum_tier)
