"""One attempt at a job: the call, its time limit, its span, and the way to stop it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from asyncproxy.core.errors import CallError, DeadlineExceeded, InternalError, UpstreamTimeout
from asyncproxy.core.events import CallEnded, JobStarted, Observer, status_class
from asyncproxy.core.jobs import Call, Job, UpstreamResponse, head_of
from asyncproxy.dispatch.workers import Worker
from asyncproxy.observe.tracing import ATTEMPT, ENDPOINT, JOB, MODEL, UPSTREAM, Span, Tracer
from asyncproxy.stores.base import Claim
from asyncproxy.upstream.client import Upstream
from asyncproxy.wire.trace_context import carried

__all__ = ["Attempt", "Attempts", "deadline_exceeded"]


class Attempt(NamedTuple):
    """How an attempt has ended, and the seconds that the job had waited and the call took."""

    outcome: UpstreamResponse | CallError
    queued_s: float
    call_s: float


class Attempts:
    """Makes the calls of jobs, and stops them.

    ``clock`` gives seconds since the epoch, ``monotonic`` measures.
    """

    def __init__(
        self,
        *,
        observer: Observer,
        tracer: Tracer,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._observer = observer
        self._tracer = tracer
        self._clock = clock
        self._monotonic = monotonic
        self._workers: dict[str, Worker] = {}  # job id → the worker that sends it
        self._stopped: set[str] = set()

    def stop(self, job_id: str) -> bool:
        """Stop the call of a job. False if none is in flight here."""
        worker = self._workers.get(job_id)
        if worker is None:
            return False
        if job_id not in self._stopped:  # a second cancellation would be taken for that of a shutdown
            self._stopped.add(job_id)
            worker.cancel()
        return True

    def was_stopped(self, job: Job, worker: Worker) -> bool:
        """Whether the cancellation that arrived is that of :meth:`stop`, and no other."""
        if job.id not in self._stopped:
            return False
        self._stopped.remove(job.id)
        return worker.uncancel() == 0

    async def make(
        self, claim: Claim, upstream: Upstream, worker: Worker, *, deadline_s: float
    ) -> Attempt:
        """Call the upstream for a claimed job. ``deadline_s`` is counted from its submission.

        An error of the call is returned, and not raised.
        """
        job = claim.job
        queued_s = max(0.0, self._clock() - job.created_at)
        started = self._monotonic()
        if not job.calls:
            self._observer.job_started(JobStarted(job.id, job.endpoint, job.upstream, queued_s))
            # A rounded creation may lie ahead, and no span may end before it begins.
            began = job.created_at if queued_s else None
            self._start_span("queue", job, started_at=began).end()
        span = self._start_span("attempt", job, outward=True)
        try:
            call = _traced(claim.call, span)
            outcome = await self._call(job.id, call, upstream, worker, deadline_s, queued_s)
        except BaseException as error:
            ended = "aborted" if isinstance(error, asyncio.CancelledError) else InternalError.code
            self._ended(job, ended, self._monotonic() - started)
            span.end(ended)
            raise
        call_s = self._monotonic() - started
        self._ended(job, _label(outcome), call_s)
        _end_span(span, outcome)
        return Attempt(outcome, queued_s, call_s)

    async def _call(
        self,
        job_id: str,
        call: Call,
        upstream: Upstream,
        worker: Worker,
        deadline_s: float,
        queued_s: float,
    ) -> UpstreamResponse | CallError:
        remaining_s = deadline_s - queued_s
        if remaining_s <= 0:
            return deadline_exceeded(deadline_s)
        self._workers[job_id] = worker
        try:
            return await upstream.call(call, timeout_s=min(upstream.total_s, remaining_s))
        except UpstreamTimeout as error:
            return error if upstream.total_s <= remaining_s else deadline_exceeded(deadline_s)
        except CallError as error:
            return error
        finally:
            del self._workers[job_id]

    def _start_span(
        self, name: str, job: Job, *, started_at: float | None = None, outward: bool = False
    ) -> Span:
        attributes = {
            JOB: job.id,
            ENDPOINT: job.endpoint,
            UPSTREAM: job.upstream,
            MODEL: job.model,
            ATTEMPT: job.calls + 1,
        }
        return self._tracer.start(
            name, job.traceparent, attributes, started_at=started_at, outward=outward
        )

    def _ended(self, job: Job, outcome: str, duration_s: float) -> None:
        event = CallEnded(job.id, job.endpoint, job.upstream, job.calls + 1, outcome, duration_s)
        self._observer.call_ended(event)


def deadline_exceeded(deadline_s: float) -> DeadlineExceeded:
    """The error of a job that was not done within ``deadline_s``."""
    return DeadlineExceeded(f"The job was not done {deadline_s:g} s after its submission.")


def _label(outcome: UpstreamResponse | CallError) -> str:
    """How a call ended, in one of a few words."""
    return status_class(outcome.status) if isinstance(outcome, UpstreamResponse) else outcome.code


def _traced(call: Call, span: Span) -> Call:
    """``call`` as a part of its span, if that is recorded."""
    if not span.traceparent:
        return call
    return msgspec.structs.replace(call, head=head_of(carried(call.headers, span.traceparent)))


def _end_span(span: Span, outcome: UpstreamResponse | CallError) -> None:
    if isinstance(outcome, CallError):
        span.end(outcome.code)
    else:
        span.end("" if 200 <= outcome.status < 300 else str(outcome.status), outcome.status)
