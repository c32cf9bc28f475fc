"""The contract of every store. The suite ``tests/stores/test_contract.py`` tests each backend.

All times are in seconds. A store never evicts: :meth:`Store.create` refuses a job that does not fit.

A store on a server or a disk may be out of reach. Then each operation raises
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
    """A job that this process has to run, and its call."""

    job: Job
    call: Call


class UnreadableCall(Exception):
    """A job was claimed, but its call cannot be read. This process has to finish ``job``."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id}: its request cannot be read")
        self.job = job


class Limits(NamedTuple):
    """The limits of a store. Results may fill ``max_bytes``, and requests half of it.

    The other half is for results. So results that expire always make room for the waiting jobs.
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


# Is called with the id of a job whose claim this process has lost.
Lost = Callable[[str], object]


class Store(Protocol):
    """Keeps live jobs and their order, and results until they expire."""

    @property
    def credential_keys(self) -> tuple[bytes, ...]:
        """The keys of the credential hashes, the same for every process that shares the store.

        New hashes are made with the first key. The hash of a stored job may be made with any of them.
        """

    @property
    def survives(self) -> bool:
        """Whether jobs and results are still there when this process has ended."""

    @property
    def limits(self) -> Limits:
        """The limits. May be set at any time: jobs and results that are already stored stay."""

    @limits.setter
    def limits(self, limits: Limits) -> None: ...

    def opened(self, lost: Lost) -> AbstractAsyncContextManager[None]:
        """Keep the store open for the length of a ``with``. Other methods may be called only within it.

        ``lost`` is called for each claimed job that was deleted, or that another process has claimed.
        Raises :class:`~asyncproxy.core.errors.StartupError` if the store cannot be opened.
        """

    async def create(self, job: Job, call: Call, alias: Alias | None = None) -> Job | Outcome | None:
        """Add a pending job and return None, or return the job that ``alias`` already names.

        Raises ``TooManyJobs``, ``Overloaded``, ``StoreFull``, or ``IdempotencyKeyReused`` if the alias
        names a job of another request. After an error nothing has changed.
        """

    async def get(self, job_id: str) -> Job | Outcome | None:
        """The current state of a job. None if the job is unknown, has expired or was deleted."""

    def read(self, outcome: Outcome, start: int = 0) -> AsyncIterator[bytes]:
        """Yields the bytes of ``/content`` of an outcome that is in parts, from byte ``start`` on.

        Raises :class:`~asyncproxy.core.errors.StoreUnavailable` also if the result expires meanwhile.
        """

    async def claim(self, upstream: str) -> Claim:
        """Wait for the next job of ``upstream``, and make it processing.

        Also waits while results take all of ``max_bytes``. May be cancelled: no job is lost. Raises
        :class:`UnreadableCall` for a job whose call cannot be read.
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
        """Make a claimed job pending again, at its old place. It is not claimed for ``delay_s``.

        ``whole_lane``: no waiting job of the lane is claimed for ``delay_s``. A longer pause stays.
        ``job`` may have another upstream and model than at the claim, with another ``call``. On another
        upstream its place is the last. ``job`` may also have fewer fallbacks: the first ones are gone.
        Does nothing if the claim was lost.
        """

    async def pause(self, lane: Lane, delay_s: float) -> None:
        """Let no job that waits in ``lane`` be claimed for ``delay_s``."""

    def allow(self, lane: Lane, room: int | None) -> None:
        """Let this process claim ``room`` more jobs of ``lane``. None: any number.

        Each claim lowers the number by one, until the next call sets it.
        """

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        """Record the outcome of a claimed job, once.

        False if the claim was lost: another worker has the job, or the job was deleted.
        """

    async def delete(self, job_id: str) -> bool:
        """Delete a job in any state. False if there is none."""

    async def claim_overdue(self, created_before: float) -> list[Job]:
        """Claim the waiting jobs that were created before a time (since the epoch)."""

    async def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        """Claim the waiting jobs of upstreams that no process serves. This one serves ``upstreams``."""

    async def wait(self, job_id: str, timeout_s: float) -> Job | Outcome | None:
        """The job as soon as it is terminal or gone, or its state after ``timeout_s``. No polling."""

    def release_waiters(self) -> None:
        """End all waits of this process at once, now and from now on."""

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        """Mark a result as delivered.

        An alias for single use is dropped. Then the result, too, expires within ``within_s``.
        """

    def position(self, job: Job) -> QueuePosition | None:
        """The queue position of a waiting job, if it is known here. ``not_before`` is monotonic."""

    async def usage(self) -> Usage:
        """How full the store is."""

    async def states(self) -> States:
        """How many live jobs are in each state."""

    async def check(self) -> None:
        """Raise :class:`~asyncproxy.core.errors.StoreUnavailable` if the store cannot accept jobs."""

    async def tick(self) -> None:
        """Housekeeping, about once a second: drop expired results."""
