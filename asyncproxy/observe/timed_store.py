"""A store that tells an observer how long its operations took, and which of them failed."""

from __future__ import annotations

from collections.abc import Awaitable, Collection
from contextlib import AbstractAsyncContextManager
from time import perf_counter
from typing import TypeVar

from asyncproxy.core.errors import ApiError, IdempotencyKeyReused, Overloaded, StoreFull, TooManyJobs
from asyncproxy.core.events import Observer, StoreOperation
from asyncproxy.core.jobs import Call, Job, Lane, Outcome
from asyncproxy.stores.base import Alias, Claim, Limits, Lost, States, Store, Usage

__all__ = ["TimedStore"]

# A limit that is reached, or a client's mistake: the store has done its work.
_REFUSALS = (IdempotencyKeyReused, Overloaded, StoreFull, TooManyJobs)

T = TypeVar("T")


class TimedStore:
    """See :class:`~asyncproxy.stores.base.Store`. All that is asked of it, ``inner`` does.

    Of what waits by design, only the errors are told. What each submit and each poll asks for goes
    without :meth:`_timed`, which is another coroutine.
    """

    def __init__(self, inner: Store, observer: Observer) -> None:
        self._inner = inner
        self._tell = observer.store_operation
        # Nothing to tell: these never wait for the store.
        self.position = inner.position
        self.allow = inner.allow
        self.read = inner.read

    @property
    def credential_keys(self) -> tuple[bytes, ...]:
        return self._inner.credential_keys

    @property
    def survives(self) -> bool:
        return self._inner.survives

    @property
    def limits(self) -> Limits:
        return self._inner.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._inner.limits = limits

    def opened(self, lost: Lost) -> AbstractAsyncContextManager[None]:
        return self._inner.opened(lost)

    async def create(self, job: Job, call: Call, alias: Alias | None = None) -> Job | Outcome | None:
        started = perf_counter()
        try:
            found = await self._inner.create(job, call, alias)
        except Exception as error:
            self._failed("create", started, error)
            raise
        self._tell(StoreOperation("create", perf_counter() - started))
        return found

    async def get(self, job_id: str) -> Job | Outcome | None:
        started = perf_counter()
        try:
            found = await self._inner.get(job_id)
        except Exception as error:
            self._failed("get", started, error)
            raise
        self._tell(StoreOperation("get", perf_counter() - started))
        return found

    async def claim(self, upstream: str) -> Claim:
        return await self._watched("claim", self._inner.claim(upstream))

    async def release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        call: Call | None = None,
    ) -> None:
        release = self._inner.release(
            job, attempts=attempts, delay_s=delay_s, whole_lane=whole_lane, call=call
        )
        await self._timed("release", release)

    async def pause(self, lane: Lane, delay_s: float) -> None:
        await self._timed("pause", self._inner.pause(lane, delay_s))

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        return await self._timed("finish", self._inner.finish(job, outcome))

    async def delete(self, job_id: str) -> bool:
        return await self._timed("delete", self._inner.delete(job_id))

    async def claim_overdue(self, created_before: float) -> list[Job]:
        return await self._timed("claim_overdue", self._inner.claim_overdue(created_before))

    async def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        return await self._timed("claim_orphans", self._inner.claim_orphans(upstreams))

    async def wait(self, job_id: str, timeout_s: float) -> Job | Outcome | None:
        return await self._watched("wait", self._inner.wait(job_id, timeout_s))

    def release_waiters(self) -> None:
        self._inner.release_waiters()

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        await self._timed("retire", self._inner.retire(outcome, within_s))

    async def usage(self) -> Usage:
        return await self._timed("usage", self._inner.usage())

    async def states(self) -> States:
        return await self._timed("states", self._inner.states())

    async def check(self) -> None:
        await self._timed("check", self._inner.check())

    async def tick(self) -> None:
        await self._timed("tick", self._inner.tick())

    async def _timed(self, operation: str, work: Awaitable[T]) -> T:
        started = perf_counter()
        try:
            done = await work
        except Exception as error:
            self._failed(operation, started, error)
            raise
        self._tell(StoreOperation(operation, perf_counter() - started))
        return done

    def _failed(self, operation: str, started: float, error: Exception) -> None:
        self._tell(StoreOperation(operation, perf_counter() - started, _code(error)))

    async def _watched(self, operation: str, work: Awaitable[T]) -> T:
        try:
            return await work
        except Exception as error:
            self._tell(StoreOperation(operation, None, _code(error)))
            raise


def _code(error: Exception) -> str:
    if isinstance(error, _REFUSALS):
        return ""
    return error.code if isinstance(error, ApiError) else "internal_error"
