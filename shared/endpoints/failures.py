"""Every way in which a model call fails, as one EndpointError with a kind.

kind              when                                              retried here  item may retry
unreachable       no connection, or one that broke                  yes           yes
timeout           408, or no whole reply in time                    yes           yes
rate_limited      429 (not if the account's quota is used up)       yes           yes
server_error      5xx                                               yes           yes
bad_reply         2xx that is no valid reply                        no            yes
unauthorized      401, 403                                          no            no
model_not_found   404 that speaks of the model                      no            no
context_overflow  4xx that speaks of the context's length           no            no
bad_request       any other refusal                                 no            no
"""

from __future__ import annotations

import math
import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import httpx2
from pydantic import ValidationError

from shared.endpoints.admission import Outcome
from shared.endpoints.config import NO_KEY, EndpointConfig
from shared.endpoints.transport import UnreadableReplyError
from shared.errors import EndpointError

if TYPE_CHECKING:
    import openai

TRANSIENT = frozenset({"unreachable", "timeout", "rate_limited", "server_error"})
RETRYABLE = TRANSIENT | {"bad_reply"}

MAX_RAW = 4096  # bytes of a body that an error keeps

_URL_REMEDY = "Check --base-url: on most servers it ends in /v1."

# vLLM, OpenAI, SGLang, llama.cpp, Anthropic's compatible API
_OVERFLOW = re.compile(
    r"context.{0,2}(length|size|window)|maximum model length|max_model_len|prompt is too long",
    re.IGNORECASE,
)


class Failures:
    """Makes the errors of one endpoint. The key is known only to be struck out of bodies."""

    def __init__(self, config: EndpointConfig, key: str) -> None:
        self._config, self._key = config, key

    def _error(
        self,
        kind: str,
        what: str,
        url: str,
        *,
        remedy: str | None = None,
        body: bytes | None = None,
        retryable: bool | None = None,
    ) -> EndpointError:
        return EndpointError(
            what,
            kind=kind,
            retryable=kind in RETRYABLE if retryable is None else retryable,
            where=f"{url} (model {self._config.model})",
            remedy=remedy,
            raw=None if body is None else self._raw(body),
        )

    def _raw(self, body: bytes) -> str:
        text = body.decode(errors="replace")
        if self._key != NO_KEY:
            text = text.replace(self._key, "[API key]")  # before the cut, which may halve a key
        return text.encode()[:MAX_RAW].decode(errors="ignore")

    def timeout(self, url: str, seconds: float) -> EndpointError:
        return self._error(
            "timeout",
            f"The endpoint sent no whole reply within {seconds:.3g} s.",
            url,
            remedy="Raise the endpoint's timeout, or lower max_tokens or concurrency.",
        )

    def unsendable(self, url: str, error: ValueError) -> EndpointError:
        return self._error(
            "bad_request",
            f"The request cannot be written as JSON: {error}.",
            url,
            remedy="Clean the text of lone surrogates and the numbers of NaN.",
        )

    def connection(self, url: str, error: openai.APIConnectionError) -> EndpointError:
        """From an exchange that ended without a reply."""
        cause = error.__cause__ or error
        detail = str(cause) or type(cause).__name__
        if isinstance(cause, UnreadableReplyError):
            return self._error("bad_reply", f"Unreadable reply: {detail}.", url, remedy=_URL_REMEDY)
        if isinstance(cause, (httpx2.ReadTimeout, httpx2.WriteTimeout)):
            return self.timeout(url, self._config.timeout)
        if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            return self._error(
                "unreachable",
                f"The endpoint cannot be reached: {detail}.",
                url,
                remedy="Is the server up? `tirgen up` starts the packaged one; for another one, "
                "check --base-url.",
            )
        return self._error(
            "unreachable",
            f"The connection broke before the reply was complete: {detail}.",
            url,
            remedy="Look at the server's log: did it crash, restart or run out of memory?",
        )

    def status(self, url: str, error: openai.APIStatusError) -> EndpointError:
        """From a reply whose status is not 2xx."""
        status, body = error.status_code, error.response.content
        text = self._raw(body)
        what = f"The endpoint answered {status}: {' '.join(text.split())[:300] or '(no body)'}"
        if status in (401, 403):
            env = self._config.api_key_env
            remedy = (
                f"The environment variable {env} is not set: put the server's key in it."
                if self._key == NO_KEY
                else f"Check the key in the environment variable {env}: the server refuses it."
            )
            return self._error("unauthorized", what, url, remedy=remedy, body=body)
        if status == 404 and (self._config.model in text or "model_not_found" in text):
            remedy = "Check --model: GET /v1/models lists what the server has."
            return self._error("model_not_found", what, url, remedy=remedy, body=body)
        if status == 408:
            return self._error("timeout", what, url, body=body)
        if status == 429:
            if error.code == "insufficient_quota":
                remedy = "The account has no credit left; waiting does not help."
                return self._error(
                    "rate_limited", what, url, remedy=remedy, body=body, retryable=False
                )
            remedy = "Lower the endpoint's concurrency, or ask for a higher rate limit."
            return self._error("rate_limited", what, url, remedy=remedy, body=body)
        if status >= 500:
            remedy = "Look at the server's log; then retry."
            return self._error("server_error", what, url, remedy=remedy, body=body)
        if status >= 400 and _OVERFLOW.search(text):
            remedy = "Lower max_tokens or the length budget, or serve a longer context."
            return self._error("context_overflow", what, url, remedy=remedy, body=body)
        elsewhere = status == 404 or status < 400
        return self._error(
            "bad_request", what, url, remedy=_URL_REMEDY if elsewhere else None, body=body
        )

    def down(self, url: str, seconds: float) -> EndpointError:
        """No server of the model has answered anything for so long."""
        return self._error(
            "unreachable",
            f"The endpoint has been down for {seconds:.3g} s: whatever is sent there fails.",
            url,
            remedy="Look at the server's log, start it again; then `tirgen retry RUN`.",
        )

    def bad_reply(self, url: str, body: bytes, error: ValidationError) -> EndpointError:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        return self._error(
            "bad_reply",
            f"The endpoint's reply is not what the API promises: {place}: {first['msg']}.",
            url,
            remedy="Is this an OpenAI-compatible server? " + _URL_REMEDY,
            body=body,
        )

    def model_missing(self, url: str, models: tuple[str, ...]) -> EndpointError:
        return self._error(
            "model_not_found",
            f"The server does not have the model {self._config.model!r}.",
            url,
            remedy="Set --model to one that it has: " + (", ".join(models[:20]) or "(none)"),
        )


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again shortly."""
    return isinstance(error, EndpointError) and error.retryable and error.kind in TRANSIENT


def outcome_of(error: EndpointError) -> Outcome:
    """What the failure of a request says about the server."""
    cause = _status_error(error)
    status = None if cause is None else cause.status_code
    if error.kind == "rate_limited":
        return Outcome.OVERLOAD if error.retryable else Outcome.ANSWER
    if error.kind == "timeout" or status == 503:
        return Outcome.STRAIN
    if error.kind in ("server_error", "unreachable"):
        return Outcome.FAILURE
    if error.kind == "bad_request" and status is None:
        return Outcome.ABANDONED  # it was never sent
    return Outcome.ANSWER


def retry_after(error: BaseException) -> float:
    """Seconds that the server asked us to wait (Retry-After: seconds or an HTTP date), or 0."""
    cause = _status_error(error)
    if cause is None:
        return 0.0
    header = cause.response.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _status_error(error: BaseException) -> openai.APIStatusError | None:
    """The server's reply that the error is about, if it sent one."""
    import openai

    cause = error.__cause__
    return cause if isinstance(cause, openai.APIStatusError) else None
