"""Queue positions of jobs in Redis, estimated from the replies that this node has seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from asyncproxy.core.jobs import Job, Lane
from asyncproxy.stores.fair_queue import QueuePosition

__all__ = ["QueuePositions"]

# A position is read right after its job, so a node need not keep many turns.
_MOST_TURNS: Final = 4096


class QueuePositions:
    """The turns of jobs: how many jobs of the upstream leave the queue before it, in all."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._turns: OrderedDict[str, int] = OrderedDict()
        self._gone: dict[str, int] = {}
        self._not_before: dict[str | Lane, float] = {}
        self._unserved: dict[str, float] = {}  # upstream → when its jobs go to another one

    def note_turn(self, job_id: str, turn: int) -> None:
        """Note the turn of a job."""
        self._turns[job_id] = turn
        if len(self._turns) > _MOST_TURNS:
            self._turns.popitem(last=False)

    def note_gone(self, upstream: str, count: int) -> None:
        """Note how many jobs of an upstream have left its queue so far."""
        if count > self._gone.get(upstream, 0):
            self._gone[upstream] = count

    def hold_back(self, what: str | Lane, delay_s: float) -> None:
        """Note that a job (by its id) or a lane cannot be claimed for ``delay_s``."""
        until = self._monotonic() + delay_s
        self._not_before[what] = max(until, self._not_before.get(what, 0.0))

    def note_unserved(self, waits: Iterable[tuple[str, float]]) -> None:
        """Note the upstreams that no node serves, and the seconds until their jobs are rerouted."""
        now = self._monotonic()
        self._unserved = {upstream: now + wait_s for upstream, wait_s in waits}

    def tidy(self) -> None:
        """Drop the delays that are over."""
        now = self._monotonic()
        for what in [what for what, until in self._not_before.items() if until <= now]:
            del self._not_before[what]

    def of(self, job: Job) -> QueuePosition | None:
        """The queue position of a waiting job. None: it is unknown here."""
        turn = self._turns.get(job.id)
        held = [self._not_before.get(what, 0.0) for what in (job.id, job.lane)]
        if self._unserved and (until := self._unserved.get(job.upstream)) is not None:
            held = [until]  # backoffs and pauses do not count for an unserved upstream
        if turn is None and not any(held):
            return None
        ahead = 0 if turn is None else max(0, turn - self._gone.get(job.upstream, 0))
        return QueuePosition(ahead, max(held))
