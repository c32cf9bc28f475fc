"""What every store promises. The contract suite in ``tests/stores`` holds each backend to it.

All times are seconds. A store never evicts: what does not fit is refused at :meth:`Store.create`.

A store that keeps its jobs elsewhere may be out of reach: then each operation raises
:class:`~asyncproxy.core.errors.StoreUnavailable`, except for :meth:`Store.claim`, which waits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from asyncproxy.core.jobs import Call, Job, Lane, Outcome
from asyncproxy.stores.fair_queue import QueuePosition

__all__ = ["Alias", "Claim", "Limits", "Lost", "States", "Store", "UnreadableCall", "Usage"]


class Alias(NamedTuple):
    """Another name for a job, so that the same request again can find it."""

    key: bytes
    """The name."""
    fingerprint: bytes
    """Tells the request of the job from another request under the same name."""
    reuse_existing: bool = True
    """Return the job that has the name. False: point the name at the new job."""
    single_use: bool = False
    """Drop the name when the result has been delivered."""


class Claim(NamedTuple):
    """A job that is this process's to run, and what to send for it."""

    job: Job
    call: Call


class UnreadableCall(Exception):
    """A job was claimed, and what to send for it cannot be read: ``job`` is this process's to end."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id}: its request cannot be read")
        self.job = job


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


class States(NamedTuple):
    """How many live jobs wait, and how many are claimed."""

    pending: int
    processing: int


# Told the id of a job that was claimed here, and is not this process's any more.
Lost = Callable[[str], object]


class Store(Protocol):
    """Keeps live jobs and their order, and results until they expire."""

    @property
    def credential_keys(self) -> tuple[bytes, ...]:
        """The keys of the credential hashes, the same for every process that shares the store.

        New hashes are made with the first one. Those of jobs may have been made with any of them.
        """

    @property
    def survives(self) -> bool:
        """Whether jobs and results are still there when this process has ended."""

    @property
    def limits(self) -> Limits:
        """What it takes before it refuses. May be set anew at any time: what is there stays."""

    @limits.setter
    def limits(self, limits: Limits) -> None: ...

    def opened(self, lost: Lost) -> AbstractAsyncContextManager[None]:
        """Hold the store open for the length of a ``with``: nothing else can be called outside it.

        ``lost`` hears of claimed jobs that were deleted, or that another process has claimed.
        Raises :class:`~asyncproxy.core.errors.StartupError` if that cannot be.
        """

    async def create(self, job: Job, call: Call, alias: Alias | None = None) -> Job | Outcome | None:
        """Accept a pending job: None. Or else the job that the alias names already, and nothing new.

        Raises ``TooManyJobs``, ``Overloaded``, ``StoreFull``, or ``IdempotencyKeyReused`` if the alias
        names a job of another request. Nothing has changed then.
        """

    async def get(self, job_id: str) -> Job | Outcome | None:
        """The job as it is now. None if it never was, has expired or was deleted."""

    def read(self, outcome: Outcome, start: int = 0) -> AsyncIterator[bytes]:
        """The bytes of ``/content`` of an outcome in parts, from the byte ``start`` on, in pieces.

        Raises :class:`~asyncproxy.core.errors.StoreUnavailable` also if the result is gone meanwhile.
        """

    async def claim(self, upstream: str) -> Claim:
        """Wait for the next job of ``upstream`` whose turn it is; it is processing from here on.

        Waits too while results take all of ``max_bytes``. Safe to cancel: no job is lost then. Raises
        :class:`UnreadableCall` for a job that cannot be sent.
        """

    async def release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        call: Call | None = None,
    ) -> None:
        """Make a claimed job pending again, at its old place, not to be claimed for ``delay_s``.

        ``whole_lane``: nor is any other waiting job of its lane; a longer pause that is there stays.
        ``job`` may have another upstream and model than it was claimed with, and then another
        ``call``; its place is the last then. Of its fallbacks it may have lost the first ones. Nothing
        happens if the claim was lost.
        """

    async def pause(self, lane: Lane, delay_s: float) -> None:
        """Hand out no job that waits in ``lane`` for ``delay_s``, if one does."""

    def allow(self, lane: Lane, room: int | None) -> None:
        """Let this process claim ``room`` more jobs of ``lane``. None: any number.

        Each claim takes one off, until another number is given.
        """

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        """Record the outcome of a claimed job, once. False if the claim was lost: that of another
        worker counts, or the job was deleted.
        """

    async def delete(self, job_id: str) -> bool:
        """Forget a job in whatever state. False if there is none."""

    async def claim_overdue(self, created_before: float) -> list[Job]:
        """Claim the waiting jobs that were created before a time (since the epoch)."""

    async def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        """Claim the waiting jobs of upstreams that nobody serves. ``upstreams`` are served here."""

    async def wait(self, job_id: str, timeout_s: float) -> Job | Outcome | None:
        """The job as soon as it is terminal or gone, or as it is after ``timeout_s``. No polling."""

    def release_waiters(self) -> None:
        """Let all who wait here go at once, now and from now on."""

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        """Note that a result was delivered.

        If it has an alias that is for once, that is gone, and the result no later than ``within_s``.
        """

    def position(self, job: Job) -> QueuePosition | None:
        """Where a waiting job stands, as far as this process knows. ``not_before`` is monotonic."""

    async def usage(self) -> Usage:
        """How full the store is."""

    async def states(self) -> States:
        """How the live jobs stand."""

    async def check(self) -> None:
        """Raise :class:`~asyncproxy.core.errors.StoreUnavailable` if jobs cannot be taken just now."""

    async def tick(self) -> None:
        """Housekeeping, about once a second: give back what has expired."""
