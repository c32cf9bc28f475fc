"""The workers of each upstream: as many as it has concurrency, also after a reload.

A worker waits until the gate of its upstream admits a call, takes one turn, and begins again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from asyncproxy.dispatch.gate import Gate
from asyncproxy.dispatch.verdict import CallPolicy
from asyncproxy.upstream.client import Upstream

__all__ = ["Worker", "WorkerPool", "WorkerPools"]

logger = logging.getLogger(__name__)

Worker = asyncio.Task[None]


@dataclass(slots=True, eq=False)
class WorkerPool:
    """The workers of one upstream, and what is known of its calls."""

    upstream: Upstream
    policy: CallPolicy
    gate: Gate
    mean_call_s: float = 1.0
    calls: int = 0
    """Calls in flight."""
    workers: set[Worker] = field(default_factory=set)
    idle: set[Worker] = field(default_factory=set)
    """Workers without a job: they wait for the gate, or for a claim."""
    claiming: set[Worker] = field(default_factory=set)
    """Those of them that wait for a claim."""
    recalled: set[Worker] = field(default_factory=set)
    """Workers whose claim was cancelled, for the upstream has gone away."""
    leaving: bool = False
    """Whether another pool has taken the place of this one."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def surplus(self) -> int:
        """How many workers there are too many."""
        return len(self.workers) - (0 if self.leaving else self.policy.concurrency)

    @contextmanager
    def awaiting_claim(self, worker: Worker) -> Iterator[None]:
        """Within this the worker waits for a claim: it can be sent away, or recalled."""
        self.idle.add(worker)
        self.claiming.add(worker)
        try:
            yield
        finally:
            self.idle.discard(worker)
            self.claiming.discard(worker)

    async def admitted(self, worker: Worker, monotonic: Callable[[], float]) -> int:
        """Wait until a call may be made. Returns its epoch, for :meth:`left`."""
        outage = self.gate.outage
        while wait_s := outage.wait_s(monotonic()):
            self.idle.add(worker)
            try:
                async with asyncio.timeout(None if wait_s == math.inf else wait_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
            finally:
                self.idle.discard(worker)
        return outage.admit()

    def left(self, epoch: int) -> None:
        """Note that an admitted worker has no call any more."""
        self.gate.outage.leave(epoch)
        if self.idle:
            self.notify()

    def notify(self) -> None:
        """Let the workers that wait look at the gate again."""
        self._changed.set()
        self._changed.clear()

    def recall(self) -> None:
        """Take the workers that wait for a claim back to the gate."""
        for worker in self.claiming:
            self.recalled.add(worker)
            worker.cancel()

    def was_recalled(self, worker: Worker) -> bool:
        """Whether the cancellation that arrived is that of :meth:`recall`, and no other."""
        if worker not in self.recalled:
            return False
        self.recalled.remove(worker)
        return worker.uncancel() == 0


class WorkerPools(Mapping[str, WorkerPool]):
    """Pools by the names of their upstreams.

    ``turn`` takes one job for a pool, and sees to its end. It gets the worker that runs it and the
    epoch of its admission too. ``new_gate`` makes the gate of a pool.
    """

    def __init__(
        self,
        upstreams: Iterable[tuple[Upstream, CallPolicy]],
        turn: Callable[[WorkerPool, Worker, int], Awaitable[None]],
        new_gate: Callable[[CallPolicy], Gate],
        monotonic: Callable[[], float],
    ) -> None:
        self.draining = False
        self._turn = turn
        self._new_gate = new_gate
        self._monotonic = monotonic
        self._pools = {
            upstream.name: WorkerPool(upstream, policy, new_gate(policy))
            for upstream, policy in upstreams
        }
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
    def limits(self) -> Mapping[str, int]:
        """As many calls as may be in flight now, by upstream."""
        return {name: pool.gate.outage.limit for name, pool in self._pools.items()}

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
                pool.gate.reconfigure(policy)
                pool.notify()
            else:
                mean_call_s = pool.mean_call_s if pool else 1.0
                pool = WorkerPool(upstream, policy, self._new_gate(policy), mean_call_s)
            self._pools[upstream.name] = pool
        for pool in before.values():
            pool.leaving = True
            pool.gate.close()
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
                # Leave the set before returning: otherwise each worker sees the same surplus and all
                # exit.
                pool.workers.discard(worker)
                if pool.leaving and not pool.workers:
                    self._leaving.discard(pool)
                return
            epoch = await pool.admitted(worker, self._monotonic)
            try:
                await self._turn(pool, worker, epoch)
            finally:
                pool.left(epoch)
