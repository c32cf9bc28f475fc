"""The base of the stores that keep live jobs in this process: order, limits, waiting clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

from asyncproxy.core.jobs import Job, Lane, Outcome
from asyncproxy.stores.base import Limits, States, Usage
from asyncproxy.stores.live_jobs import LiveJobs
from asyncproxy.stores.waiters import Waiters

__all__ = ["LocalStore"]


class LocalStore(ABC):
    """The part of a :class:`~asyncproxy.stores.base.Store` that needs no disk and no server."""

    def __init__(
        self, limits: Limits, *, clock: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._live = LiveJobs(limits, monotonic=monotonic, has_room=self._has_room)
        self._waiters = Waiters()
        self.allow = self._live.allow
        self.position = self._live.position
        self.release_waiters = self._waiters.release

    @property
    @abstractmethod
    def _result_count(self) -> int:
        """How many results the store has."""

    @property
    @abstractmethod
    def _result_bytes(self) -> int:
        """The bytes of all results."""

    @abstractmethod
    async def get(self, job_id: str) -> Job | Outcome | None:
        """See :meth:`Store.get`."""

    @property
    def limits(self) -> Limits:
        return self._live.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._live.limits = limits
        self._live.wake_all()  # there may be room now

    async def pause(self, lane: Lane, delay_s: float) -> None:
        self._live.pause(lane, delay_s)

    async def claim_overdue(self, created_before: float) -> list[Job]:
        return self._live.claim_overdue(created_before)

    async def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        return self._live.claim_orphans(upstreams)

    async def wait(self, job_id: str, timeout_s: float) -> Job | Outcome | None:
        return await self._waiters.follow(self.get, job_id, timeout_s)

    async def usage(self) -> Usage:
        return Usage(len(self._live), self._result_count, self._live.bytes + self._result_bytes)

    async def states(self) -> States:
        return self._live.states()

    def _has_room(self) -> bool:
        return self._live.bytes + self._result_bytes < self._live.limits.max_bytes
