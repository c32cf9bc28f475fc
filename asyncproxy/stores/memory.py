"""The store in this process's memory: fast, bounded, and gone with the process."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cachetools import TLRUCache

from asyncproxy.errors import IllegalTransition, Overloaded, StoreFull, TooManyJobs
from asyncproxy.fair_queue import FairQueue, Place
from asyncproxy.jobs import Finished, Job, JobStatus, Lane, advance
from asyncproxy.stores.base import Limits, Usage

__all__ = ["MemoryStore"]


@dataclass(slots=True, eq=False)
class _Live:
    job: Job
    size: int
    order: int = -1  # its place in the queue, known once it was claimed


@dataclass(slots=True, eq=False)
class _Waiting:
    """The jobs of one upstream that wait, and the claims that wait for them."""

    queue: FairQueue = field(default_factory=FairQueue)
    claims: deque[asyncio.Future[None]] = field(default_factory=deque)
    timer: asyncio.TimerHandle | None = None


def _expires_at(_job_id: str, outcome: Finished, _now: float) -> float:
    return outcome.expires_at


class MemoryStore:
    """See :class:`~asyncproxy.stores.base.Store`.

    ``clock`` gives seconds since the epoch, and decides what has expired; ``monotonic`` paces retries
    and pauses.
    """

    def __init__(
        self,
        upstreams: Iterable[str],
        limits: Limits,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.credential_key = secrets.token_bytes(32)
        self._limits = limits
        self._monotonic = monotonic
        self._live: dict[str, _Live] = {}  # in the order of creation
        self._live_bytes = 0
        self._per_credential: Counter[bytes] = Counter()
        self._waiting = {name: _Waiting() for name in upstreams}
        # No maximum: a full cache evicts, and a result must not go before its time. What it may take
        # is held by create() and claim(), so that it only ever expires.
        self._results: TLRUCache[str, Finished] = TLRUCache(
            math.inf, _expires_at, timer=clock, getsizeof=lambda outcome: outcome.size
        )

    async def create(self, job: Job) -> None:
        limits, size = self._limits, job.size
        if self._per_credential[job.credential] >= limits.max_live_per_credential:
            raise TooManyJobs(
                f"This credential has {limits.max_live_per_credential} jobs that are not done. "
                "Wait for some of them.",
                retry_after_s=5,
            )
        if len(self._live) >= limits.max_live:
            raise Overloaded("Too many jobs are waiting. Try again later.", retry_after_s=5)
        if not self._fits(size):
            self._results.expire()
            if not self._fits(size):
                raise StoreFull("The store is full. Try again later.", retry_after_s=5)
        self._live[job.id] = _Live(job, size)
        self._live_bytes += size
        self._per_credential[job.credential] += 1
        waiting = self._waiting[job.upstream]
        waiting.queue.push(job.id, job.lane)
        self._wake(waiting)

    async def get(self, job_id: str) -> Job | Finished | None:
        live = self._live.get(job_id)
        if live is not None:
            return live.job
        try:
            return self._results[job_id]
        except KeyError:
            return None

    async def claim(self, upstream: str) -> Job:
        waiting = self._waiting[upstream]
        while True:
            if self._has_room:
                taken = waiting.queue.pop(self._monotonic())
                if taken is not None:
                    job_id, order = taken
                    live = self._live[job_id]
                    live.job, live.order = advance(live.job, JobStatus.PROCESSING), order
                    self._wake(waiting)  # there may be more, and others who wait
                    return live.job
            await self._something_to_claim(waiting)

    async def release(self, job: Job, *, attempts: int, delay_s: float = 0.0) -> None:
        live = self._live.get(job.id)
        if live is None:
            return
        live.job = advance(live.job, JobStatus.PENDING, attempts=attempts)
        not_before = self._monotonic() + delay_s if delay_s else 0.0
        waiting = self._waiting[job.upstream]
        waiting.queue.push(job.id, job.lane, order=live.order, not_before=not_before)
        self._wake(waiting)

    async def pause(self, lane: Lane, delay_s: float) -> None:
        self._waiting[lane.upstream].queue.pause(lane, self._monotonic() + delay_s)

    async def finish(self, outcome: Finished) -> bool:
        live = self._live.get(outcome.id)
        if live is None:
            return False
        if live.job.status is not JobStatus.PROCESSING:
            raise IllegalTransition(f"job {outcome.id} is {live.job.status.value}")
        self._drop(live)
        self._results[outcome.id] = outcome
        return True

    async def delete(self, job_id: str) -> bool:
        live = self._live.get(job_id)
        if live is not None:
            self._waiting[live.job.upstream].queue.remove(job_id)
            self._drop(live)
            return True
        with contextlib.suppress(KeyError):
            del self._results[job_id]
            return True
        return False

    async def claim_overdue(self, created_before: float) -> list[Job]:
        overdue: list[Job] = []
        for live in self._live.values():
            if live.job.created_at > created_before:
                break
            if live.job.status is JobStatus.PENDING:
                self._waiting[live.job.upstream].queue.remove(live.job.id)
                live.job = advance(live.job, JobStatus.PROCESSING)
                overdue.append(live.job)
        return overdue

    def place(self, job_id: str) -> Place | None:
        live = self._live.get(job_id)
        return None if live is None else self._waiting[live.job.upstream].queue.place(job_id)

    def usage(self) -> Usage:
        results = self._results
        return Usage(len(self._live), len(results), self._live_bytes + int(results.currsize))

    async def tick(self) -> None:
        self._results.expire()
        for waiting in self._waiting.values():
            self._wake(waiting)

    def _fits(self, size: int) -> bool:
        live = self._live_bytes + size
        most = self._limits.max_bytes
        return live <= most // 2 and live + self._results.currsize <= most

    @property
    def _has_room(self) -> bool:
        return self._live_bytes + self._results.currsize < self._limits.max_bytes

    def _drop(self, live: _Live) -> None:
        credential = live.job.credential
        del self._live[live.job.id]
        self._live_bytes -= live.size
        self._per_credential[credential] -= 1
        if not self._per_credential[credential]:
            del self._per_credential[credential]

    async def _something_to_claim(self, waiting: _Waiting) -> None:
        """Wait until a claim may be worth another try."""
        loop = asyncio.get_running_loop()
        due = waiting.queue.next_due() if self._has_room else None  # no room: tick() wakes
        if due is not None:
            if waiting.timer is not None:
                waiting.timer.cancel()
            waiting.timer = loop.call_later(due - self._monotonic(), self._wake, waiting)
        woken = loop.create_future()
        waiting.claims.append(woken)
        try:
            await woken
        except asyncio.CancelledError:
            if woken.done() and not woken.cancelled():
                self._wake(waiting)  # the turn that this claim was given goes to the next
            raise

    def _wake(self, waiting: _Waiting) -> None:
        """Let one of the claims that wait try again, if a job may be there for it."""
        if not len(waiting.queue):
            return
        while waiting.claims:
            woken = waiting.claims.pop()
            if not woken.done():
                woken.set_result(None)
                return
