"""The store in this process's memory: fast, bounded, and gone with the process."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from asyncproxy.core.errors import IdempotencyKeyReused, StoreFull
from asyncproxy.core.jobs import Call, Job, Outcome
from asyncproxy.stores.base import Alias, Claim, Limits, Lost
from asyncproxy.stores.expiring_results import ExpiringResults
from asyncproxy.stores.local import LocalStore
from asyncproxy.stores.parts import parts_from

__all__ = ["MemoryStore"]


class MemoryStore(LocalStore):
    """See :class:`~asyncproxy.stores.base.Store`.

    ``clock`` returns seconds since the epoch, for expiry. ``monotonic`` times retries and pauses.
    """

    survives = False

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(limits, clock=clock, monotonic=monotonic)
        self.credential_keys = (secrets.token_bytes(32),)
        self._aliases: dict[bytes, tuple[bytes, str]] = {}  # key → fingerprint, job id
        self._alias_of: dict[str, Alias] = {}  # by job id
        # create() and claim() bound its size, so no result is dropped before it expires.
        self._results = ExpiringResults()

    @property
    def _result_count(self) -> int:
        return len(self._results)

    @property
    def _result_bytes(self) -> int:
        return self._results.bytes

    @asynccontextmanager
    async def opened(self, lost: Lost) -> AsyncIterator[None]:
        yield

    async def create(self, job: Job, call: Call, alias: Alias | None = None) -> Job | Outcome | None:
        if alias is not None and (found := await self._named(alias)) is not None:
            return found
        self._live.check(job)
        size = job.size + call.size
        if not self._live.fits(size, self._results.bytes):
            self._expire()
            if not self._live.fits(size, self._results.bytes):
                raise StoreFull
        self._live.add(job, size, call)
        self._live.enqueue(job)
        if alias is not None:
            self._aliases[alias.key] = (alias.fingerprint, job.id)
            self._alias_of[job.id] = alias
        return None

    async def get(self, job_id: str) -> Job | Outcome | None:
        job = self._live.get(job_id)
        if job is not None:
            return job
        return self._results.get(job_id, self._clock())

    async def claim(self, upstream: str) -> Claim:
        job = await self._live.claim(upstream)
        return Claim(job, self._live.call_of(job))

    async def release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        call: Call | None = None,
    ) -> None:
        size = None if call is None else job.size + call.size
        self._live.release(
            job, attempts=attempts, delay_s=delay_s, whole_lane=whole_lane, size=size, call=call
        )

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        if not self._live.holds(job):
            return False
        self._live.drop(job.id)
        self._keep(outcome)
        self._waiters.wake(outcome.id, outcome)
        return True

    async def delete(self, job_id: str) -> bool:
        if self._live.drop(job_id) is not None:
            self._waiters.wake(job_id, None)
            return True
        return self._results.pop(job_id, self._clock()) is not None

    async def read(self, outcome: Outcome, start: int = 0) -> AsyncIterator[bytes]:
        for number, skipped in parts_from(outcome.sizes, start):
            yield outcome.parts[number][skipped:]

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        alias = self._alias_of.get(outcome.id)
        if alias is None or not alias.single_use:
            return
        self._drop_alias(outcome.id)
        if await self.delete(outcome.id) and within_s:
            expires_at = min(outcome.expires_at, self._clock() + within_s)
            self._keep(msgspec.structs.replace(outcome, expires_at=expires_at))

    async def check(self) -> None:
        return None

    async def tick(self) -> None:
        self._expire()
        self._live.wake_all()
        if len(self._alias_of) > 64 + 2 * (len(self._live) + len(self._results)):
            for job_id in [j for j in self._alias_of if j not in self._live and j not in self._results]:
                self._drop_alias(job_id)

    async def _named(self, alias: Alias) -> Job | Outcome | None:
        """The job that an alias names, if there is one and the alias may return it."""
        fingerprint, job_id = self._aliases.get(alias.key, (b"", ""))
        found = await self.get(job_id)
        if found is None or not alias.reuse_existing:
            return None
        if fingerprint != alias.fingerprint:
            raise IdempotencyKeyReused
        return found

    def _drop_alias(self, job_id: str) -> None:
        alias = self._alias_of.pop(job_id, None)
        if alias is not None and self._aliases.get(alias.key, (b"", ""))[1] == job_id:
            del self._aliases[alias.key]  # unless the alias already names a later job

    def _keep(self, outcome: Outcome) -> None:
        self._expire()  # at each finish: the expired results of a whole second would be many at once
        self._results.keep(outcome)

    def _expire(self) -> None:
        self._results.expire(self._clock())
