"""What every store promises. The contract suite in ``tests/stores`` holds each backend to it.

All times are seconds. A store never evicts: what does not fit is refused at :meth:`Store.create`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from asyncproxy.fair_queue import Place
from asyncproxy.jobs import Finished, Job, Lane

__all__ = ["Limits", "Store", "Usage"]


class Limits(NamedTuple):
    """What a store takes before it refuses. Results may fill ``max_bytes``; requests half of it.

    With a half kept for them, results that expire always make room for the jobs that wait.
    """

    max_live: int
    max_live_per_credential: int
    max_bytes: int


class Usage(NamedTuple):
    """How full a store is: live jobs, results, and the bytes that both take."""

    live: int
    results: int
    bytes: int


class Store(Protocol):
    """Keeps live jobs and their order, and results until they expire."""

    @property
    def credential_key(self) -> bytes:
        """The key of the credential hashes: the same for every process that shares the store."""

    async def create(self, job: Job) -> None:
        """Accept a pending job.

        Raises :class:`~asyncproxy.errors.TooManyJobs`, :class:`~asyncproxy.errors.Overloaded` or
        :class:`~asyncproxy.errors.StoreFull`, and then nothing has changed.
        """

    async def get(self, job_id: str) -> Job | Finished | None:
        """The job as it is now. None if it never was, has expired or was deleted."""

    async def claim(self, upstream: str) -> Job:
        """Wait for the next job of ``upstream`` whose turn it is; it is processing from here on.

        Waits too while results take all of ``max_bytes``. Safe to cancel: no job is lost then.
        """

    async def release(self, job: Job, *, attempts: int, delay_s: float = 0.0) -> None:
        """Make a claimed job pending again, at its old place, not to be claimed for ``delay_s``."""

    async def pause(self, lane: Lane, delay_s: float) -> None:
        """Hand out no waiting job of ``lane`` for ``delay_s``. A longer pause that is there stays."""

    async def finish(self, outcome: Finished) -> bool:
        """Record the outcome of a claimed job, once. False if the job was deleted meanwhile."""

    async def delete(self, job_id: str) -> bool:
        """Forget a job in whatever state. False if there is none."""

    async def claim_overdue(self, created_before: float) -> list[Job]:
        """Claim the waiting jobs that were created before a time (since the epoch)."""

    def place(self, job_id: str) -> Place | None:
        """Where a waiting job stands, as far as this process knows. ``not_before`` is monotonic."""

    def usage(self) -> Usage:
        """How full the store is."""

    async def tick(self) -> None:
        """Housekeeping, about once a second: give back what has expired."""
