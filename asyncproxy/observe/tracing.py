"""Spans of OpenTelemetry: submit, queue, each attempt, and each request that passes through.

The extra ``otel`` installs the library, and the ``OTEL_*`` variables name the receiver of spans.
Without the variables no library is loaded, and the tracer does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from asyncproxy.version import __version__
from asyncproxy.wire.trace_context import format_traceparent, valid

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = [
    "ATTEMPT",
    "ENDPOINT",
    "JOB",
    "METHOD",
    "MODEL",
    "NO_SPAN",
    "PATH",
    "UPSTREAM",
    "OpenTelemetry",
    "Span",
    "Tracer",
    "from_environment",
]

logger = logging.getLogger(__name__)

# Names of attributes: those of OpenTelemetry's conventions where there is one.
ATTEMPT: Final = "asyncproxy.attempt"
ENDPOINT: Final = "asyncproxy.endpoint"
JOB: Final = "asyncproxy.job.id"
METHOD: Final = "http.request.method"
MODEL: Final = "gen_ai.request.model"
PATH: Final = "url.path"
UPSTREAM: Final = "asyncproxy.upstream.client"

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SPOKEN: Final = "http/protobuf"


class Span:
    """A span. This base class records nothing.

    ``traceparent`` is for requests below this span. Empty: such requests keep their ``traceparent``.
    """

    traceparent = ""

    def note(self, name: str, value: str) -> None:
        """Add an attribute that was unknown at the start of the span."""

    def end(self, outcome: str = "", status: int = 0) -> None:
        """End the span, with an HTTP status if there is one, and with an ``outcome`` if it failed."""


NO_SPAN: Final = Span()


class Tracer:
    """Starts spans. This base class starts none."""

    def start(
        self,
        name: str,
        traceparent: str,
        attributes: Mapping[str, Any],
        *,
        started_at: float | None = None,
        outward: bool = False,
    ) -> Span:
        """A child of the span that ``traceparent`` names. An empty one starts a new trace.

        ``started_at`` is in seconds since the epoch; None is now. ``outward``: the span is a request to
        another server.
        """
        return NO_SPAN

    def close(self) -> None:
        """Export the remaining spans. Blocks for some seconds at most."""


class _RecordedSpan(Span):
    def __init__(self, span: trace.Span, error: trace.StatusCode) -> None:
        self._span = span
        self._error = error
        context = span.get_span_context()
        self.traceparent = format_traceparent(
            context.trace_id, context.span_id, int(context.trace_flags)
        )

    def note(self, name: str, value: str) -> None:
        self._span.set_attribute(name, value)

    def end(self, outcome: str = "", status: int = 0) -> None:
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if outcome:
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(self._error, outcome)
        self._span.end()


class OpenTelemetry(Tracer):
    """Starts spans of ``provider``, and closes it at the end."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("asyncproxy", __version__)
        self._read = TraceContextTextMapPropagator().extract
        self._nothing = Context()
        self._error = trace.StatusCode.ERROR
        self._kinds = trace.SpanKind

    def start(
        self,
        name: str,
        traceparent: str,
        attributes: Mapping[str, Any],
        *,
        started_at: float | None = None,
        outward: bool = False,
    ) -> Span:
        span = self._tracer.start_span(
            name,
            # An empty context: the current span of a host application is not the parent of a job's.
            context=self._read({"traceparent": valid(traceparent)}, context=self._nothing),
            kind=self._kinds.CLIENT if outward else self._kinds.INTERNAL,
            attributes=dict(attributes),
            start_time=None if started_at is None else round(started_at * 1e9),
        )
        return _RecordedSpan(span, self._error)

    def close(self) -> None:
        self._provider.shutdown()


def from_environment(environ: Mapping[str, str]) -> Tracer:
    """The tracer that the ``OTEL_*`` variables configure.

    ``OTEL_TRACES_EXPORTER`` may be ``otlp`` (the default if an endpoint is set), ``console`` or
    ``none``, or several of them with commas. The library reads the other variables (sampling, resource,
    batches, headers, timeouts): https://opentelemetry.io/docs/specs/otel/configuration/.
    """
    wanted = _exporters_wanted(environ)
    if not wanted:
        return Tracer()
    try:
        return OpenTelemetry(_provider(wanted, environ))
    except ImportError:
        logger.warning("OTEL_* asks for traces, which need: pip install 'asyncproxy[otel]'")
        return Tracer()


def _exporters_wanted(environ: Mapping[str, str]) -> list[str]:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    default = "otlp" if any(environ.get(name) for name in _ENDPOINTS) else ""
    names = environ.get("OTEL_TRACES_EXPORTER") or default
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in ("otlp", "console", "none"):
            logger.warning("OTEL_TRACES_EXPORTER: %s is not known; otlp, console and none are", name)
    return [name for name in dict.fromkeys(wanted) if name in ("otlp", "console")]


def _provider(wanted: list[str], environ: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create(None if named else {"service.name": "asyncproxy"})
    exporters = [_exporter(name, environ) for name in wanted]
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter(name: str, environ: Mapping[str, str]) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    asked = next((environ[key] for key in _PROTOCOLS if environ.get(key)), _SPOKEN)
    if asked != _SPOKEN:
        logger.warning("traces go out as %s: %s is not spoken", _SPOKEN, asked)
    return OTLPSpanExporter()
