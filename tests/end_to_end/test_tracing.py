"""Spans of a proxy: what they are below of, and what the gateway is told."""

from __future__ import annotations

import gzip
import logging
import os
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asyncproxy.observe import tracing
from asyncproxy.wire.trace_context import trace_id
from tests import gateway as gateways
from tests.conftest import EMBED, Client
from tests.end_to_end.test_process import started
from tests.gateway import Gateway, answer, in_turn, reset

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What a proxy that is started after this exports."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = tracing.OpenTelemetry(provider)
    monkeypatch.setattr(tracing, "from_environment", lambda _environ: tracer)
    return exporter


def told(span: ReadableSpan) -> str:
    """The traceparent that names a span."""
    context = span.context
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def parent(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


async def test_a_job_is_one_trace_below_its_clients(
    spans: InMemorySpanExporter, proxy: Client, gateway: Gateway
) -> None:
    gateway.behaviour = in_turn(reset, answer({"no": 1}, status=500), answer({"ok": 1}))
    done = await proxy.outcome(await proxy.submit(headers=PARENT))
    (submit,), (queue,), attempts = (named(spans, n) for n in ("submit", "queue", "attempt"))
    assert parent(submit) == SPAN
    assert {f"{span.context.trace_id:032x}" for span in spans.get_finished_spans()} == {TRACE}
    assert {parent(span) for span in (queue, *attempts)} == {f"{submit.context.span_id:016x}"}
    assert [request.header("traceparent") for request in gateway.received] == [*map(told, attempts)]
    outcomes = [dict(span.attributes or {}).get("error.type") for span in attempts]
    assert outcomes == ["upstream_unreachable", "500", None]
    assert [dict(span.attributes or {})["asyncproxy.attempt"] for span in attempts] == [1, 2, 3]
    for span in spans.get_finished_spans():
        assert dict(span.attributes or {})["asyncproxy.job.id"] == done["id"]
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert queue.start_time <= queue.end_time


async def test_without_a_trace_of_the_client_there_is_a_new_one_and_the_log_has_it(
    spans: InMemorySpanExporter, proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await proxy.outcome(await proxy.submit())
    (submit,) = named(spans, "submit")
    assert submit.parent is None
    ids = {record.fields["trace_id"] for record in caplog.records if hasattr(record, "fields")}
    assert ids == {f"{submit.context.trace_id:032x}"}
    assert trace_id(gateway.received[0].header("traceparent")) in ids


@pytest.mark.one_store
async def test_a_refused_submit_is_a_failed_span(
    spans: InMemorySpanExporter, proxy: Client, gateway: Gateway
) -> None:
    key = {"Idempotency-Key": "k"}
    await proxy.submit(headers=key)
    assert (await proxy.post("/v1/async/embeddings", {**EMBED, "x": 1}, headers=key)).status == 422
    refused = named(spans, "submit")[-1]
    assert dict(refused.attributes or {})["error.type"] == "idempotency_key_reused"


@pytest.mark.one_store
async def test_what_passes_through_has_a_span_too(
    spans: InMemorySpanExporter, proxy: Client, gateway: Gateway
) -> None:
    await proxy.post("/v1/embeddings?key=in-the-query", headers=PARENT)
    gateway.behaviour = answer({}, status=404)
    await proxy.get("/v1/nothing")
    gateway.behaviour = reset
    await proxy.get("/v1/broken")
    passed = named(spans, "pass-through")
    # The client library sends a GET again on a connection that was closed.
    sent = list(dict.fromkeys(request.header("traceparent") for request in gateway.received))
    assert sent == [*map(told, passed)]
    assert parent(passed[0]) == SPAN
    attributes = [dict(span.attributes or {}) for span in passed]
    assert [a.get("error.type") for a in attributes] == [None, "404", "upstream_unreachable"]
    assert [a["http.response.status_code"] for a in attributes] == [200, 404, 502]
    assert attributes[0]["url.path"] == "/v1/embeddings", "and not the query"


@pytest.fixture
async def collector() -> AsyncIterator[Gateway]:
    async with gateways.running() as running:
        running.behaviour = answer(b"", content_type="application/x-protobuf")
        yield running


async def test_the_usual_variables_send_them_to_a_collector(
    gateway: Gateway, collector: Gateway
) -> None:
    environ = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_SERVICE_NAME": "embeddings-proxy",
    }
    arguments = ("serve", "--upstream", f"{gateway.url}/v1", "--listen", "127.0.0.1:0")
    async with started(*arguments, env=environ) as process, aiohttp.ClientSession() as session:
        url = (await process.line()).split(" listens on ")[1].split(",")[0]
        async with session.post(url + "/v1/async/embeddings?wait=9", json=EMBED) as response:
            path = response.headers["Location"]
        async with session.get(f"{url}{path}?wait=20") as response:
            assert response.status == 200
        process.process.send_signal(signal.SIGTERM)
        code, _, err = await process.end()
    assert (code, "Traceback" in err) == (0, False)
    sent = [r for r in collector.received if r.target == "/v1/traces"]
    messages = [ExportTraceServiceRequest.FromString(gzip.decompress(r.body)) for r in sent]
    resources = [resource for message in messages for resource in message.resource_spans]
    names = [
        span.name for resource in resources for scope in resource.scope_spans for span in scope.spans
    ]
    assert sorted(names) == ["attempt", "queue", "submit"]
    services = {
        attribute.value.string_value
        for resource in resources
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
    }
    assert services == {"embeddings-proxy"}
