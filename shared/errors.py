"""Errors that reach a person: what happened, where, and what to do about it.

Third-party exceptions are wrapped where they enter (database, endpoint, sandbox, files), so that
every message a user sees has these three parts and every program exits with a meaningful code.
"""

from __future__ import annotations


class TirgenError(Exception):
    """Base of every error shown to a user.

    `what` is one sentence; `where` names the file, key, address or row; `remedy` says what to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.remedy:
            parts.append(f"  to do: {self.remedy}")
        return "\n".join(parts)


class ConfigError(TirgenError):
    """A setting is unknown, malformed or contradicts another; found before any work starts."""

    exit_code = 2


class InputError(TirgenError):
    """A file given by the user cannot be used as it is."""

    exit_code = 2


class DatabaseError(TirgenError):
    """PostgreSQL cannot be reached, started or used."""


class BrokerError(TirgenError):
    """The Celery broker cannot be reached."""


class SandboxError(TirgenError):
    """The sandbox cannot be started at the required tier."""


class EndpointError(TirgenError):
    """A model endpoint refused or failed a request for good.

    `kind` is a stable class name for rows and counts: unreachable, unauthorized, model_not_found,
    rate_limited, server_error, bad_reply, timeout, context_overflow, bad_request.
    `retryable` says whether another attempt of the same work item could succeed.
    """

    def __init__(
        self,
        what: str,
        *,
        kind: str,
        retryable: bool,
        where: str | None = None,
        remedy: str | None = None,
        raw: str | None = None,
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.kind, self.retryable, self.raw = kind, retryable, raw
