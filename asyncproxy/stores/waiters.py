"""Clients that wait for a job to end. A wait costs one future and one timer, and no polling."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from asyncproxy.core.jobs import Job, Outcome

__all__ = ["Waiters"]

Get = Callable[[str], Awaitable[Job | Outcome | None]]


class Waiters:
    """The waiting clients of one process, by the job that they wait for."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[Outcome | None]]] = {}
        self._released = False

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[str]:
        """The ids of the jobs that a client waits for."""
        return iter(list(self._waiting))

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._waiting

    async def wait(self, job_id: str, timeout_s: float) -> Outcome | None:
        """Wait for the outcome of a job. None if the job is deleted meanwhile.

        Raises :class:`TimeoutError` after ``timeout_s``, and at once after :meth:`release`.
        """
        with self.waiting(job_id) as woken:
            async with asyncio.timeout(timeout_s):
                return await woken

    async def follow(self, get: Get, job_id: str, timeout_s: float) -> Job | Outcome | None:
        """The result of ``get`` as soon as the job is terminal or gone, or after ``timeout_s``."""
        found = await get(job_id)
        if isinstance(found, Job):
            try:
                found = await self.wait(job_id, timeout_s)
            except TimeoutError:
                found = await get(job_id)
        return found

    @contextmanager
    def waiting(self, job_id: str) -> Iterator[asyncio.Future[Outcome | None]]:
        """A future for the outcome of a job, registered for the length of a ``with``.

        Register first, then ask the server whether the job has ended: it may end in between.
        """
        woken: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
        if self._released:
            woken.set_exception(TimeoutError())
        waiting = self._waiting.setdefault(job_id, set())
        waiting.add(woken)
        try:
            yield woken
        finally:
            if woken.done() and not woken.cancelled():
                woken.exception()  # marks the exception as retrieved, even if nobody awaited it
            waiting.discard(woken)
            if not waiting and self._waiting.get(job_id) is waiting:
                del self._waiting[job_id]

    def wake(self, job_id: str, outcome: Outcome | None) -> None:
        """Pass an outcome to all who wait for the job. None: there will be no outcome."""
        for woken in self._waiting.pop(job_id, ()):
            if not woken.done():
                woken.set_result(outcome)

    def release(self) -> None:
        """End all waits without an outcome, and let no new wait begin."""
        self._released = True
        for waiting in self._waiting.values():
            for woken in waiting:
                if not woken.done():
                    woken.set_exception(TimeoutError())
