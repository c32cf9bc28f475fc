"""Metrics: each moves when its event happens, and nobody outside has a say in their labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client import Counter as TheirCounter
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.parser import text_string_to_metric_families

from asyncproxy.core import events
from asyncproxy.core.events import Observer
from asyncproxy.core.jobs import JobStatus
from asyncproxy.observe.instruments import Count, Distribution
from asyncproxy.observe.metrics import Fill, Metrics, Readings
from asyncproxy.stores.base import States, Usage

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")

READINGS = Readings(
    fill=Fill(Usage(7, 5, 4096), States(4, 3)),
    max_live=100,
    max_bytes=8192,
    calls={"gateway": 3},
    limits={"gateway": 64},
    away={"gateway": 0.0},
    waiting=2,
    passing=1,
    draining=False,
)
FINISHED = events.JobFinished(
    job_id="an-id",
    endpoint="embeddings",
    upstream="gateway",
    model="m",
    status=JobStatus.COMPLETED,
    status_code=200,
    code="",
    attempts=1,
    total_s=1.5,
    call_s=0.25,
    result_bytes=17,
)
PASSED = events.RequestPassed(
    method="POST",
    path="/v1/embeddings",
    upstream="gateway",
    status=200,
    outcome="ok",
    sent_bytes=170,
    total_s=0.5,
    request_id="r-1",
    received_bytes=17,
    first_byte_s=0.25,
)
HAPPENED = {
    "job_submitted": events.JobSubmitted("an-id", "embeddings", "gateway"),
    "submit_refused": events.SubmitRefused("embeddings", "store_full"),
    "job_started": events.JobStarted("an-id", "embeddings", "gateway", 0.25),
    "call_ended": events.CallEnded("an-id", "embeddings", "gateway", 1, "2xx", 0.25),
    "retried": events.Retried("an-id", "gateway", "503", 1.0),
    "fell_back": events.FellBack("an-id", "gateway"),
    "upstream_away": events.UpstreamAway("gateway", "upstream_unreachable", 61.0, 12),
    "upstream_back": events.UpstreamBack("gateway", 90.0, 12),
    "paused": events.Paused("gateway", 1.0),
    "job_finished": FINISHED,
    "request_passed": PASSED,
    "wait_ended": events.WaitEnded("embeddings", "timeout"),
    "relay_hop": events.RelayHop("embeddings"),
    "store_operation": events.StoreOperation("create", 0.001, "store_unavailable"),
    "config_reloaded": events.ConfigReloaded(succeeded=True),
}


def samples(metrics: Metrics, readings: Readings = READINGS) -> dict[str, float]:
    """All values, by name and labels as in ``jobs{state="pending"}``."""
    found = {}
    for family in text_string_to_metric_families(metrics.page(readings).decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix("asyncproxy_")
            found[name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def tell(metrics: Observer, name: str, event: Any) -> None:
    getattr(metrics, name)(event)


def instruments(metrics: Metrics) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The types and labels of ours, by the names that they have on the page."""
    found = {}
    for collector in metrics.registry._collector_to_names:
        if isinstance(collector, Count):
            found[collector.name + "_total"] = ("counter", collector.labels)
        elif isinstance(collector, Distribution):
            found[collector.name] = ("histogram", collector.labels)
        elif isinstance(collector, Gauge):
            found[collector._name] = ("gauge", tuple(collector._labelnames))
    return found


def table(heading: str) -> list[list[str]]:
    """The rows of the first table after a heading of the page, without its head."""
    after = PAGE.partition(f"\n{heading}\n")[2] if heading != "# Metrics" else PAGE
    rows = re.search(r"^\| --- .*\n((?:\|.*\n)+)", after, re.M)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split(" |")] for row in rows[1].splitlines()]


def test_the_page_lists_what_there_is() -> None:
    listed = {
        row[0].strip("`"): (row[1], tuple(re.findall(r"`(\w+)`", row[2]))) for row in table("# Metrics")
    }
    assert listed == instruments(Metrics())


def test_the_page_has_the_buckets() -> None:
    listed = {
        name: [float(bound) for bound in row[1].split()]
        for row in table("## Buckets")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    assert listed == {
        collector.name: list(collector.bounds)
        for collector in Metrics().registry._collector_to_names
        if isinstance(collector, Distribution)
    }


def test_each_help_text_stands_alone_and_names_its_unit() -> None:
    """It is read in Prometheus and Grafana, where no other text is beside it."""
    texts = re.findall(
        r"^# HELP (asyncproxy_\w+) (.*)$", Metrics().page(READINGS).decode(), re.MULTILINE
    )
    assert len(texts) >= 28
    for name, text in texts:
        assert len(text.split()) >= 5, name
        assert text.endswith("."), name
        assert text.split()[0] not in ("Of", "What", "Until", "From", "How", "They"), name
        unit = re.search(r"_(seconds|bytes)(_total)?$", name)
        assert unit is None or unit[1] in text.lower(), name


def test_there_is_an_example_of_every_event() -> None:
    assert set(HAPPENED) == {name for name in vars(Observer) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("event", "moved"),
    [
        ("job_submitted", 'jobs_submitted_total{endpoint="embeddings",upstream="gateway"}'),
        ("submit_refused", 'submits_refused_total{code="store_full",endpoint="embeddings"}'),
        ("job_started", 'queue_wait_seconds_bucket{le="0.25",upstream="gateway"}'),
        (
            "call_ended",
            'upstream_attempt_seconds_bucket{le="0.25",outcome="2xx",upstream="gateway"}',
        ),
        ("retried", 'retries_total{reason="503",upstream="gateway"}'),
        ("fell_back", 'fallbacks_total{upstream="gateway"}'),
        ("paused", 'upstream_pauses_total{upstream="gateway"}'),
        (
            "job_finished",
            'jobs_finished_total{endpoint="embeddings",outcome="completed",upstream="gateway"}',
        ),
        ("job_finished", 'job_seconds_count{endpoint="embeddings",upstream="gateway"}'),
        (
            "request_passed",
            'passthrough_requests_total{outcome="ok",status="2xx",upstream="gateway"}',
        ),
        ("request_passed", 'passthrough_first_byte_seconds_count{upstream="gateway"}'),
        ("wait_ended", 'waits_total{endpoint="embeddings",outcome="timeout"}'),
        ("relay_hop", 'relay_hops_total{endpoint="embeddings"}'),
        ("store_operation", 'store_operation_seconds_count{operation="create"}'),
        ("store_operation", 'store_errors_total{code="store_unavailable",operation="create"}'),
        ("config_reloaded", 'config_reloads_total{outcome="succeeded"}'),
    ],
)
def test_an_event_moves_its_metric(event: str, moved: str) -> None:
    metrics = Metrics()
    assert samples(metrics).get(moved, 0) == 0
    for times in (1, 2):
        tell(metrics, event, HAPPENED[event])
        assert samples(metrics)[moved] == times


def test_bytes_are_counted_by_direction() -> None:
    metrics = Metrics()
    metrics.request_passed(PASSED)
    found = samples(metrics)
    assert found['passthrough_bytes_total{direction="request",upstream="gateway"}'] == 17
    assert found['passthrough_bytes_total{direction="response",upstream="gateway"}'] == 170


def test_lag_is_a_histogram() -> None:
    metrics = Metrics()
    metrics.loop_lagged(0.02)
    found = samples(metrics)
    assert (
        found['event_loop_lag_seconds_bucket{le="0.01"}'],
        found["event_loop_lag_seconds_count"],
    ) == (0, 1)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"status_code": 429}, "upstream_4xx"),
        ({"status_code": 503}, "upstream_5xx"),
        ({"status_code": 302}, "upstream_3xx"),
        ({"status_code": 999}, "upstream_other"),
        ({"status_code": 504, "code": "deadline_exceeded"}, "deadline_exceeded"),
    ],
)
def test_why_a_job_failed(change: dict[str, Any], outcome: str) -> None:
    metrics = Metrics()
    values = {name: getattr(FINISHED, name) for name in FINISHED.__struct_fields__}
    metrics.job_finished(events.JobFinished(**{**values, "status": JobStatus.FAILED, **change}))
    moved = f'jobs_finished_total{{endpoint="embeddings",outcome="{outcome}",upstream="gateway"}}'
    assert samples(metrics)[moved] == 1


def test_what_is_read_at_a_scrape() -> None:
    found = samples(Metrics())
    assert {
        'jobs{state="pending"}': 4,
        'jobs{state="processing"}': 3,
        "jobs_limit": 100,
        "store_up": 1,
        "store_results": 5,
        "store_bytes": 4096,
        "store_limit_bytes": 8192,
        'calls_in_flight{upstream="gateway"}': 3,
        'calls_limit{upstream="gateway"}': 64,
        "waiting_clients": 2,
        "passthrough_in_flight": 1,
        "draining": 0,
    }.items() <= found.items()
    assert found["process_resident_memory_bytes"] > 0


def test_a_store_that_does_not_answer_has_no_numbers() -> None:
    metrics = Metrics()
    samples(metrics)
    found = samples(metrics, READINGS._replace(fill=None))
    assert found["store_up"] == 0
    assert found["store_bytes"] != found["store_bytes"], "not a number"
    assert 'jobs{state="pending"}' not in found
    assert found["waiting_clients"] == 2


def test_an_upstream_that_was_removed_has_no_calls() -> None:
    metrics = Metrics()
    samples(metrics)
    found = samples(metrics, READINGS._replace(calls={"other": 1}, limits={"other": 2}))
    assert 'calls_in_flight{upstream="gateway"}' not in found
    assert found['calls_limit{upstream="other"}'] == 2


def test_each_has_a_registry_of_its_own() -> None:
    one, other = Metrics(), Metrics()
    one.relay_hop(events.RelayHop("embeddings"))
    assert 'relay_hops_total{endpoint="embeddings"}' not in samples(other)


def test_ten_thousand_hostile_clients_make_no_series() -> None:
    """What clients say is in the events, and in none of the labels."""
    metrics = Metrics()
    for name, event in HAPPENED.items():
        tell(metrics, name, event)
    before = set(samples(metrics))
    texts = {"job_id", "model", "method", "path", "request_id", "trace_id", "detail"}
    for number in range(10_000):
        text = f'{number}"}}\n# x\u2028{"m" * (number % 50)}'
        for name, event in HAPPENED.items():
            fields = {f: getattr(event, f) for f in event.__struct_fields__}
            hostile = {**fields, **dict.fromkeys(texts & set(fields), text)}
            tell(metrics, name, type(event)(**hostile))
    assert set(samples(metrics)) == before


def test_several_observers_are_told_in_their_order_and_only_of_what_they_know() -> None:
    seen: list[str] = []

    class One(Observer):
        def relay_hop(self, event: events.RelayHop) -> None:
            seen.append("one")

    class Two(Observer):
        def relay_hop(self, event: events.RelayHop) -> None:
            seen.append("two")

        def paused(self, event: events.Paused) -> None:
            seen.append("paused")

    both = events.Observers([One(), Two()])
    for name, event in HAPPENED.items():
        tell(both, name, event)
    assert seen == ["paused", "one", "two"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-1, 20)), max_size=50))
def test_instruments_say_what_those_of_the_library_do(values: list[tuple[str, float]]) -> None:
    """But for the time of their creation."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bounds = (0.005, 0.1, 1, 2.5, 10)
    count = Count("things", "Some.", ["kind"], registry=ours)
    spread = Distribution("sizes", "Some.", ["kind"], bounds, registry=ours)
    their_count = TheirCounter("things", "Some.", ["kind"], registry=theirs)
    their_spread = TheirHistogram("sizes", "Some.", ["kind"], registry=theirs, buckets=bounds)
    for kind, value in values:
        count.add((kind,), abs(value))
        their_count.labels(kind).inc(abs(value))
        spread.observe((kind,), value)
        their_spread.labels(kind).observe(value)
    lines = generate_latest(theirs).decode().splitlines()
    expected = [line for line in lines if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == expected
