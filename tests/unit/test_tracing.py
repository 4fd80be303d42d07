"""Traces: one tree for an item, joined by the model's server, sent where the environment says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared import tracing
from shared.endpoints import Endpoint, EndpointConfig, Sampling
from shared.errors import ConfigError, EndpointError
from shared.telemetry import about
from tests.fake_endpoint import FakeEndpoint, Reply, chat
from tests.scripted import speech
from tests.scripted_graph import BOXED, case

PROGRAM = """
from shared import tracing
from shared.telemetry import about
tracing.check()
tracing.start()
with about(run="r", item=7), tracing.span("item"):
    with tracing.span("reason"):
        pass
tracing.stop()
import sys
print("opentelemetry" in sys.modules)
"""


@pytest.fixture
def seen() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.record(provider)
    yield exporter
    tracing.stop()


def below(spans: tuple[ReadableSpan, ...], parent: ReadableSpan) -> list[str]:
    assert parent.context is not None
    inner = [s for s in spans if s.parent and s.parent.span_id == parent.context.span_id]
    return [s.name for s in sorted(inner, key=lambda s: s.start_time or 0)]


def test_an_item_is_one_tree_of_the_nodes_that_it_went_through(seen: InMemorySpanExporter) -> None:
    async def main() -> None:
        made = case(speech("Count CALC pens.", BOXED))

        async def item(number: int) -> None:
            with about(run="r", item=number), tracing.span("item"):
                await made.arun(seed=number)

        await asyncio.gather(*(item(i) for i in range(3)))

    asyncio.run(main())
    spans = seen.get_finished_spans()
    roots = [span for span in spans if span.parent is None]
    assert sorted(span.attributes["tirgen.item"] for span in roots if span.attributes) == [0, 1, 2]
    for root in roots:
        nodes = below(spans, root)
        assert (nodes[0], nodes[-1]) == ("reason", "verify")
        assert {"extract", "execute", "commit"} <= set(nodes)


def ask(server: FakeEndpoint, **settings: object) -> None:
    async def main() -> None:
        config = EndpointConfig(base_url=server.base_url, model="m", **settings)  # type: ignore[arg-type]
        async with Endpoint(config) as endpoint:
            await endpoint.chat([{"role": "user", "content": "?"}], Sampling())

    asyncio.run(main())


def test_the_models_server_can_join_the_trace(seen: InMemorySpanExporter) -> None:
    with FakeEndpoint(lambda path, body: chat("yes")) as server:
        ask(server)
        tracing.record(None)
        ask(server)
        tracked, other = server.requests
    (span,) = seen.get_finished_spans()
    assert span.context is not None
    _, trace, parent, _ = tracked.headers["traceparent"].split("-")
    assert (int(trace, 16), int(parent, 16)) == (span.context.trace_id, span.context.span_id)
    assert span.attributes == {
        "url.full": f"{server.base_url}/chat/completions", "gen_ai.request.model": "m",
    }  # fmt: skip
    assert "traceparent" not in other.headers, "control: nobody records"


def test_a_failed_try_is_a_failed_span_without_the_key(
    seen: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with (
        FakeEndpoint(lambda path, body: Reply(b"sk-secret is wrong", status=401)) as server,
        pytest.raises(EndpointError),
    ):
        ask(server)
    (span,) = seen.get_finished_spans()
    assert not span.status.is_ok
    assert [event.name for event in span.events] == ["exception"]
    assert "sk-secret" not in span.to_json()


def sent(environ: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environ
    )
    return done.stdout.strip()


def test_spans_go_where_the_environment_says_and_nowhere_else() -> None:
    with FakeEndpoint(lambda path, body: Reply(b"")) as collector:
        url = collector.base_url.removesuffix("/v1")
        assert sent({"OTEL_EXPORTER_OTLP_ENDPOINT": url}) == "True"
        assert sent({"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_SDK_DISABLED": "true"}) == "False"
        assert sent({}) == "False", "control: not even imported"
        (request,) = collector.requests
    assert request.path == "/v1/traces"
    message = ExportTraceServiceRequest.FromString(request.json)
    (resource,) = message.resource_spans
    facts = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert facts["service.name"] == "tirgen"
    inner, outer = resource.scope_spans[0].spans
    assert (inner.name, outer.name, inner.parent_span_id) == ("reason", "item", outer.span_id)


def test_who_wants_traces_without_the_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError) as caught:
        tracing.check()
    assert caught.value.remedy == "pip install 'tirgen[otel]'"
