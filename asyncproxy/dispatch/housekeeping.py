"""What is to be done once a second: expiry, deadlines, jobs without an upstream, news of outages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from asyncproxy.core.errors import ModelNotFound, StoreFull, StoreUnavailable
from asyncproxy.core.events import Observer, UpstreamAway, UpstreamBack
from asyncproxy.core.jobs import Job
from asyncproxy.dispatch.attempts import deadline_exceeded
from asyncproxy.dispatch.recorder import Recorder
from asyncproxy.dispatch.workers import WorkerPool, WorkerPools
from asyncproxy.stores.base import Store

__all__ = ["Housekeeping"]

logger = logging.getLogger(__name__)

# Jobs that are recorded at the same time: they share what a commit costs.
_AT_ONCE: Final = 100

# An upstream that stays away is named so often.
_TELL_AGAIN_S: Final = 60.0


class Housekeeping:
    """Looks after the jobs of a store that no worker has.

    ``route`` names the upstream of a model, or raises :class:`ModelNotFound`. ``clock`` gives seconds
    since the epoch. ``deadline_s`` may be set anew at any time.
    """

    def __init__(
        self,
        store: Store,
        pools: WorkerPools,
        recorder: Recorder,
        *,
        deadline_s: float,
        route: Callable[[str], str],
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._pools = pools
        self._recorder = recorder
        self.deadline_s = deadline_s
        self._route = route
        self._observer = observer
        self._clock = clock
        self._told_s: dict[str, float] = {}  # upstream → how long it had been away when that was told

    async def run(self) -> None:
        """Tidy up once a second, until this is cancelled."""
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
        for pool in self._pools.values():
            pool.gate.tidy()
            pool.notify()
        await self._tell()
        await self._store.tick()
        overdue = await self._store.claim_overdue(self._clock() - self.deadline_s)
        await self._for_each(overdue, self._expire)
        await self._for_each(await self._store.claim_orphans(self._pools), self._reroute)

    async def _expire(self, job: Job) -> None:
        await self._recorder.finish(job, deadline_exceeded(self.deadline_s))

    async def _reroute(self, job: Job) -> None:
        """Send a job to another upstream: its own was removed from the configuration."""
        try:
            upstream = self._route(job.model)
        except ModelNotFound as error:
            await self._recorder.finish(job, error)
            return
        await self._recorder.release(msgspec.structs.replace(job, upstream=upstream))

    async def _for_each(self, claimed: Sequence[Job], step: Callable[[Job], Awaitable[None]]) -> None:
        """Take a step for each of the jobs. An error with one does not leave the others claimed."""

        async def guarded(job: Job) -> None:
            try:
                await step(job)
            except Exception:
                logger.exception("job %s: an error inside the proxy", job.id)
                await self._recorder.interrupt(job, "An error inside the proxy ended this job.")

        for start in range(0, len(claimed), _AT_ONCE):
            await asyncio.gather(*map(guarded, claimed[start : start + _AT_ONCE]))

    async def _tell(self) -> None:
        """Tell the observers which upstreams went away, are still away, and came back."""
        news = {
            name: pool for name, pool in self._pools.items() if pool.gate.changes or pool.gate.is_away
        }
        if not news:
            return
        try:
            waiting = (await self._store.states()).pending
        except (StoreUnavailable, StoreFull):
            waiting = None
        for name, pool in news.items():
            self._tell_of(name, pool, waiting)

    def _tell_of(self, name: str, pool: WorkerPool, waiting: int | None) -> None:
        gate = pool.gate
        changes, gate.changes = gate.changes, []
        for change in changes:
            if change.away:
                self._observer.upstream_away(UpstreamAway(name, change.reason, 0.0, waiting))
            else:
                self._observer.upstream_back(UpstreamBack(name, change.away_s, waiting))
            self._told_s[name] = 0.0
        if gate.is_away and gate.away_s - self._told_s.get(name, 0.0) >= _TELL_AGAIN_S:
            self._told_s[name] = gate.away_s
            self._observer.upstream_away(UpstreamAway(name, gate.reason, gate.away_s, waiting))
