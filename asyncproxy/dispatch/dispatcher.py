"""Takes jobs from the store, sends them, and carries out what the verdict on each call says.

A fixed number of workers per upstream is its concurrency. A worker waits for a job, never for a
backoff: a job that is to be tried again goes back to the store until its time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from asyncproxy.core.events import FellBack, Observer, Paused, Retried
from asyncproxy.core.jobs import Call, Job, JobStatus, UpstreamResponse, head_of
from asyncproxy.dispatch.attempts import Attempt, Attempts
from asyncproxy.dispatch.gate import Gate, Passage
from asyncproxy.dispatch.housekeeping import Housekeeping
from asyncproxy.dispatch.recorder import PAUSE_AFTER_ERROR_S, LastCall, Recorder
from asyncproxy.dispatch.retry import Ending, asked_wait
from asyncproxy.dispatch.verdict import Again, CallPolicy, NextModel, judge
from asyncproxy.dispatch.workers import Worker, WorkerPool, WorkerPools
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.observe.tracing import Tracer
from asyncproxy.stores.base import Claim, Store, UnreadableCall
from asyncproxy.upstream.client import Upstream
from asyncproxy.wire import body_fields

__all__ = ["Dispatcher"]

logger = logging.getLogger(__name__)

# What a poll may be told to wait, in seconds: OpenAI SDKs ignore a Retry-After above.
_LONGEST_WAIT: Final = 120

# How much the last call weighs in the moving average of their durations.
_SMOOTHING: Final = 0.1


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
        self._observer = observer
        self._clock = clock
        self._monotonic = monotonic
        self._rng = rng or random.Random()  # noqa: S311  jitter
        self._deadline_s = deadline_s
        self._pools = WorkerPools(upstreams, self._turn, self._new_gate, monotonic)
        self._heavy_work = heavy_work
        self._attempts = Attempts(
            observer=observer, tracer=tracer or Tracer(), clock=clock, monotonic=monotonic
        )
        self._recorder = Recorder(store, observer=observer, heavy_work=heavy_work, clock=clock)
        self._housekeeping = Housekeeping(
            store,
            self._pools,
            self._recorder,
            deadline_s=deadline_s,
            route=route,
            observer=observer,
            clock=clock,
        )
        self.tidy = self._housekeeping.tidy

    def _new_gate(self, policy: CallPolicy) -> Gate:
        return Gate(
            policy,
            clock=self._clock,
            monotonic=self._monotonic,
            rng=self._rng,
            allow=self._store.allow,
        )

    @property
    def draining(self) -> bool:
        """Whether no job is taken any more."""
        return self._pools.draining

    @asynccontextmanager
    async def running(self, *, grace_s: float) -> AsyncIterator[None]:
        """Work for the length of a ``with``; its end is a :meth:`drain`."""
        housekeeping = asyncio.create_task(self._housekeeping.run(), name="asyncproxy-housekeeping")
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
        self._deadline_s = self._housekeeping.deadline_s = deadline_s
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

    def abort(self, job_id: str) -> bool:
        """Stop the call of a job that was deleted, or that another process has claimed.

        False if no call of it is in flight here.
        """
        return self._attempts.stop(job_id)

    @property
    def calls(self) -> Mapping[str, int]:
        """Calls in flight, by upstream."""
        return self._pools.calls

    @property
    def limits(self) -> Mapping[str, int]:
        """As many calls as may be in flight now, by upstream:

        its concurrency, or less after an outage.
        """
        return self._pools.limits

    @property
    def gates(self) -> Mapping[str, Gate]:
        """The gate of each upstream."""
        return {name: pool.gate for name, pool in self._pools.items()}

    @property
    def away(self) -> Mapping[str, float]:
        """For how many seconds each upstream has been away. 0: it is there."""
        return {name: pool.gate.away_s for name, pool in self._pools.items()}

    def retry_after_s(self, job: Job) -> int:
        """Whole seconds after which a poll of ``job`` is likely to find it done. 1 to 120."""
        pool = self._pools.get(job.upstream)
        # Without a pool another process sends the job, or housekeeping moves it to another upstream.
        mean_s = 0.0 if pool is None else pool.mean_call_s
        wait = mean_s
        position = self._store.position(job) if job.status is JobStatus.PENDING else None
        if position is not None:
            if pool is not None:
                wait *= 1 + position.ahead / pool.gate.outage.limit
            if position.not_before:
                wait = max(wait, position.not_before - self._monotonic() + mean_s)
        wait += self.back_after_s(job.upstream)
        if wait <= 1:
            return 1
        return math.ceil(wait) if wait < _LONGEST_WAIT else _LONGEST_WAIT

    def back_after_s(self, upstream: str) -> float:
        """Seconds after which an upstream is likely to be back, 120 at most. 0: it is not away.

        Nobody knows when it is back. As long again as it has been away is a guess that fits a restart
        and a long outage alike.
        """
        pool = self._pools.get(upstream)
        return 0.0 if pool is None else min(pool.gate.away_s, _LONGEST_WAIT)

    async def _turn(self, pool: WorkerPool, worker: Worker, epoch: int) -> None:
        """Take the next job of a pool, and see to its end."""
        try:
            with pool.awaiting_claim(worker):
                claim = await self._store.claim(pool.upstream.name)
        except asyncio.CancelledError:
            if pool.was_recalled(worker):
                return
            raise
        except UnreadableCall as error:
            logger.error("job %s: its request cannot be read with our keys", error.job.id)  # noqa: TRY400
            await self._recorder.interrupt(
                error.job, "The request of this job cannot be read any more."
            )
            return
        except Exception:
            logger.exception("no job can be claimed: an error inside the proxy")
            await asyncio.sleep(PAUSE_AFTER_ERROR_S)
            return
        try:
            await self._run(claim, pool, worker, epoch)
        except Exception:
            logger.exception("job %s: an error inside the proxy", claim.job.id)
            await self._recorder.interrupt(claim.job, "An error inside the proxy ended this job.")

    async def _run(self, claim: Claim, pool: WorkerPool, worker: Worker, epoch: int) -> None:
        """One attempt at a claimed job: it is finished or pending again at the end."""
        job, gate = claim.job, pool.gate
        if not gate.may_begin(job):
            await self._recorder.release(job, delay_s=pool.policy.backoff_s)
            return
        passage = gate.begin(job, epoch)
        await self._call(claim, pool, worker, passage)

    async def _call(self, claim: Claim, pool: WorkerPool, worker: Worker, passage: Passage) -> None:
        job, gate = claim.job, pool.gate
        pool.calls += 1
        try:
            attempt = await self._attempts.make(
                claim, pool.upstream, worker, deadline_s=self._deadline_s
            )
        except BaseException as error:
            gate.end(passage, job, None, None)
            gate.leave(passage)
            if not isinstance(error, asyncio.CancelledError):
                raise
            if self._attempts.was_stopped(job, worker):
                return
            await self._recorder.give_back(job)
            raise
        finally:
            pool.calls -= 1
        pool.mean_call_s += _SMOOTHING * (attempt.call_s - pool.mean_call_s)
        asked_s = asked_wait(attempt.outcome, now=self._clock())
        was_away = gate.is_away
        ending, wait_s = gate.end(passage, job, attempt.outcome, asked_s)
        if gate.is_away and not was_away:
            pool.recall()
        elif was_away:
            pool.notify()
        pauses = bool(wait_s or asked_s)
        if not pauses:
            gate.leave(passage)
        try:
            await self._carry_out(claim, pool, attempt, ending, asked_s=asked_s, wait_s=wait_s)
        finally:
            if pauses:
                gate.leave(passage)

    async def _carry_out(
        self,
        claim: Claim,
        pool: WorkerPool,
        attempt: Attempt,
        ending: Ending,
        *,
        asked_s: float | None,
        wait_s: float,
    ) -> None:
        """Judge how a call has ended, and do what the verdict says."""
        outcome = attempt.outcome
        # A job whose deadline had passed before was not sent.
        last_call = None
        if attempt.queued_s < self._deadline_s:
            last_call = LastCall(claim.call, attempt.queued_s, attempt.call_s, pool.policy.hidden)
        job = msgspec.structs.replace(claim.job, calls=claim.job.calls + (last_call is not None))
        verdict = judge(
            job,
            outcome,
            ending,
            pool.policy,
            asked_s=asked_s,
            lane_wait_s=wait_s,
            now=self._clock(),
            deadline_at=job.created_at + self._deadline_s,
            rng=self._rng,
        )
        lane_pause_s = 0.0
        if ending is Ending.RATE_LIMITED or (wait_s and not pool.gate.is_away):
            lane_pause_s = max(wait_s, asked_s or 0.0)
        if lane_pause_s and ending in (Ending.AWAY, Ending.RATE_LIMITED):
            self._observer.paused(Paused(job.upstream, lane_pause_s))
        match verdict:
            case Again(again, delay_s):
                reason = str(outcome.status) if isinstance(outcome, UpstreamResponse) else outcome.code
                self._observer.retried(Retried(job.id, job.upstream, reason, delay_s))
                await self._recorder.release(again, delay_s=delay_s, whole_lane=bool(lane_pause_s))
                if (other_first_s := pool.gate.other_lanes_first_s(outcome, ending)) > 0:
                    await self._recorder.pause(job, job.lane, other_first_s)
                return
            case NextModel():
                self._observer.fell_back(FellBack(job.id, job.upstream))
                body = body_fields.with_model(claim.call.body, job.fallbacks[0].model)
                following, call = _with_next_model(job, claim.call, await self._heavy_work.run(body))
                await self._recorder.release(following, call=call)
            case _:
                if last_call is not None and ending not in (Ending.AWAY, Ending.RATE_LIMITED):
                    job = msgspec.structs.replace(job, attempts=job.attempts + 1)
                await self._recorder.finish(job, outcome, last_call)
        if lane_pause_s:
            await self._recorder.pause(job, job.lane, lane_pause_s)


def _with_next_model(job: Job, call: Call, body: bytes) -> tuple[Job, Call]:
    """A job and its call, for the next of its models, which ``body`` names."""
    following, *rest = job.fallbacks
    index = (job.fallback_index or 0) + 1
    # It is another request: an upstream that honours the key would answer it as the first.
    headers = [
        (name, f"{value}-{index}" if name.lower() == "idempotency-key" else value)
        for name, value in call.headers
    ]
    job = msgspec.structs.replace(
        job,
        upstream=following.upstream,
        model=following.model,
        fallbacks=tuple(rest),
        fallback_index=index,
        attempts=0,
        held_s=0.0,
        held_at=0.0,
    )
    return job, msgspec.structs.replace(call, body=body, head=head_of(headers))
