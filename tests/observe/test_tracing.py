"""Which spans the environment asks for, and what becomes of one."""

from __future__ import annotations

import builtins
import logging
import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from asyncproxy.observe.tracing import NO_SPAN, OpenTelemetry, Tracer, from_environment
from asyncproxy.wire.trace_context import trace_id

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "proxy", "OTEL_TRACES_SAMPLER": "always_on"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_TRACES_EXPORTER": "", "OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SDK_DISABLED": "True", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
    ],
    ids=str,
)
def test_nobody_asks_for_spans(environ: dict[str, str]) -> None:
    tracer = from_environment(environ)
    assert type(tracer) is Tracer
    span = tracer.start("submit", PARENT, {})
    assert span is NO_SPAN
    assert span.traceparent == ""
    span.note("a", "b")
    span.end("x", 500)
    tracer.close()


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
        {"OTEL_TRACES_EXPORTER": "console, console"},
    ],
    ids=str,
)
def test_somebody_asks_for_spans(environ: dict[str, str]) -> None:
    tracer = from_environment(environ)
    assert isinstance(tracer, OpenTelemetry)
    tracer.close()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin is not known"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "grpc is not spoken",
        ),
    ],
    ids=str,
)
def test_what_is_not_there_is_said(
    environ: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    from_environment(environ).close()
    assert said in caplog.text


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with caplog.at_level(logging.WARNING):
        tracer = from_environment({"OTEL_TRACES_EXPORTER": "otlp"})
    assert type(tracer) is Tracer
    assert "pip install 'asyncproxy[otel]'" in caplog.text


def test_nothing_of_it_is_loaded_unless_it_is_asked_for() -> None:
    code = (
        "import sys, asyncproxy; "
        "asyncproxy.build_app(asyncproxy.load_config({'upstreams': [{'base_url': 'http://x'}]})); "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={})


def recording(**options: Any) -> tuple[OpenTelemetry, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False, **options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OpenTelemetry(provider), exporter


def test_a_span_is_below_its_parent_and_names_itself_to_the_next() -> None:
    tracer, exporter = recording()
    span = tracer.start("attempt", PARENT, {"a": "b"}, started_at=1000.5, outward=True)
    below = tracer.start("below", span.traceparent, {})
    below.end()
    span.note("c", "d")
    span.end("", 200)
    inner, outer = exporter.get_finished_spans()
    assert trace_id(span.traceparent) == trace_id(below.traceparent) == TRACE
    assert outer.parent is not None
    assert f"{outer.parent.span_id:016x}" == SPAN
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    assert dict(outer.attributes or {}) == {"a": "b", "c": "d", "http.response.status_code": 200}
    assert (outer.kind, inner.kind) == (SpanKind.CLIENT, SpanKind.INTERNAL)
    assert outer.start_time == 1_000_500_000_000
    assert outer.status.status_code is StatusCode.UNSET


def test_a_failure_is_one() -> None:
    tracer, exporter = recording()
    tracer.start("attempt", "", {}).end("upstream_timeout", 504)
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "upstream_timeout"


@pytest.mark.parametrize("rubbish", ["", "rubbish", PARENT + "\r\nx: y"])
def test_without_a_parent_it_is_the_first_of_its_trace(rubbish: str) -> None:
    tracer, exporter = recording()
    tracer.start("submit", rubbish, {}).end()
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_what_is_not_sampled_is_not_exported_and_says_so_to_the_next() -> None:
    tracer, exporter = recording(sampler=ParentBased(ALWAYS_OFF))
    span = tracer.start("submit", f"00-{TRACE}-{SPAN}-00", {})
    span.end()
    assert not exporter.get_finished_spans()
    assert span.traceparent.endswith("-00")
    assert trace_id(span.traceparent) == TRACE
