"""Which job is next: round robin between credentials, first come first served within one. Pure.

The time is a parameter of each call. Every operation costs O(log n) in the jobs that wait, also while
a lane with 50,000 of them is paused: a paused lane leaves the queue as one thing, not job by job.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from asyncproxy.core.jobs import Lane

__all__ = ["FairQueue", "QueuePosition"]


class QueuePosition(msgspec.Struct, frozen=True, gc=False):
    """Where a job stands: how many are expected to go before it, and when it may go at all."""

    ahead: int
    not_before: float


# gc=False: there is one for each job that waits, and the collector need not walk them all. An entry and
# its lane refer to each other only while the entry is in the lane's heap, which is in their order.
class _Entry(msgspec.Struct, gc=False, order=True):
    order: int  # no two entries have the same
    job_id: str
    lane: _Lane
    ticket: int
    not_before: float
    gone: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    key: Lane
    tenant: _Tenant
    heap: list[_Entry] = field(default_factory=list)  # the oldest job first
    waiting: int = 0  # in the heap, or among the timers
    paused_until: float = 0.0


@dataclass(slots=True, eq=False)
class _Tenant:
    """One credential."""

    lanes: dict[Lane, _Lane] = field(default_factory=dict)
    # Lanes by their oldest job. An item counts only while that job still is the oldest and the lane is
    # not paused: what changes a lane adds an item and leaves the old one to be skipped.
    heads: list[tuple[int, int, _Lane]] = field(default_factory=list)
    enqueued: int = 0
    dequeued: int = 0


class FairQueue:
    """The jobs of one upstream that wait for their turn."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._tenants: dict[bytes, _Tenant] = {}
        # The tenants that may have a job ready, in the order of their turns.
        self._ring: OrderedDict[bytes, _Tenant] = OrderedDict()
        # What becomes ready by itself: a job after its backoff, a lane after its pause.
        self._timers: list[tuple[float, int, _Entry | _Lane]] = []
        self._rooms: dict[Lane, int] = {}  # how many more jobs of a lane may be given out
        self._count = itertools.count()
        self._stale = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def limited(self) -> int:
        """How many lanes may give out a number of jobs only."""
        return len(self._rooms)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._entries

    def push(
        self, job_id: str, lane: Lane, *, order: int | None = None, not_before: float = 0.0
    ) -> None:
        """Add a job: at the end, or at the place that it had when ``order`` is what pop() gave.

        It is not given out earlier than ``not_before``.
        """
        tenant = self._tenants.get(lane.credential)
        if tenant is None:
            tenant = self._tenants[lane.credential] = _Tenant()
        found = tenant.lanes.get(lane)
        if found is None:
            found = tenant.lanes[lane] = _Lane(lane, tenant)
        ticket = tenant.enqueued if order is None else tenant.dequeued
        entry = _Entry(next(self._count) if order is None else order, job_id, found, ticket, not_before)
        tenant.enqueued += 1
        found.waiting += 1
        self._entries[job_id] = entry
        if not_before:
            heapq.heappush(self._timers, (not_before, next(self._count), entry))
        else:
            self._admit(entry)

    def pop(self, now: float) -> tuple[str, int] | None:
        """The next job and its order, or None if there is none that may go now."""
        self._ripen(now)
        while self._ring:
            credential, tenant = self._ring.popitem(last=False)
            entry = self._oldest(tenant, now)
            if entry is not None:
                self._ring[credential] = tenant
                self._leave(entry)
                return entry.job_id, entry.order
        return None

    def remove(self, job_id: str) -> bool:
        """Take a job out, wherever it stands. False if it is not here."""
        entry = self._entries.get(job_id)
        if entry is None:
            return False
        self._leave(entry)
        if self._clear_top(entry.lane):
            self._announce(entry.lane)
        self._stale += 2
        self._compact()
        return True

    def pause(self, lane: Lane, until: float) -> None:
        """Give out no job of ``lane`` before ``until``. A longer pause that is there stays."""
        tenant = self._tenants.get(lane.credential)
        found = tenant.lanes.get(lane) if tenant else None
        if found is not None and until > found.paused_until:
            found.paused_until = until
            heapq.heappush(self._timers, (until, next(self._count), found))
            self._stale += 1
            self._compact()

    def allow(self, lane: Lane, room: int | None) -> None:
        """Give out ``room`` more jobs of ``lane``, and then none. None: any number."""
        if room is None:
            self._rooms.pop(lane, None)
        else:
            self._rooms[lane] = room
        tenant = self._tenants.get(lane.credential)
        found = tenant.lanes.get(lane) if tenant else None
        if room != 0 and found is not None and self._clear_top(found):
            self._announce(found)
            self._stale += 1
            self._compact()

    def next_due(self) -> float | None:
        """When something becomes ready by itself; in the past, if it already has. None: nothing."""
        return self._timers[0][0] if self._timers else None

    def position(self, job_id: str) -> QueuePosition | None:
        """Where a job stands, or None if it is not here. An estimate, made in constant time.

        Its credential has one turn in a round of all that have something ready.
        """
        entry = self._entries.get(job_id)
        if entry is None:
            return None
        own = entry.ticket - entry.lane.tenant.dequeued
        ahead = own * (len(self._ring) or 1) if own > 0 else 0
        not_before = max(entry.not_before, entry.lane.paused_until)
        return QueuePosition(min(ahead, len(self._entries) - 1), not_before)

    def _admit(self, entry: _Entry) -> None:
        lane = entry.lane
        heapq.heappush(lane.heap, entry)
        if lane.heap[0] is entry:
            self._announce(lane)
            if len(lane.heap) > 1:  # it went before the one that was announced
                self._stale += 1
                self._compact()

    def _announce(self, lane: _Lane) -> None:
        """Make the lane's oldest job known to its tenant, and the tenant to the ring."""
        self._push_head(lane)
        self._ring.setdefault(lane.key.credential, lane.tenant)

    def _push_head(self, lane: _Lane) -> None:
        # Counted, for a lane may be there twice with one job: lanes themselves have no order.
        heapq.heappush(lane.tenant.heads, (lane.heap[0].order, next(self._count), lane))

    def _oldest(self, tenant: _Tenant, now: float) -> _Entry | None:
        while tenant.heads:
            order, _, lane = heapq.heappop(tenant.heads)
            if lane.paused_until > now or not self._clear_top(lane) or lane.heap[0].order != order:
                continue
            if lane.key in self._rooms:
                if not self._rooms[lane.key]:
                    continue
                self._rooms[lane.key] -= 1
            entry = heapq.heappop(lane.heap)
            if self._clear_top(lane):
                self._push_head(lane)
            return entry
        return None

    def _clear_top(self, lane: _Lane) -> bool:
        """Drop what is gone from the top of a lane. Whether a job is there then."""
        heap = lane.heap
        while heap and heap[0].gone:
            heapq.heappop(heap)
        return bool(heap)

    def _leave(self, entry: _Entry) -> None:
        entry.gone = True
        del self._entries[entry.job_id]
        lane = entry.lane
        lane.waiting -= 1
        lane.tenant.dequeued += 1
        if not lane.waiting:
            # Credentials and models are the clients' to invent: nothing is kept for one without jobs.
            del lane.tenant.lanes[lane.key]
            if not lane.tenant.lanes:
                del self._tenants[lane.key.credential]
                self._ring.pop(lane.key.credential, None)

    def _ripen(self, now: float) -> None:
        timers = self._timers
        while timers and timers[0][0] <= now:
            _, _, due = heapq.heappop(timers)
            if isinstance(due, _Entry):
                if not due.gone:
                    self._admit(due)
            elif due.waiting and due.paused_until <= now and self._clear_top(due):
                self._announce(due)

    def _compact(self) -> None:
        """Forget what is stale, once it is more than what is not: its memory is bounded too."""
        if self._stale <= 64 + len(self._entries):
            return
        self._stale = 0
        self._timers = [
            item
            for item in self._timers
            if (
                not item[2].gone
                if isinstance(item[2], _Entry)
                else item[2].waiting and item[0] == item[2].paused_until
            )
        ]
        heapq.heapify(self._timers)
        for tenant in self._tenants.values():
            tenant.heads.clear()
            for lane in tenant.lanes.values():
                lane.heap = [entry for entry in lane.heap if not entry.gone]
                heapq.heapify(lane.heap)
                if lane.heap:
                    self._push_head(lane)
