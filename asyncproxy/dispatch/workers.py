"""The workers of each upstream: as many as it has concurrency, also after a reload."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from asyncproxy.upstream.client import Upstream

__all__ = ["CallPolicy", "Worker", "WorkerPool", "WorkerPools"]

logger = logging.getLogger(__name__)

Worker = asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """How jobs of one upstream are sent. ``attempts`` counts the first call too.

    ``hidden`` is what it gets from us and must not be in the log, should it quote that in an error.
    """

    concurrency: int = 64
    attempts: int = 3
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    hidden: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(slots=True, eq=False)
class WorkerPool:
    """The workers of one upstream, and what is known of its calls."""

    upstream: Upstream
    policy: CallPolicy
    mean_call_s: float = 1.0
    calls: int = 0  # in flight
    workers: set[Worker] = field(default_factory=set)
    idle: set[Worker] = field(default_factory=set)  # those that wait for a job
    leaving: bool = False  # another one has taken its place

    @property
    def surplus(self) -> int:
        """How many workers there are too many."""
        return len(self.workers) - (0 if self.leaving else self.policy.concurrency)

    @contextmanager
    def waiting(self, worker: Worker) -> Iterator[None]:
        """Within this the worker has no job: it can be sent away."""
        self.idle.add(worker)
        try:
            yield
        finally:
            self.idle.discard(worker)


class WorkerPools(Mapping[str, WorkerPool]):
    """Pools by the names of their upstreams.

    ``turn`` takes one job for a pool, and sees to its end. It gets the worker that runs it, too.
    """

    def __init__(
        self,
        upstreams: Iterable[tuple[Upstream, CallPolicy]],
        turn: Callable[[WorkerPool, Worker], Awaitable[None]],
    ) -> None:
        self.draining = False
        self._turn = turn
        self._pools = {upstream.name: WorkerPool(upstream, policy) for upstream, policy in upstreams}
        self._leaving: set[WorkerPool] = set()  # replaced ones that still have calls in flight
        self._workers: set[Worker] = set()

    def __getitem__(self, upstream: str) -> WorkerPool:
        return self._pools[upstream]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    @property
    def calls(self) -> Mapping[str, int]:
        """Calls in flight, by upstream."""
        found = Counter({name: pool.calls for name, pool in self._pools.items()})
        for pool in self._leaving:
            found[pool.upstream.name] += pool.calls
        return found

    @property
    def concurrency(self) -> Mapping[str, int]:
        """As many calls as may be in flight, by upstream."""
        return {name: pool.policy.concurrency for name, pool in self._pools.items()}

    def start(self) -> None:
        """Let all workers begin."""
        for pool in self._pools.values():
            self._adjust(pool)

    def reconfigure(self, upstreams: Iterable[tuple[Upstream, CallPolicy]]) -> None:
        """Have other upstreams or policies from now on. Calls in flight end where they are."""
        before, self._pools = self._pools, {}
        for upstream, policy in upstreams:
            pool = before.get(upstream.name)
            if pool is not None and pool.upstream is upstream:
                del before[upstream.name]
                pool.policy = policy
            else:
                pool = WorkerPool(upstream, policy, pool.mean_call_s if pool else 1.0)
            self._pools[upstream.name] = pool
        for pool in before.values():
            pool.leaving = True
        if not self.draining:
            for pool in (*before.values(), *self._pools.values()):
                self._adjust(pool)
        self._leaving = {pool for pool in (*self._leaving, *before.values()) if pool.workers}

    async def drain(self, grace_s: float) -> None:
        """Take no job any more; those that are under way have ``grace_s`` to end."""
        self.draining = True
        idle = {worker for pool in (*self._pools.values(), *self._leaving) for worker in pool.idle}
        for worker in idle:
            worker.cancel()
        if busy := self._workers - idle:
            await asyncio.wait(busy, timeout=grace_s)

    async def end(self) -> None:
        """Cancel what is still under way, and see to its end."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def _adjust(self, pool: WorkerPool) -> None:
        """Let a pool have as many workers as it is to have; one that runs a job leaves after it."""
        while pool.surplus < 0:
            name = f"asyncproxy-{pool.upstream.name}-{len(pool.workers)}"
            worker = asyncio.create_task(self._work(pool), name=name)
            for tasks in (pool.workers, self._workers):
                tasks.add(worker)
            worker.add_done_callback(partial(self._ended, pool))
        # Only those who wait: whoever has a job has to see to its end.
        for worker in list(pool.idle)[: max(0, pool.surplus)]:
            pool.workers.discard(worker)
            worker.cancel()

    def _ended(self, pool: WorkerPool, worker: Worker) -> None:
        pool.workers.discard(worker)
        self._workers.discard(worker)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            logger.error("a worker of %s has died, and is replaced", pool.upstream.name, exc_info=error)
            if not self.draining:
                self._adjust(pool)

    async def _work(self, pool: WorkerPool) -> None:
        worker = asyncio.current_task()
        assert worker is not None
        while not self.draining:
            if pool.surplus > 0:
                pool.workers.discard(worker)  # at once: one that is too many, and not all of them
                if pool.leaving and not pool.workers:
                    self._leaving.discard(pool)
                return
            await self._turn(pool, worker)
