"""The store in this process's memory: fast, bounded, and gone with the process."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
from cachetools import TLRUCache

from asyncproxy.errors import (
    IdempotencyKeyReused,
    IllegalTransition,
    Overloaded,
    StoreFull,
    TooManyJobs,
)
from asyncproxy.fair_queue import FairQueue, Place
from asyncproxy.jobs import Finished, Job, JobStatus, Lane, advance
from asyncproxy.stores.base import Alias, Limits, Usage
from asyncproxy.waiters import Waiters

__all__ = ["MemoryStore"]


class _Live(msgspec.Struct, gc=False):
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
        self._clock = clock
        self._monotonic = monotonic
        self._live: dict[str, _Live] = {}  # in the order of creation
        self._live_bytes = 0
        self._per_credential: Counter[bytes] = Counter()
        self._waiting = {name: _Waiting() for name in upstreams}
        self._waiters = Waiters()
        self._aliases: dict[bytes, tuple[bytes, str]] = {}  # key → fingerprint, job id
        self._alias_of: dict[str, Alias] = {}  # by job id
        # No maximum: a full cache evicts, and a result must not go before its time. What it may take
        # is held by create() and claim(), so that it only ever expires.
        # Its time stands still within an operation: it would expire an entry on its own otherwise,
        # between our count and its.
        self._now = clock()
        self._results: TLRUCache[str, Finished] = TLRUCache(
            math.inf, _expires_at, timer=lambda: self._now
        )
        self._result_bytes = 0

    async def create(self, job: Job, alias: Alias | None = None) -> Job | Finished | None:
        if alias is not None and (found := await self._named(alias)) is not None:
            return found
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
            self._expire()
            if not self._fits(size):
                raise StoreFull("The store is full. Try again later.", retry_after_s=5)
        self._live[job.id] = _Live(job, size)
        self._live_bytes += size
        self._per_credential[job.credential] += 1
        waiting = self._waiting[job.upstream]
        waiting.queue.push(job.id, job.lane)
        self._wake(waiting)
        if alias is not None:
            self._aliases[alias.key] = (alias.fingerprint, job.id)
            self._alias_of[job.id] = alias
        return None

    async def get(self, job_id: str) -> Job | Finished | None:
        live = self._live.get(job_id)
        if live is not None:
            return live.job
        self._now = self._clock()
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

    async def release(
        self, job: Job, *, attempts: int, delay_s: float = 0.0, whole_lane: bool = False
    ) -> None:
        live = self._live.get(job.id)
        if live is None:
            return
        order = live.order if job.upstream == live.job.upstream else None
        live.job = advance(job, JobStatus.PENDING, attempts=attempts)
        self._live_bytes += job.size - live.size
        live.size = job.size
        until = self._monotonic() + delay_s if delay_s else 0.0
        queue = self._waiting[job.upstream].queue
        queue.push(job.id, job.lane, order=order, not_before=0.0 if whole_lane else until)
        if whole_lane:
            queue.pause(job.lane, until)
        self._wake(self._waiting[job.upstream])

    async def pause(self, lane: Lane, delay_s: float) -> None:
        self._waiting[lane.upstream].queue.pause(lane, self._monotonic() + delay_s)
        self._wake(self._waiting[lane.upstream])  # whoever waits has to know of its end

    async def finish(self, outcome: Finished) -> bool:
        live = self._live.get(outcome.id)
        if live is None:
            return False
        if live.job.status is not JobStatus.PROCESSING:
            raise IllegalTransition(f"job {outcome.id} is {live.job.status.value}")
        self._drop(live)
        self._keep(outcome)
        self._waiters.wake(outcome.id, outcome)
        return True

    async def delete(self, job_id: str) -> bool:
        live = self._live.get(job_id)
        if live is not None:
            self._waiting[live.job.upstream].queue.remove(job_id)
            self._drop(live)
            self._waiters.wake(job_id, None)
            return True
        self._expire()
        outcome = self._results.pop(job_id, None)
        if outcome is None:
            return False
        self._result_bytes -= outcome.size
        return True

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

    async def wait(self, job_id: str, timeout_s: float) -> Job | Finished | None:
        found = await self.get(job_id)
        if isinstance(found, Job):
            try:
                found = await self._waiters.wait(job_id, timeout_s)
            except TimeoutError:
                found = await self.get(job_id)
        return found

    def release_waiters(self) -> None:
        self._waiters.release()

    async def retire(self, outcome: Finished, within_s: float) -> None:
        alias = self._alias_of.get(outcome.id)
        if alias is None or not alias.once:
            return
        self._drop_alias(outcome.id)
        if await self.delete(outcome.id) and within_s:
            expires_at = min(outcome.expires_at, self._clock() + within_s)
            self._keep(msgspec.structs.replace(outcome, expires_at=expires_at))

    def place(self, job_id: str) -> Place | None:
        live = self._live.get(job_id)
        return None if live is None else self._waiting[live.job.upstream].queue.place(job_id)

    def usage(self) -> Usage:
        return Usage(len(self._live), len(self._results), self._live_bytes + self._result_bytes)

    async def tick(self) -> None:
        self._expire()
        for waiting in self._waiting.values():
            self._wake(waiting)
        if len(self._alias_of) > 64 + 2 * (len(self._live) + len(self._results)):
            for job_id in [j for j in self._alias_of if j not in self._live and j not in self._results]:
                self._drop_alias(job_id)

    async def _named(self, alias: Alias) -> Job | Finished | None:
        """The job that an alias names, if it names one and it is to be taken."""
        fingerprint, job_id = self._aliases.get(alias.key, (b"", ""))
        found = await self.get(job_id)
        if found is None or not alias.attach:
            return None
        if fingerprint != alias.fingerprint:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was used with another request. Use a new key for a new request."
            )
        return found

    def _drop_alias(self, job_id: str) -> None:
        alias = self._alias_of.pop(job_id, None)
        if alias is not None and self._aliases.get(alias.key, (b"", ""))[1] == job_id:
            del self._aliases[alias.key]  # else it is a later job's by now

    def _fits(self, size: int) -> bool:
        live = self._live_bytes + size
        most = self._limits.max_bytes
        return live <= most // 2 and live + self._result_bytes <= most

    @property
    def _has_room(self) -> bool:
        return self._live_bytes + self._result_bytes < self._limits.max_bytes

    def _keep(self, outcome: Finished) -> None:
        self._expire()  # the cache would do it too, and not say what has gone
        self._results[outcome.id] = outcome
        self._result_bytes += outcome.size

    def _expire(self) -> None:
        self._now = self._clock()
        for _, outcome in self._results.expire():
            self._result_bytes -= outcome.size

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
