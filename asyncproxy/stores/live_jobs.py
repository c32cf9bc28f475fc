"""The live jobs of a store that one process owns: their states, their order, their limits."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import msgspec

from asyncproxy.core.errors import IllegalTransition, Overloaded, TooManyJobs
from asyncproxy.core.jobs import Call, Job, JobStatus, Lane, advance
from asyncproxy.stores.base import Limits, States
from asyncproxy.stores.fair_queue import FairQueue, QueuePosition

__all__ = ["LiveJobs"]


class _Entry(msgspec.Struct, gc=False):
    job: Job
    size: int
    call: Call | None
    seq: int
    order: int = -1  # the place in the queue, set when the job is claimed


@dataclass(slots=True, eq=False)
class _Waiting:
    """The waiting jobs of one upstream, and the claims that wait for a job."""

    queue: FairQueue = field(default_factory=FairQueue)
    claims: deque[asyncio.Future[None]] = field(default_factory=deque)
    timer: asyncio.TimerHandle | None = None


class LiveJobs:
    """Live jobs by id. Only :meth:`claim` awaits, so each other operation is atomic.

    ``has_room`` returns whether the store has room for a result. Without room no job is claimed.
    """

    def __init__(
        self, limits: Limits, *, monotonic: Callable[[], float], has_room: Callable[[], bool]
    ) -> None:
        self.bytes = 0
        self._processing = 0
        self.limits = limits
        self._monotonic = monotonic
        self._has_room = has_room
        self._entries: dict[str, _Entry] = {}  # in the order of creation
        self._per_credential: Counter[bytes] = Counter()
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._entries

    def get(self, job_id: str) -> Job | None:
        """The current state of a live job."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.job

    def call_of(self, job: Job) -> Call:
        """The call that a live job was added with."""
        call = self._entries[job.id].call
        assert call is not None
        return call

    def seq_of(self, job_id: str) -> int | None:
        """The number that a live job was added with. None if it is not here."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.seq

    def states(self) -> States:
        """How many live jobs are in each state."""
        return States(len(self._entries) - self._processing, self._processing)

    def check(self, job: Job) -> None:
        """Raise :class:`TooManyJobs` or :class:`Overloaded` if ``job`` would pass a limit."""
        limits = self.limits
        if self._per_credential[job.credential] >= limits.max_live_per_credential:
            raise TooManyJobs(limits.max_live_per_credential)
        if len(self._entries) >= limits.max_live:
            raise Overloaded

    def fits(self, size: int, result_bytes: int) -> bool:
        """Whether a job of ``size`` bytes fits beside the results."""
        live, most = self.bytes + size, self.limits.max_bytes
        return live <= most // 2 and live + result_bytes <= most

    def add(self, job: Job, size: int, call: Call | None = None, seq: int = 0) -> None:
        """Add a job that cannot be claimed yet, with its ``call`` or the row number ``seq`` of it."""
        self._entries[job.id] = _Entry(job, size, call, seq)
        self.bytes += size
        self._per_credential[job.credential] += 1

    def enqueue(self, job: Job) -> None:
        """Put an added job into its queue."""
        waiting = self._of(job.upstream)
        waiting.queue.push(job.id, job.lane)
        self._wake(waiting)

    async def claim(self, upstream: str) -> Job:
        """Wait for the next job of ``upstream``. May be cancelled: no job is lost."""
        waiting = self._of(upstream)
        while True:
            if self._has_room():
                taken = waiting.queue.pop(self._monotonic())
                if taken is not None:
                    job_id, order = taken
                    entry = self._entries[job_id]
                    entry.job, entry.order = advance(entry.job, JobStatus.PROCESSING), order
                    self._processing += 1
                    self._wake(waiting)  # there may be another job for another claim
                    return entry.job
            await self._something_to_claim(waiting)

    def holds(self, job: Job) -> bool:
        """Whether the claim of ``job`` still holds.

        Raises :class:`IllegalTransition` if it was never claimed.
        """
        entry = self._entries.get(job.id)
        if entry is None or entry.job.claims != job.claims:
            return False
        if entry.job.status is not JobStatus.PROCESSING:
            raise IllegalTransition(f"job {job.id} is {entry.job.status.value}")
        return True

    def release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        size: int | None = None,
        call: Call | None = None,
    ) -> Job | None:
        """Make a claimed job pending again, and return it. None: the claim was lost.

        ``size`` and ``call`` replace the old ones, if they are given.
        """
        if not self.holds(job):
            return None
        entry = self._entries[job.id]
        order = entry.order if job.upstream == entry.job.upstream else None
        released = advance(job, JobStatus.PENDING, attempts=attempts)
        self._processing -= entry.job.status is JobStatus.PROCESSING
        entry.job = released
        if size is not None:
            self.bytes += size - entry.size
            entry.size = size
        if call is not None:
            entry.call = call
        until = self._monotonic() + delay_s if delay_s else 0.0
        waiting = self._of(job.upstream)
        waiting.queue.push(job.id, job.lane, order=order, not_before=0.0 if whole_lane else until)
        if whole_lane:
            waiting.queue.pause(job.lane, until)
        self._wake(waiting)
        return entry.job

    def pause(self, lane: Lane, delay_s: float) -> None:
        """Let no job that waits in ``lane`` be claimed for ``delay_s``."""
        waiting = self._of(lane.upstream)
        waiting.queue.pause(lane, self._monotonic() + delay_s)
        self._wake(waiting)  # a waiting claim has to set its timer to the end of the pause

    def allow(self, lane: Lane, room: int | None) -> None:
        """Let ``room`` more jobs of ``lane`` be claimed. None: any number."""
        waiting = self._of(lane.upstream)
        waiting.queue.allow(lane, room)
        self._wake(waiting)

    def withdraw(self, job_id: str) -> bool:
        """Take a waiting job out of its queue, so that it is not claimed. False if it does not wait."""
        entry = self._entries.get(job_id)
        return entry is not None and self._of(entry.job.upstream).queue.remove(job_id)

    def drop(self, job_id: str) -> Job | None:
        """Remove a job in any state, and return it. None if it is not here."""
        entry = self._entries.pop(job_id, None)
        if entry is None:
            return None
        credential = entry.job.credential
        self._of(entry.job.upstream).queue.remove(job_id)
        self.bytes -= entry.size
        self._processing -= entry.job.status is JobStatus.PROCESSING
        self._per_credential[credential] -= 1
        if not self._per_credential[credential]:
            del self._per_credential[credential]
        return entry.job

    def claim_overdue(self, created_before: float) -> list[Job]:
        """Claim the waiting jobs that were created before a time."""
        return self._claim_out_of_turn(self._older(created_before))

    def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        """Claim the waiting jobs of upstreams that are not among ``upstreams``."""
        if all(name in upstreams or not len(w.queue) for name, w in self._waiting.items()):
            return []
        return self._claim_out_of_turn(
            entry for entry in self._entries.values() if entry.job.upstream not in upstreams
        )

    def position(self, job: Job) -> QueuePosition | None:
        """The queue position of a job."""
        waiting = self._waiting.get(job.upstream)
        return None if waiting is None else waiting.queue.position(job.id)

    def wake_all(self) -> None:
        """Let waiting claims try again: there may be room, or a job may be due."""
        for waiting in self._waiting.values():
            self._wake(waiting)

    def _of(self, upstream: str) -> _Waiting:
        found = self._waiting.get(upstream)
        if found is None:
            found = self._waiting[upstream] = _Waiting()
        return found

    def _older(self, created_before: float) -> Iterator[_Entry]:
        for entry in self._entries.values():
            if entry.job.created_at > created_before:
                return
            yield entry

    def _claim_out_of_turn(self, entries: Iterator[_Entry]) -> list[Job]:
        claimed: list[Job] = []
        for entry in entries:
            # A job that was added and not enqueued is pending too, but must not be claimed yet.
            if self._of(entry.job.upstream).queue.remove(entry.job.id):
                entry.job = advance(entry.job, JobStatus.PROCESSING)
                self._processing += 1
                claimed.append(entry.job)
        return claimed

    async def _something_to_claim(self, waiting: _Waiting) -> None:
        """Wait until a claim may be worth another try."""
        loop = asyncio.get_running_loop()
        due = waiting.queue.next_due() if self._has_room() else None  # no room: wake_all() wakes
        if due is not None:
            if waiting.timer is not None:
                waiting.timer.cancel()
            waiting.timer = loop.call_later(due - self._monotonic(), self._wake, waiting)
        woken = loop.create_future()
        waiting.claims.append(woken)
        try:
            await woken
        except asyncio.CancelledError:
            if woken.done() and not woken.cancelled():
                self._wake(waiting)  # this claim was woken in vain: wake the next one
            raise

    def _wake(self, waiting: _Waiting) -> None:
        """Let one waiting claim try again, if there may be a job for it."""
        while waiting.claims and len(waiting.queue):
            woken = waiting.claims.pop()
            if not woken.done():
                woken.set_result(None)
                return
