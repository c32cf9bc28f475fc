"""Those who wait for a job to end. Waiting costs one future and one timer, and no polling."""

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
        """The jobs that somebody waits for."""
        return iter(list(self._waiting))

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._waiting

    async def wait(self, job_id: str, timeout_s: float) -> Outcome | None:
        """The outcome of a job as soon as it is there; None if the job is deleted meanwhile.

        Raises :class:`TimeoutError` after ``timeout_s``, and at once after :meth:`release`.
        """
        with self.waiting(job_id) as woken:
            async with asyncio.timeout(timeout_s):
                return await woken

    async def follow(self, get: Get, job_id: str, timeout_s: float) -> Job | Outcome | None:
        """The job that ``get`` finds, as soon as it is terminal or gone, or as it is after the time."""
        found = await get(job_id)
        if isinstance(found, Job):
            try:
                found = await self.wait(job_id, timeout_s)
            except TimeoutError:
                found = await get(job_id)
        return found

    @contextmanager
    def waiting(self, job_id: str) -> Iterator[asyncio.Future[Outcome | None]]:
        """What :meth:`wait` waits for, from the first moment of a ``with`` on.

        For who has to ask somebody else whether the job has ended already: it may end meanwhile.
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
                woken.exception()  # it is known, whether anybody awaited it or not
            waiting.discard(woken)
            if not waiting and self._waiting.get(job_id) is waiting:
                del self._waiting[job_id]

    def wake(self, job_id: str, outcome: Outcome | None) -> None:
        """Hand an outcome to all who wait for it; None if there will be none."""
        for woken in self._waiting.pop(job_id, ()):
            if not woken.done():
                woken.set_result(outcome)

    def release(self) -> None:
        """Let all go without an outcome, and nobody wait any more."""
        self._released = True
        for waiting in self._waiting.values():
            for woken in waiting:
                if not woken.done():
                    woken.set_exception(TimeoutError())
