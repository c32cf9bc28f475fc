"""The figures: what is measured, against what, and what it should come to.

A figure is data. The functions under it start servers, load one of them and say what came of it; they
raise :class:`~benchmarks.errors.Broken` if the load did not do what its figure is named after.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from typing import Final

from benchmarks import durable
from benchmarks.errors import Broken
from benchmarks.figure import Baseline, Figure
from benchmarks.growth import OPERATIONS, SIZES
from benchmarks.lab import Lab, Measurement, Sample
from benchmarks.load import Request
from benchmarks.requests import ANSWER_3_MB, ANSWER_30_KB, CONNECTIONS, GET, HEADERS, PASS, SUBMIT
from benchmarks.servers import UNLIMITED, parked
from benchmarks.slices import Wanted

__all__ = ["FIGURES"]


def _bare(status: int, request: Request, lab: Lab, answer_bytes: int) -> Measurement:
    """A handler that answers fixed bytes, as many as the subject did."""
    with lab.baseline("fixed", status=status, size_bytes=answer_bytes) as server:
        return (yield from lab.throughput(server, request, status=status))


def _submit(lab: Lab) -> Measurement:
    with parked() as upstream, lab.proxy(upstream) as server:
        sample = yield from lab.throughput(server, SUBMIT, status=202, connections=CONNECTIONS)
        server.stop().check(live=server.submitted, more=CONNECTIONS)
        return sample


def _poll_pending(lab: Lab) -> Measurement:
    with parked() as upstream, lab.proxy(upstream) as server:
        # Far more than are sent at once: the last one waits in the queue.
        job = json.loads(lab.ask(server, SUBMIT, status=202, times=1000).body)
        poll = Request("GET", f"{SUBMIT.path}/{job['id']}", headers=HEADERS)
        if b'"pending"' not in lab.ask(server, poll, status=202).body:
            raise Broken("the job is not pending")
        return (yield from lab.throughput(server, poll, status=202))


def _poll_completed(result: bytes, lab: Lab) -> Measurement:
    with lab.gateway(result) as upstream, lab.proxy(upstream.url) as server:
        poll = lab.finish_one(server, SUBMIT)
        if result not in lab.ask(server, poll, status=200).body:
            raise Broken("the envelope does not hold the result")
        return (yield from lab.throughput(server, poll, status=200))


def _whole_job(lab: Lab) -> Measurement:
    """Submissions, and the time until the last of their jobs is done."""
    with lab.gateway(ANSWER_30_KB) as upstream, lab.proxy(upstream.url) as server:
        submitted = lab.ask(server, SUBMIT, status=202, times=200)
        lab.finish_one(server, SUBMIT)
        before = server.submitted
        with lab.metered(server) as meter:
            done = yield Wanted((server,), SUBMIT, CONNECTIONS, len(submitted.body))
            ended = time.monotonic()
            poll = lab.finish_one(server, SUBMIT)
        seconds = done.seconds + time.monotonic() - ended
        jobs = server.submitted - before
        if ANSWER_30_KB not in lab.ask(server, poll, status=200).body:
            raise Broken("the envelope does not hold the result")
        # Stopping takes no time: what was in flight with the last job is the difference.
        kept = server.stop()
        if not 0 <= kept.live + kept.results - server.submitted <= CONNECTIONS or kept.live > 128:
            raise Broken(f"{server.submitted} jobs were submitted, and there are {kept}")
        return Sample(
            value=jobs / seconds,
            answer_bytes=len(submitted.body),
            cpu_us=meter.cpu_us(jobs),
            busy=meter.busy(seconds),
        )


def _bare_call(lab: Lab, answer_bytes: int) -> Measurement:
    with (
        lab.gateway(ANSWER_30_KB) as upstream,
        lab.baseline("call", upstream=upstream.url, size_bytes=answer_bytes) as server,
    ):
        return (yield from lab.throughput(server, SUBMIT, status=202))


def _pass_through(connections: int, lab: Lab) -> Measurement:
    with lab.gateway(ANSWER_30_KB) as upstream, lab.proxy(upstream.url) as server:
        return (yield from lab.throughput(server, PASS, status=200, connections=connections))


def _bare_stream(connections: int, lab: Lab, answer_bytes: int) -> Measurement:
    with lab.gateway(ANSWER_30_KB) as upstream, lab.baseline("stream", upstream=upstream.url) as server:
        return (yield from lab.throughput(server, PASS, status=200, connections=connections))


def _nginx_proxy(connections: int, lab: Lab, answer_bytes: int) -> Measurement:
    with lab.gateway(ANSWER_30_KB) as upstream, lab.nginx(upstream.url) as server:
        return (yield from lab.throughput(server, PASS, status=200, connections=connections))


def _pass_through_figure(connections: int, *, added_p50_goal_ms: float | None = None) -> Figure:
    return Figure(
        name=f"pass-{connections}",
        title=f"pass-through of 30 KB, {connections} connection{'s' if connections > 1 else ''}",
        unit="req/s",
        subject=partial(_pass_through, connections),
        baselines=(
            Baseline("minimal aiohttp streaming proxy", partial(_bare_stream, connections), goal=0.9),
            Baseline(
                "nginx proxy_pass",
                partial(_nginx_proxy, connections),
                added_p50_goal_ms=added_p50_goal_ms,
            ),
        ),
        saturates=connections > 1,
    )


def _memory(lab: Lab) -> Sample:
    """Growth of the process per result. One connection submits, so that hardly a job has to wait."""
    with lab.gateway(ANSWER_30_KB) as upstream, lab.proxy(upstream.url) as server:
        lab.ask(server, SUBMIT, status=202, times=500)
        lab.finish_one(server, SUBMIT)
        before, results_before = server.rss_bytes(), server.submitted
        with lab.metered(server) as meter:
            lab.load(Wanted((server,), SUBMIT, 1), seconds=2 * lab.seconds)
            lab.finish_one(server, SUBMIT)
        results = server.submitted - results_before
        grown = server.rss_bytes() - before
        if server.stop().results < server.submitted - CONNECTIONS:
            raise Broken("not all of the jobs have a result")
        return Sample(value=grown / results, cpu_us=meter.cpu_us(results))


def _own_bytes(lab: Lab, answer_bytes: int) -> Sample:
    return Sample(value=len(ANSWER_30_KB))


def _poll_beside(jobs_per_s: int, lab: Lab) -> Sample:
    """Polls of a job that is parked, while others bring 3 MB each. None of these: the idle proxy."""
    park = replace(SUBMIT, body=b'{"model":"parked","input":"x"}')
    with parked() as nobody, lab.gateway(ANSWER_3_MB) as upstream:
        upstreams = [
            {"name": "parked", "base_url": nobody, "models": ["parked"]},
            {"name": "gateway", "base_url": upstream.url},
        ]
        jobs = {"max_pending": UNLIMITED, "max_pending_per_credential": UNLIMITED, "result_ttl": "1s"}
        with lab.proxy(upstream.url, upstreams=upstreams, jobs=jobs) as server:
            job = json.loads(lab.ask(server, park, status=202).body)
            poll = Request("GET", f"{SUBMIT.path}/{job['id']}", headers=HEADERS)
            lab.ask(server, poll, status=202, times=200)
            lab.finish_one(server, SUBMIT)
            beside = SUBMIT if jobs_per_s else None
            sample = lab.pace(server, poll, status=202, beside=beside, jobs_per_s=jobs_per_s)
            lab.finish_one(server, SUBMIT)  # all that were submitted are done
            return sample


def _poll_idle(lab: Lab, answer_bytes: int) -> Sample:
    return _poll_beside(0, lab)


def _latency_figure(jobs_per_s: int, *, rounds: int) -> Figure:
    return Figure(
        name=f"latency-{jobs_per_s}",
        title=f"p99 of a poll beside {jobs_per_s} jobs/s of 3 MB",
        unit="µs",
        subject=partial(_poll_beside, jobs_per_s),
        baselines=(Baseline("p99 of a poll, idle", _poll_idle, goal=5.0),),
        lower_is_better=True,
        saturates=False,
        most_rounds=rounds,
    )


def _smallest(operation: str, lab: Lab, answer_bytes: int) -> Sample:
    return lab.growth(operation, SIZES[0])


def _growth_figure(operation: str, jobs: int) -> Figure:
    return Figure(
        name=f"growth-{operation}-{jobs}",
        title=f"{operation}, {jobs:,} jobs stored",
        unit="µs",
        subject=lambda lab: lab.growth(operation, jobs),
        baselines=(
            Baseline(f"with {SIZES[0]:,}", partial(_smallest, operation), goal=1.2, p99_goal=2.0),
        ),
        lower_is_better=True,
        saturates=False,
        most_rounds=1,
    )


FIGURES: Final = (
    Figure(
        "submit",
        "submit, 300-byte body, upstream parked",
        "req/s",
        _submit,
        (Baseline("bare aiohttp, reads the body", partial(_bare, 202, SUBMIT), goal=0.85),),
    ),
    *durable.DURABLE,
    Figure(
        "poll-pending",
        "poll of a pending job",
        "req/s",
        _poll_pending,
        (Baseline("bare aiohttp", partial(_bare, 202, GET), goal=0.85),),
    ),
    Figure(
        "poll-30kb",
        "poll of a 30 KB result",
        "req/s",
        partial(_poll_completed, ANSWER_30_KB),
        (Baseline("bare aiohttp", partial(_bare, 200, GET), goal=0.95),),
    ),
    Figure(
        "poll-3mb",
        "poll of a 3 MB result",
        "req/s",
        partial(_poll_completed, ANSWER_3_MB),
        (Baseline("bare aiohttp", partial(_bare, 200, GET), goal=0.9),),
    ),
    Figure(
        "whole-job",
        "whole job: submit, call of 30 KB, finish",
        "jobs/s",
        _whole_job,
        (Baseline("bare aiohttp and its client, no job", _bare_call, goal=0.75),),
    ),
    _pass_through_figure(1, added_p50_goal_ms=0.4),
    _pass_through_figure(64),
    Figure(
        "memory",
        "memory per 30 KB result",
        "bytes",
        _memory,
        (Baseline("the result's own bytes", _own_bytes, goal=1.1 + 2048 / len(ANSWER_30_KB)),),
        lower_is_better=True,
        saturates=False,
    ),
    *(_growth_figure(operation, jobs) for operation in OPERATIONS for jobs in SIZES[1:]),
    _latency_figure(50, rounds=1),
    _latency_figure(200, rounds=3),
    durable.SCALE,
)
