"""Takes jobs from the store, sends them, and records what came: the only place where a job ends.

A fixed number of workers per upstream is its concurrency. A worker waits for a job, never for a
backoff: a job that is to be tried again goes back to the store until its time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec

from asyncproxy.core.errors import (
    ApiError,
    CallError,
    DeadlineExceeded,
    IllegalTransition,
    InternalError,
    Interrupted,
    InvalidUpstreamResponse,
    ModelNotFound,
    StoreFull,
    StoreUnavailable,
    UpstreamTimeout,
)
from asyncproxy.core.events import (
    CallEnded,
    FellBack,
    JobFinished,
    JobStarted,
    Observer,
    Paused,
    Retried,
    status_class,
)
from asyncproxy.core.jobs import Call, Job, JobStatus, UpstreamResponse, head_of
from asyncproxy.dispatch import retry
from asyncproxy.dispatch.rate_limits import RateLimits
from asyncproxy.dispatch.workers import CallPolicy, Worker, WorkerPool, WorkerPools
from asyncproxy.loop.heavy_work import HEAVY_BYTES, HeavyWork
from asyncproxy.observe.tracing import ATTEMPT, ENDPOINT, JOB, MODEL, UPSTREAM, Span, Tracer
from asyncproxy.stores.base import Claim, Store, UnreadableCall
from asyncproxy.upstream.client import Upstream
from asyncproxy.wire import body_fields, credentials, envelope
from asyncproxy.wire.trace_context import carried, trace_id

__all__ = ["Dispatcher"]

logger = logging.getLogger(__name__)

# What a poll may be told to wait, in seconds: OpenAI SDKs ignore a Retry-After above.
_LONGEST_WAIT = 120

# After an error of our own, so that one that stays does not keep a core busy.
_PAUSE_AFTER_ERROR_S = 1.0

# Between two attempts to record what is to be recorded, while the store does not take it.
_FIRST_RETRY_S = 0.1
_LONGEST_RETRY_S = 5.0

# Jobs that housekeeping sees to at the same time.
_AT_ONCE = 100

# How much the last call weighs in the moving average of their durations.
_SMOOTHING = 0.1

T = TypeVar("T")


class Dispatcher:
    """Runs the jobs of a store.

    ``clock`` gives seconds since the epoch, ``monotonic`` paces, ``rng`` jitters. ``deadline_s`` is
    counted from the submission of a job, over all of its attempts. ``route`` names the upstream of a
    model, or raises :class:`ModelNotFound`: for jobs from a time when there were other upstreams.
    """

    def __init__(
        self,
        store: Store,
        upstreams: Iterable[tuple[Upstream, CallPolicy]],
        *,
        deadline_s: float,
        observer: Observer,
        route: Callable[[str], str],
        heavy_work: HeavyWork,
        tracer: Tracer | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._pools = WorkerPools(upstreams, self._turn)
        self._deadline_s = deadline_s
        self._observer = observer
        self._route = route
        self._tracer = tracer or Tracer()
        self._heavy_work = heavy_work
        self._clock = clock
        self._monotonic = monotonic
        self._rng = rng or random.Random()  # noqa: S311  jitter
        self._rate_limits = RateLimits()
        self._calls: dict[str, Worker] = {}  # job id → the worker that sends it
        self._aborted: set[str] = set()

    @property
    def draining(self) -> bool:
        """Whether no job is taken any more."""
        return self._pools.draining

    @asynccontextmanager
    async def running(self, *, grace_s: float) -> AsyncIterator[None]:
        """Work for the length of a ``with``; its end is a :meth:`drain`."""
        housekeeping = asyncio.create_task(self._keep_house(), name="asyncproxy-housekeeping")
        self._pools.start()
        try:
            yield
        finally:
            await self.drain(grace_s)
            housekeeping.cancel()
            await asyncio.gather(housekeeping, return_exceptions=True)

    def reconfigure(
        self, upstreams: Iterable[tuple[Upstream, CallPolicy]], *, deadline_s: float
    ) -> None:
        """Send by other policies, or to other upstreams, from now on.

        Calls in flight end where they are. Waiting jobs of an upstream that is gone find another one at
        the next :meth:`tidy`.
        """
        self._deadline_s = deadline_s
        self._pools.reconfigure(upstreams)

    async def drain(self, grace_s: float) -> None:
        """Claim nothing any more, and give the calls in flight ``grace_s`` to end and be recorded.

        What has not ended then is pending again, as if it had not been sent. May be called twice; a
        shorter grace in the second call ends the first.
        """
        await self._pools.drain(grace_s)
        # Those who wait for a call in flight have heard of its end by now; the others hear how it is.
        self._store.release_waiters()
        await self._pools.end()

    def abort(self, job: Job) -> None:
        """Stop the call of a job that was deleted from the store, if it is under way here."""
        if not self.lost(job.id):
            self._rate_limits.forget(job)

    def lost(self, job_id: str) -> bool:
        """Stop the call of a job that is not ours any more. False if none is under way here."""
        worker = self._calls.get(job_id)
        if worker is None:
            return False
        if job_id in self._aborted:
            return True  # two say so; a second cancellation would be taken for that of a stop
        self._aborted.add(job_id)
        worker.cancel()
        return True

    @property
    def calls(self) -> Mapping[str, int]:
        """Calls in flight, by upstream."""
        return self._pools.calls

    @property
    def concurrency(self) -> Mapping[str, int]:
        """As many calls as may be in flight, by upstream."""
        return self._pools.concurrency

    def retry_after_s(self, job: Job) -> int:
        """Whole seconds after which a poll of ``job`` is likely to find it done. 1 to 120."""
        try:
            pool = self._pools[job.upstream]
        except KeyError:
            return 1  # housekeeping sees to it
        wait = pool.mean_call_s
        place = self._store.place(job) if job.status is JobStatus.PENDING else None
        if place is not None:
            wait *= 1 + place.ahead / pool.policy.concurrency
            if place.not_before:
                wait = max(wait, place.not_before - self._monotonic() + pool.mean_call_s)
        if wait <= 1:
            return 1
        return math.ceil(wait) if wait < _LONGEST_WAIT else _LONGEST_WAIT

    async def _turn(self, pool: WorkerPool, worker: Worker) -> None:
        """Take the next job of a pool, and see to its end."""
        try:
            with pool.waiting(worker):
                claim = await self._store.claim(pool.upstream.name)
        except UnreadableCall as error:
            logger.error("job %s: its request cannot be read with our keys", error.job.id)  # noqa: TRY400
            await self._interrupt(error.job, "The request of this job cannot be read any more.")
            return
        except Exception:
            logger.exception("no job can be claimed: an error inside the proxy")
            await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
            return
        try:
            await self._run(claim, pool, worker)
        except Exception:
            logger.exception("job %s: an error inside the proxy", claim.job.id)
            await self._interrupt(claim.job, "An error inside the proxy ended this job.")

    async def _interrupt(self, job: Job, why: str) -> None:
        """End a job that met an error of ours. Whatever happens, it must not stay processing.

        Never raises: the worker that calls it goes on, or there would be one less for good.
        """
        delay_s = _PAUSE_AFTER_ERROR_S
        while True:
            try:
                await self._finish(job, Interrupted(why))
            except IllegalTransition:
                return  # it is pending again, or done: the error came later
            except Exception:
                logger.exception("job %s: its end cannot be recorded, it is tried again", job.id)
            else:
                return
            try:
                await self._release(job, attempts=job.attempts, delay_s=delay_s)
            except IllegalTransition:
                return
            except Exception:
                logger.exception("job %s: it cannot be given back either", job.id)
            else:
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_WAIT)

    async def _run(self, claim: Claim, pool: WorkerPool, worker: Worker) -> None:
        """One attempt at a claimed job: it is finished or pending again at the end."""
        job = claim.job
        queued_s = max(0.0, self._clock() - job.created_at)
        started = self._monotonic()
        self._rate_limits.started(job)
        if job.claims == 1:
            self._observer.job_started(JobStarted(job.id, job.endpoint, job.upstream, queued_s))
            # A rounded creation may lie ahead, and no span may end before it begins.
            began = job.created_at if queued_s else None
            self._start_span("queue", job, started_at=began).end()
        span = self._start_span("attempt", job, outward=True)
        pool.calls += 1
        try:
            traced = _traced(claim, span)
            outcome = await self._send(traced, pool.upstream, worker, self._deadline_s - queued_s)
        except BaseException as error:
            aborted = isinstance(error, asyncio.CancelledError)
            ended = "aborted" if aborted else InternalError.code
            self._call_ended(job, ended, self._monotonic() - started)
            span.end(ended)
            self._rate_limits.ended(job, progress=False)
            if not aborted:
                raise
            if self._was_aborted(job, worker):
                self._rate_limits.forget(job)
                return
            await self._give_back(job)
            raise
        finally:
            pool.calls -= 1
        call_s = self._monotonic() - started
        self._call_ended(job, _outcome(outcome), call_s)
        _end_span(span, outcome)
        pool.mean_call_s += _SMOOTHING * (call_s - pool.mean_call_s)
        if not (await self._try_again(job, pool, outcome) or await self._fall_back(claim, outcome)):
            said = _said(outcome, claim.call, pool.policy.hidden)
            await self._finish(job, outcome, queued_s=queued_s, call_s=call_s, said=said)

    def _start_span(
        self, name: str, job: Job, *, started_at: float | None = None, outward: bool = False
    ) -> Span:
        attributes = {
            JOB: job.id,
            ENDPOINT: job.endpoint,
            UPSTREAM: job.upstream,
            MODEL: job.model,
            ATTEMPT: job.attempts + 1,
        }
        return self._tracer.start(
            name, job.traceparent, attributes, started_at=started_at, outward=outward
        )

    def _call_ended(self, job: Job, outcome: str, duration_s: float) -> None:
        attempt = job.attempts + 1
        self._observer.call_ended(
            CallEnded(job.id, job.endpoint, job.upstream, attempt, outcome, duration_s)
        )

    async def _send(
        self, claim: Claim, upstream: Upstream, worker: Worker, remaining_s: float
    ) -> UpstreamResponse | CallError:
        job, call = claim
        if remaining_s <= 0:
            return self._deadline_exceeded()
        self._calls[job.id] = worker
        try:
            return await upstream.call(call, timeout_s=min(upstream.total_s, remaining_s))
        except UpstreamTimeout as error:
            return error if upstream.total_s <= remaining_s else self._deadline_exceeded()
        except CallError as error:
            return error
        finally:
            del self._calls[job.id]

    def _was_aborted(self, job: Job, worker: Worker) -> bool:
        """Whether the cancellation that arrived is that of :meth:`abort`, and no other."""
        if job.id not in self._aborted:
            return False
        self._aborted.remove(job.id)
        return worker.uncancel() == 0

    async def _try_again(
        self, job: Job, pool: WorkerPool, outcome: UpstreamResponse | CallError
    ) -> bool:
        """Make the job pending again, if another attempt is worth it."""
        limited = isinstance(outcome, UpstreamResponse) and outcome.status in retry.RATE_LIMITED
        failures = self._rate_limits.refused(job) if limited else job.attempts + 1
        self._rate_limits.ended(job, progress=isinstance(outcome, UpstreamResponse) and not limited)
        if not retry.is_retryable(outcome.status if isinstance(outcome, UpstreamResponse) else outcome):
            return False
        policy = pool.policy
        asked_s = self._asked_s(outcome)
        delay_s = asked_s or retry.backoff(
            failures, base_s=policy.backoff_s, max_s=policy.max_backoff_s, rng=self._rng
        )
        # Past the deadline the upstream's own words say more than that the deadline has passed.
        too_late = bool(asked_s) and self._clock() + delay_s >= job.created_at + self._deadline_s
        if failures >= policy.attempts or too_late:
            if limited:
                self._observer.paused(Paused(job.upstream, delay_s))
                await self._insist(job, lambda: self._store.pause(job.lane, delay_s))
            return False
        attempts = job.attempts if limited else failures
        reason = str(outcome.status) if isinstance(outcome, UpstreamResponse) else outcome.code
        self._observer.retried(Retried(job.id, job.upstream, reason, delay_s))
        if limited:
            self._observer.paused(Paused(job.upstream, delay_s))
        await self._release(job, attempts=attempts, delay_s=delay_s, whole_lane=limited)
        return True

    async def _fall_back(self, claim: Claim, outcome: UpstreamResponse | CallError) -> bool:
        """Make the job pending again for the next of its models, if this one has failed for good."""
        job, call = claim
        if not job.fallbacks or job.fallback_index is None:
            return False
        ended = outcome.status if isinstance(outcome, UpstreamResponse) else outcome
        if ended != 404 and not retry.is_retryable(ended):
            return False
        following, rest = job.fallbacks[0], job.fallbacks[1:]
        body = await self._heavy_work.run(body_fields.with_model(call.body, following.model))
        # It is another request: an upstream that honours the key would answer it as the first.
        headers = [
            (name, f"{value}-{job.fallback_index + 1}" if name.lower() == "idempotency-key" else value)
            for name, value in call.headers
        ]
        self._rate_limits.forget(job)
        self._observer.fell_back(FellBack(job.id, job.upstream))
        job = msgspec.structs.replace(
            job,
            upstream=following.upstream,
            model=following.model,
            fallbacks=rest,
            fallback_index=job.fallback_index + 1,
        )
        call = msgspec.structs.replace(call, body=body, head=head_of(headers))
        await self._release(job, attempts=0, call=call)
        return True

    def _asked_s(self, outcome: UpstreamResponse | CallError) -> float | None:
        """How long the upstream asks us to wait, if it does."""
        if not isinstance(outcome, UpstreamResponse):
            return None
        return retry.retry_after(outcome.header(b"retry-after"), now=self._clock())

    async def _finish(
        self,
        job: Job,
        outcome: UpstreamResponse | ApiError,
        *,
        queued_s: float | None = None,
        call_s: float = 0.0,
        said: str = "",
    ) -> None:
        """Record the outcome of a claimed job. Every job that ends, ends here.

        Without ``queued_s`` it ends without a call, and has waited all the time. ``said`` is what the
        upstream said of a failure, for the log.
        """
        now = round(self._clock(), 3)
        error = outcome if isinstance(outcome, ApiError) else None
        if isinstance(outcome, UpstreamResponse):
            if outcome.size >= HEAVY_BYTES:
                await self._heavy_work.next()  # to check it, if that is not done, and to write it down
            try:
                finished = envelope.finished(job, outcome, now=now)
            except InvalidUpstreamResponse as invalid:
                error = invalid
        if error is not None:
            finished = envelope.failed(job, error, now=now)
        self._rate_limits.forget(job)
        if await self._insist(job, lambda: self._store.finish(job, finished)):
            total_s = max(0.0, now - job.created_at)
            self._observer.job_finished(
                JobFinished(
                    job_id=job.id,
                    endpoint=job.endpoint,
                    upstream=job.upstream,
                    model=job.model,
                    status=finished.status,
                    status_code=finished.status_code,
                    code=error.code if error else "",
                    attempts=job.attempts + 1,
                    total_s=total_s,
                    call_s=call_s,
                    result_bytes=outcome.size if isinstance(outcome, UpstreamResponse) else 0,
                    detail=(error.detail or error.message) if error else said,
                    queued_s=total_s if queued_s is None else queued_s,
                    request_id=job.request_id or job.id,
                    trace_id=trace_id(job.traceparent),
                )
            )

    async def _release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        call: Call | None = None,
    ) -> None:
        await self._insist(
            job,
            lambda: self._store.release(
                job, attempts=attempts, delay_s=delay_s, whole_lane=whole_lane, call=call
            ),
        )

    async def _give_back(self, job: Job) -> None:
        """Release a job at the end of this process, which does not wait for a store that is away."""
        try:
            await self._store.release(job, attempts=job.attempts)
        except (StoreUnavailable, StoreFull) as error:
            logger.warning("job %s cannot be given back now: %s", job.id, error.detail or error)

    async def _insist(self, job: Job, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step of a claimed job, however long the store is away: what was done is kept here.

        The outcome of a call was paid for. Each worker holds one at the most, so it is bounded.
        """
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                return await step()
            except (StoreUnavailable, StoreFull) as error:
                if delay_s == _FIRST_RETRY_S:
                    logger.warning("job %s waits for the store: %s", job.id, error.detail or error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_RETRY_S)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                await self.tidy()
            except (StoreUnavailable, StoreFull) as error:
                logger.debug("housekeeping: %s", error.detail or error)  # the store has said so
            except Exception:
                logger.exception("housekeeping: an error inside the proxy")

    async def tidy(self) -> None:
        """Give back what has expired, and fail the jobs that waited past their deadline."""
        await self._store.tick()
        overdue = await self._store.claim_overdue(self._clock() - self._deadline_s)
        await self._see_to(overdue, lambda job: self._finish(job, self._deadline_exceeded()))
        await self._see_to(await self._store.claim_orphans(self._pools), self._find_a_home)

    async def _see_to(self, claimed: Sequence[Job], step: Callable[[Job], Awaitable[None]]) -> None:
        """Take a step for each of the jobs. An error with one is not to leave the others claimed."""

        async def guarded(job: Job) -> None:
            try:
                await step(job)
            except Exception:
                logger.exception("job %s: an error inside the proxy", job.id)
                await self._interrupt(job, "An error inside the proxy ended this job.")

        for start in range(0, len(claimed), _AT_ONCE):  # some at once: they share what a commit costs
            await asyncio.gather(*map(guarded, claimed[start : start + _AT_ONCE]))

    async def _find_a_home(self, job: Job) -> None:
        """See to a job whose upstream there is no more: its model says where it goes now."""
        try:
            upstream = self._route(job.model)
        except ModelNotFound as error:
            await self._finish(job, error)
            return
        moved = msgspec.structs.replace(job, upstream=upstream)
        await self._release(moved, attempts=job.attempts)

    def _deadline_exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"The job was not done {self._deadline_s:g} s after its submission.")


def _outcome(outcome: UpstreamResponse | CallError) -> str:
    """How a call ended, in one of a few words."""
    return status_class(outcome.status) if isinstance(outcome, UpstreamResponse) else outcome.code


def _traced(claim: Claim, span: Span) -> Claim:
    """``claim`` with a call that names its span, if that is recorded."""
    if not span.traceparent:
        return claim
    head = head_of(carried(claim.call.headers, span.traceparent))
    return Claim(claim.job, msgspec.structs.replace(claim.call, head=head))


def _end_span(span: Span, outcome: UpstreamResponse | CallError) -> None:
    if isinstance(outcome, CallError):
        span.end(outcome.code)
    else:
        span.end("" if 200 <= outcome.status < 300 else str(outcome.status), outcome.status)


def _said(outcome: UpstreamResponse | CallError, call: Call, hidden: Collection[str]) -> str:
    """What the upstream says of a failure, without the credentials that it was sent."""
    if not isinstance(outcome, UpstreamResponse) or 200 <= outcome.status < 300:
        return ""
    query = call.target.partition("?")[2]
    return credentials.masked(
        envelope.message_of(outcome), credentials.secrets(call.headers, query).union(hidden)
    )
