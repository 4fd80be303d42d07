"""OpenTelemetry traces, for those who have somewhere to send them.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 tirgen worker

The trace of an item: `item`, in it the nodes of its graph, in these the calls of models. A call
carries the trace in its headers (`traceparent`), so that the spans of a server that traces as well
(vLLM does) hang below ours. Spans carry the ids that log lines carry (telemetry.py).

Everything else is told to OpenTelemetry as to any program, by the environment: OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_SCHEDULE_DELAY. Where nobody asks for
traces, nothing of OpenTelemetry is imported and a span costs a microsecond.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

from shared import telemetry
from shared.optional import require

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

P = ParamSpec("P")
T = TypeVar("T")

_provider: Any = None  # of this process, where spans are recorded
_tracer: Any = None


class Span(Protocol):
    def set_attributes(self, attributes: Mapping[str, Any]) -> None: ...


class _Unrecorded:
    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        pass


_UNRECORDED = _Unrecorded()


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Does the environment say where traces go?"""
    asked = any(environ.get(name) for name in ENDPOINTS)
    return asked and environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def check() -> None:
    """Raises ConfigError where traces are wanted and cannot be sent."""
    if wanted():
        _exporter()


def start() -> None:
    """Send this process's spans from now on, where they are wanted. Not before a fork: the thread
    that sends them would not be there after it. Raises ConfigError."""
    if not wanted():
        return
    trace = require("opentelemetry.sdk.trace", need="tracing", install="tirgen[otel]")
    export = require("opentelemetry.sdk.trace.export", need="tracing", install="tirgen[otel]")
    os.environ.setdefault("OTEL_SERVICE_NAME", "tirgen")
    provider = trace.TracerProvider()
    provider.add_span_processor(export.BatchSpanProcessor(_exporter()))
    record(provider)


def record(provider: Any) -> None:
    """Give spans to this TracerProvider; None ends it."""
    global _provider, _tracer
    _provider, _tracer = provider, provider and provider.get_tracer("tirgen")


def stop() -> None:
    """Send what is left, and record no more."""
    if _provider is not None:
        _provider.shutdown()
    record(None)


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Span]:
    """The block as a span, below the one around it. An exception that leaves it is recorded."""
    if _tracer is None:
        yield _UNRECORDED
        return
    ids = {f"tirgen.{id}": value for id, value in telemetry.ids().items()}
    with _tracer.start_as_current_span(name, attributes=ids | attributes) as recorded:
        yield recorded


def spanned(call: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """`call` as a span of its own name."""
    name = getattr(call, "__name__", "call")

    @wraps(call)
    async def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
        with span(name):
            return await call(*args, **kwargs)

    return recorded


def headers() -> dict[str, str]:
    """What a request carries, so that its server can join the trace."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        require("opentelemetry.propagate", need="tracing", install="tirgen[otel]").inject(carrier)
    return carrier


def _exporter() -> Any:
    module = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    return require(module, need="tracing", install="tirgen[otel]").OTLPSpanExporter()
