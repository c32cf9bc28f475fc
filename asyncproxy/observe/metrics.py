"""The metrics: instruments that observe events, and gauges that are read from the parts at a scrape.

The values of labels come from fixed sets: endpoints, upstreams, codes, classes of statuses. A model, an
id, a method or a path is never a label: a client could make a new series with each request.
``docs/metrics.md`` lists all metrics, and a test compares the list with this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest

from asyncproxy.core import events
from asyncproxy.core.events import Observer, status_class
from asyncproxy.core.jobs import JobStatus
from asyncproxy.observe.instruments import Count, Distribution
from asyncproxy.stores.base import States, Usage
from asyncproxy.version import __version__

__all__ = ["CONTENT_TYPE", "Fill", "Metrics", "Readings"]

# The text format that every Prometheus reads.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# In seconds. A call takes from a cached vector to a long generation, and a job up to its deadline.
_LONG: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600,
)  # fmt: skip
# The memory store takes microseconds, a disk milliseconds, a server that comes back seconds.
_STORE: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_LAG: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Fill(NamedTuple):
    """The fill and the job states of a store."""

    usage: Usage
    states: States


class Readings(NamedTuple):
    """The values of the gauges at a scrape."""

    fill: Fill | None
    """None: the store did not answer in time."""
    max_live: int
    max_bytes: int
    calls: Mapping[str, int]
    """Calls in flight, by upstream."""
    limits: Mapping[str, int]
    """Calls that may be in flight now, by upstream."""
    away: Mapping[str, float]
    """Seconds for which an upstream has been away, by upstream. 0: it takes calls."""
    waiting: int
    """Clients that wait for a job."""
    passing: int
    """Requests that are passing through."""
    draining: bool


class Metrics(Observer):
    """The instruments of one application, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        info = self._gauge(
            "asyncproxy_build_info", "The version of asyncproxy that runs. Always 1.", "version"
        )
        info.labels(__version__).set(1)
        self._add_jobs()
        self._add_calls()
        self._add_store()
        self._add_requests()
        self._lag = self._histogram(
            "asyncproxy_event_loop_lag_seconds",
            "Seconds by which the event loop runs a timer later than it is due.",
            buckets=_LAG,
        )
        self._reloads = self._counter(
            "asyncproxy_config_reloads", "Reloads of the configuration after a SIGHUP.", "outcome"
        )

    def _add_jobs(self) -> None:
        self._submitted = self._counter(
            "asyncproxy_jobs_submitted", "Jobs that were accepted at a submit.", "endpoint", "upstream"
        )
        self._refused = self._counter(
            "asyncproxy_submits_refused",
            "Submits that were refused, and so did not become a job.",
            "endpoint",
            "code",
        )
        self._finished = self._counter(
            "asyncproxy_jobs_finished",
            "Jobs that have completed or failed.",
            "endpoint",
            "upstream",
            "outcome",
        )
        self._job_seconds = self._histogram(
            "asyncproxy_job_seconds",
            "Seconds from the submission of a job to its outcome.",
            "endpoint",
            "upstream",
        )
        self._queue_seconds = self._histogram(
            "asyncproxy_queue_wait_seconds",
            "Seconds from the submission of a job to its first call.",
            "upstream",
        )
        self._live = self._gauge(
            "asyncproxy_jobs", "Jobs in the store that have not completed or failed.", "state"
        )
        self._max_live = self._gauge(
            "asyncproxy_jobs_limit",
            "Limit of jobs that have not completed or failed: jobs.max_pending.",
        )
        self._draining = self._gauge(
            "asyncproxy_draining", "Whether the proxy is shutting down: 1 if so, otherwise 0."
        )

    def _add_calls(self) -> None:
        self._attempt_seconds = self._histogram(
            "asyncproxy_upstream_attempt_seconds",
            "Seconds that one call to an upstream took, for a job.",
            "upstream",
            "outcome",
        )
        self._retries = self._counter(
            "asyncproxy_retries",
            "Jobs that went back to the queue after a call, to be tried again.",
            "upstream",
            "reason",
        )
        self._fallbacks = self._counter(
            "asyncproxy_fallbacks",
            "Jobs that went on with the next of their fallback models.",
            "upstream",
        )
        self._pauses = self._counter(
            "asyncproxy_upstream_pauses",
            "Pauses of the jobs of one model and credential, after a rate limit.",
            "upstream",
        )
        self._calls = self._gauge(
            "asyncproxy_calls_in_flight",
            "Calls to an upstream that are in flight, for jobs.",
            "upstream",
        )
        self._limits = self._gauge(
            "asyncproxy_calls_limit",
            "Calls for jobs that may be in flight now: the concurrency, or less after an outage.",
            "upstream",
        )
        self._up = self._gauge(
            "asyncproxy_upstream_up",
            "Whether the upstream takes calls: 1 if so, 0 while it is away.",
            "upstream",
        )
        self._away_seconds = self._gauge(
            "asyncproxy_upstream_away_seconds",
            "Seconds for which the upstream has been away: 0 if it takes calls.",
            "upstream",
        )

    def _add_store(self) -> None:
        self._store_up = self._gauge(
            "asyncproxy_store_up", "Whether the store answered this scrape: 1 if so, otherwise 0."
        )
        self._store_results = self._gauge(
            "asyncproxy_store_results", "Results of jobs that the store keeps."
        )
        self._store_bytes = self._gauge(
            "asyncproxy_store_bytes", "Bytes that jobs and results take in the store."
        )
        self._store_max_bytes = self._gauge(
            "asyncproxy_store_limit_bytes",
            "Limit of bytes that jobs and results may take in the store: store.max_bytes.",
        )
        self._store_seconds = self._histogram(
            "asyncproxy_store_operation_seconds",
            "Seconds that one operation of the store took.",
            "operation",
            buckets=_STORE,
        )
        self._store_errors = self._counter(
            "asyncproxy_store_errors", "Operations of the store that failed.", "operation", "code"
        )

    def _add_requests(self) -> None:
        self._passed = self._counter(
            "asyncproxy_passthrough_requests",
            "Requests that passed through to an upstream, counted at their end.",
            "upstream",
            "status",
            "outcome",
        )
        self._passed_bytes = self._counter(
            "asyncproxy_passthrough_bytes",
            "Bytes of bodies of requests that passed through, and of their responses.",
            "upstream",
            "direction",
        )
        self._first_byte_seconds = self._histogram(
            "asyncproxy_passthrough_first_byte_seconds",
            "Seconds until the response to a request that passed through began.",
            "upstream",
        )
        self._passing = self._gauge(
            "asyncproxy_passthrough_in_flight", "Requests that are passing through to an upstream now."
        )
        self._waiting = self._gauge(
            "asyncproxy_waiting_clients", "Clients that are held now, until a job ends."
        )
        self._waits = self._counter(
            "asyncproxy_waits",
            "Clients that were held until a job ended, or until their time was up.",
            "endpoint",
            "outcome",
        )
        self._hops = self._counter(
            "asyncproxy_relay_hops",
            "Redirects that relayed requests were answered with, to go on waiting.",
            "endpoint",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Count:
        return Count(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: Sequence[float] = _LONG
    ) -> Distribution:
        return Distribution(name, text, labels, buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    # Events.

    def job_submitted(self, event: events.JobSubmitted) -> None:
        self._submitted.add((event.endpoint, event.upstream))

    def submit_refused(self, event: events.SubmitRefused) -> None:
        self._refused.add((event.endpoint, event.code))

    def job_started(self, event: events.JobStarted) -> None:
        self._queue_seconds.observe((event.upstream,), event.queued_s)

    def call_ended(self, event: events.CallEnded) -> None:
        self._attempt_seconds.observe((event.upstream, event.outcome), event.duration_s)

    def retried(self, event: events.Retried) -> None:
        self._retries.add((event.upstream, event.reason))

    def fell_back(self, event: events.FellBack) -> None:
        self._fallbacks.add((event.upstream,))

    def paused(self, event: events.Paused) -> None:
        self._pauses.add((event.upstream,))

    def job_finished(self, event: events.JobFinished) -> None:
        outcome = "completed"
        if event.status is not JobStatus.COMPLETED:
            outcome = event.code or "upstream_" + status_class(event.status_code)
        self._finished.add((event.endpoint, event.upstream, outcome))
        self._job_seconds.observe((event.endpoint, event.upstream), event.total_s)

    def request_passed(self, event: events.RequestPassed) -> None:
        status = status_class(event.status) if event.status else "none"
        self._passed.add((event.upstream, status, event.outcome))
        self._passed_bytes.add((event.upstream, "request"), event.received_bytes)
        self._passed_bytes.add((event.upstream, "response"), event.sent_bytes)
        if event.first_byte_s is not None:
            self._first_byte_seconds.observe((event.upstream,), event.first_byte_s)

    def wait_ended(self, event: events.WaitEnded) -> None:
        self._waits.add((event.endpoint, event.outcome))

    def relay_hop(self, event: events.RelayHop) -> None:
        self._hops.add((event.endpoint,))

    def store_operation(self, event: events.StoreOperation) -> None:
        if event.duration_s is not None:
            self._store_seconds.observe((event.operation,), event.duration_s)
        if event.error:
            self._store_errors.add((event.operation, event.error))

    def config_reloaded(self, event: events.ConfigReloaded) -> None:
        self._reloads.add(("succeeded" if event.succeeded else "refused",))

    def loop_lagged(self, lag_s: float) -> None:
        """Note how late the event loop was."""
        self._lag.observe((), lag_s)

    # Gauges, read at a scrape.

    def page(self, readings: Readings) -> bytes:
        """All metrics, in the format of :data:`CONTENT_TYPE`."""
        self._read(readings)
        return generate_latest(self.registry)

    def _read(self, readings: Readings) -> None:
        fill = readings.fill
        self._store_up.set(fill is not None)
        if fill is None:
            # Without a reading the gauges have no value: an old value would mislead.
            for gauge in (self._store_bytes, self._store_results):
                gauge.set(float("nan"))
            self._live.clear()
        else:
            self._store_bytes.set(fill.usage.bytes)
            self._store_results.set(fill.usage.results)
            self._live.labels("pending").set(fill.states.pending)
            self._live.labels("processing").set(fill.states.processing)
        self._max_live.set(readings.max_live)
        self._store_max_bytes.set(readings.max_bytes)
        self._waiting.set(readings.waiting)
        self._passing.set(readings.passing)
        self._draining.set(readings.draining)
        for gauge, by_upstream in (
            (self._calls, readings.calls),
            (self._limits, readings.limits),
            (self._up, {name: not away_s for name, away_s in readings.away.items()}),
            (self._away_seconds, readings.away),
        ):
            gauge.clear()  # drops upstreams that a reload has removed
            for upstream, number in by_upstream.items():
                gauge.labels(upstream).set(number)
