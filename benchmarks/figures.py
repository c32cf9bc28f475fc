"""The figures: what is measured, against what, and what it should come to.

A figure is data. The functions under it start servers, load one of them and say what came of it; they
raise :class:`~benchmarks.errors.Broken` if the load did not do what its figure is named after.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from benchmarks.errors import Broken
from benchmarks.growth import OPERATIONS, SIZES
from benchmarks.lab import Lab, Sample
from benchmarks.load import Request
from benchmarks.servers import UNLIMITED, Server, parked

__all__ = ["FIGURES", "Baseline", "Figure"]

_KB: Final = 1000

_HEADERS: Final = {"Content-Type": "application/json", "Authorization": "Bearer benchmark"}

_SUBMIT: Final = Request(
    "POST",
    "/v1/async/embeddings",
    json.dumps({"model": "text-embedding-3-small", "input": "The quick brown fox. " * 12}).encode(),
    _HEADERS,
)
_GET: Final = Request("GET", f"{_SUBMIT.path}/00000000-0000-4000-8000-000000000000", headers=_HEADERS)
_PASS: Final = Request("POST", "/v1/embeddings", _SUBMIT.body, _HEADERS)

_CONNECTIONS: Final = 64


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a figure is compared with. ``run`` gets the subject's sample, to answer as much as it did.

    ``goal`` is the ratio that the subject should reach, ``added_p50_goal_ms`` what it may add to
    the median latency, ``p99_goal`` how many times the baseline's its 99th percentile may be. None: it
    is only reported.
    """

    name: str
    run: Callable[[Lab, Sample], Sample]
    goal: float | None = None
    added_p50_goal_ms: float | None = None
    p99_goal: float | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table or more: a subject, and each of its baselines.

    ``saturates``: the load is meant to keep the server's core busy all the time. ``most_rounds`` is
    less than what is asked for where one measurement takes long, and is steady.
    """

    name: str
    title: str
    unit: str
    subject: Callable[[Lab], Sample]
    baselines: tuple[Baseline, ...]
    lower_is_better: bool = False
    saturates: bool = True
    most_rounds: int = 99


def _embeddings(size_bytes: int) -> bytes:
    """The answer of an embeddings API, in exactly so many bytes."""
    head, tail = b'{"object":"list","model":"m","data":[{"index":0,"embedding":[', b"0.5]}]}"
    number = b"-0.012345678,"
    numbers = number * ((size_bytes - len(head) - len(tail)) // len(number))
    return head + numbers + b" " * (size_bytes - len(head) - len(numbers) - len(tail)) + tail


_30_KB: Final = _embeddings(30 * _KB)
_3_MB: Final = _embeddings(3000 * _KB)


def _bare(status: int, request: Request, lab: Lab, like: Sample) -> Sample:
    """A handler that answers fixed bytes, as many as the subject did."""
    with lab.baseline("fixed", status=status, size_bytes=like.answer_bytes) as server:
        return lab.throughput(server, request, status=status)


def _check_kept(server: Server, *, live: int, results: int, connections: int) -> None:
    """Stop the proxy and see that every job that was answered 202 is there.

    wrk ends with a request under way on each connection, which may have become a job as well.
    """
    kept = server.stop()
    missing = max(live - kept.live, results - kept.results)
    surplus = kept.live + kept.results - live - results
    if missing > 0 or surplus > connections:
        raise Broken(f"{live} live jobs and {results} results were expected, not {kept}")


def _submit(lab: Lab) -> Sample:
    with parked() as upstream, lab.proxy(upstream) as server:
        sample = lab.throughput(server, _SUBMIT, status=202, connections=_CONNECTIONS)
        _check_kept(server, live=server.submitted, results=0, connections=_CONNECTIONS)
        return sample


def _poll_pending(lab: Lab) -> Sample:
    with parked() as upstream, lab.proxy(upstream) as server:
        # Far more than are sent at once: the last one waits in the queue.
        job = json.loads(lab.ask(server, _SUBMIT, status=202, times=1000).body)
        poll = Request("GET", f"{_SUBMIT.path}/{job['id']}", headers=_HEADERS)
        if b'"pending"' not in lab.ask(server, poll, status=202).body:
            raise Broken("the job is not pending")
        return lab.throughput(server, poll, status=202)


def _poll_completed(result: bytes, lab: Lab) -> Sample:
    with lab.gateway(result) as upstream, lab.proxy(upstream.url) as server:
        poll = lab.finish_one(server, _SUBMIT)
        if result not in lab.ask(server, poll, status=200).body:
            raise Broken("the envelope does not hold the result")
        return lab.throughput(server, poll, status=200)


def _whole_job(lab: Lab) -> Sample:
    """Submissions, and the time until the last of their jobs is done."""
    with lab.gateway(_30_KB) as upstream, lab.proxy(upstream.url) as server:
        submitted = lab.ask(server, _SUBMIT, status=202, times=200)
        lab.finish_one(server, _SUBMIT)
        before = server.submitted
        with lab.metered(server) as meter:
            lab.wrk(server, _SUBMIT, connections=_CONNECTIONS)
            poll = lab.finish_one(server, _SUBMIT)
        jobs = server.submitted - before
        if _30_KB not in lab.ask(server, poll, status=200).body:
            raise Broken("the envelope does not hold the result")
        # Stopping takes no time: what was in flight with the last job is the difference.
        kept = server.stop()
        if not 0 <= kept.live + kept.results - server.submitted <= _CONNECTIONS or kept.live > 128:
            raise Broken(f"{server.submitted} jobs were submitted, and there are {kept}")
        return Sample(
            value=jobs / meter.wall_s,
            answer_bytes=len(submitted.body),
            cpu_us=meter.cpu_us(jobs),
            busy=meter.busy,
        )


def _bare_call(lab: Lab, like: Sample) -> Sample:
    with (
        lab.gateway(_30_KB) as upstream,
        lab.baseline("call", upstream=upstream.url, size_bytes=like.answer_bytes) as server,
    ):
        return lab.throughput(server, _SUBMIT, status=202)


def _pass_through(connections: int, lab: Lab) -> Sample:
    with lab.gateway(_30_KB) as upstream, lab.proxy(upstream.url) as server:
        return lab.throughput(server, _PASS, status=200, connections=connections)


def _bare_stream(connections: int, lab: Lab, like: Sample) -> Sample:
    with lab.gateway(_30_KB) as upstream, lab.baseline("stream", upstream=upstream.url) as server:
        return lab.throughput(server, _PASS, status=200, connections=connections)


def _nginx_proxy(connections: int, lab: Lab, like: Sample) -> Sample:
    with lab.gateway(_30_KB) as upstream, lab.nginx(upstream.url) as server:
        return lab.throughput(server, _PASS, status=200, connections=connections)


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
    with lab.gateway(_30_KB) as upstream, lab.proxy(upstream.url) as server:
        lab.ask(server, _SUBMIT, status=202, times=500)
        lab.finish_one(server, _SUBMIT)
        before, results_before = server.rss_bytes(), server.submitted
        with lab.metered(server) as meter:
            lab.wrk(server, _SUBMIT, connections=1, seconds=2 * lab.seconds)
            lab.finish_one(server, _SUBMIT)
        results = server.submitted - results_before
        grown = server.rss_bytes() - before
        if server.stop().results < server.submitted - _CONNECTIONS:
            raise Broken("not all of the jobs have a result")
        return Sample(value=grown / results, cpu_us=meter.cpu_us(results), busy=meter.busy)


def _own_bytes(lab: Lab, like: Sample) -> Sample:
    return Sample(value=len(_30_KB))


def _poll_beside(jobs_per_s: int, lab: Lab) -> Sample:
    """Polls of a job that is parked, while others bring 3 MB each. None of these: the idle proxy."""
    park = replace(_SUBMIT, body=b'{"model":"parked","input":"x"}')
    with parked() as nobody, lab.gateway(_3_MB) as upstream:
        upstreams = [
            {"name": "parked", "base_url": nobody, "models": ["parked"]},
            {"name": "gateway", "base_url": upstream.url},
        ]
        jobs = {"max_pending": UNLIMITED, "max_pending_per_credential": UNLIMITED, "result_ttl": "1s"}
        with lab.proxy(upstream.url, upstreams=upstreams, jobs=jobs) as server:
            job = json.loads(lab.ask(server, park, status=202).body)
            poll = Request("GET", f"{_SUBMIT.path}/{job['id']}", headers=_HEADERS)
            lab.ask(server, poll, status=202, times=200)
            lab.finish_one(server, _SUBMIT)
            beside = _SUBMIT if jobs_per_s else None
            sample = lab.pace(server, poll, status=202, beside=beside, jobs_per_s=jobs_per_s)
            lab.finish_one(server, _SUBMIT)  # all that were submitted are done
            return sample


def _poll_idle(lab: Lab, like: Sample) -> Sample:
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


def _smallest(operation: str, lab: Lab, like: Sample) -> Sample:
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
        (Baseline("bare aiohttp, reads the body", partial(_bare, 202, _SUBMIT), goal=0.85),),
    ),
    Figure(
        "poll-pending",
        "poll of a pending job",
        "req/s",
        _poll_pending,
        (Baseline("bare aiohttp", partial(_bare, 202, _GET), goal=0.85),),
    ),
    Figure(
        "poll-30kb",
        "poll of a 30 KB result",
        "req/s",
        partial(_poll_completed, _30_KB),
        (Baseline("bare aiohttp", partial(_bare, 200, _GET), goal=0.95),),
    ),
    Figure(
        "poll-3mb",
        "poll of a 3 MB result",
        "req/s",
        partial(_poll_completed, _3_MB),
        (Baseline("bare aiohttp", partial(_bare, 200, _GET), goal=0.9),),
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
        (Baseline("the result's own bytes", _own_bytes, goal=1.1 + 2048 / len(_30_KB)),),
        lower_is_better=True,
        saturates=False,
    ),
    *(_growth_figure(operation, jobs) for operation in OPERATIONS for jobs in SIZES[1:]),
    _latency_figure(50, rounds=3),
    _latency_figure(200, rounds=1),
)
