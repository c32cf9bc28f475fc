"""Selects the next job: round robin between credentials, first come first served within one. Pure.

The time is a parameter of each call. Every operation costs O(log n) in the waiting jobs, also while a
lane of 50,000 jobs is paused: a pause takes the lane out of the queue as a whole, and not each job.
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
    """The position of a job in its queue."""

    ahead: int
    """How many jobs are expected to be claimed before it."""
    not_before: float
    """The time before which it cannot be claimed. 0: at once."""


# gc=False: each waiting job has an entry, and the garbage collector should not walk them all. An entry
# and its lane refer to each other only while the entry is in the lane's heap.
class _Entry(msgspec.Struct, gc=False, order=True):
    order: int  # unique
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
    waiting: int = 0  # jobs in the heap, and jobs that wait for a timer
    paused_until: float = 0.0


@dataclass(slots=True, eq=False)
class _Tenant:
    """One credential."""

    lanes: dict[Lane, _Lane] = field(default_factory=dict)
    # Lanes by their oldest job. An item is valid only while that job is the oldest and the lane is not
    # paused. A change of a lane adds an item and leaves the old one, which is skipped later.
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
        # Jobs that become ready after a backoff, and lanes that become ready after a pause.
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
        """Add a job at the end, or at its old place if ``order`` is the number that ``pop`` returned.

        The job is not returned before the time ``not_before``.
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
        """Take out the next job, and return its id and order. None if no job is ready."""
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
        """Take out a job, whatever its place. False if it is not here."""
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
        """Return no job of ``lane`` before the time ``until``. A longer pause stays."""
        tenant = self._tenants.get(lane.credential)
        found = tenant.lanes.get(lane) if tenant else None
        if found is not None and until > found.paused_until:
            found.paused_until = until
            heapq.heappush(self._timers, (until, next(self._count), found))
            self._stale += 1
            self._compact()

    def allow(self, lane: Lane, room: int | None) -> None:
        """Return ``room`` more jobs of ``lane``, and then no more. None: any number."""
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
        """The time of the next timer, which may be in the past. None: there is no timer."""
        return self._timers[0][0] if self._timers else None

    def position(self, job_id: str) -> QueuePosition | None:
        """The position of a job, estimated in constant time. None if it is not here.

        A credential has one turn in each round of the credentials that have a job ready.
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
            if len(lane.heap) > 1:  # the item of the former oldest job is stale now
                self._stale += 1
                self._compact()

    def _announce(self, lane: _Lane) -> None:
        """Make the lane's oldest job known to its tenant, and the tenant to the ring."""
        self._push_head(lane)
        self._ring.setdefault(lane.key.credential, lane.tenant)

    def _push_head(self, lane: _Lane) -> None:
        # The count breaks ties: a lane may be in the heap twice with one job, and lanes have no order.
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
        """Drop removed jobs from the top of a lane. Returns whether a job is left."""
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
            # Clients can invent credentials and models: keep nothing for a lane without jobs.
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
        """Drop stale items once they outnumber the valid ones, so that memory stays bounded."""
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
