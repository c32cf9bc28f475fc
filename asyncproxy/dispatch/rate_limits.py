"""Is a 429 a limit, or a refusal? Pure.

An upstream that serves one call at a time answers all others 429. Were each of these an attempt, the
jobs behind would fail for having waited their turn. So what counts is the 429s in a row while nothing
of the lane gets through: then it is no limit but a refusal (a quota that is used up, say), and is
taken as one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from asyncproxy.core.jobs import Job, Lane

__all__ = ["RateLimits"]


class _Refusal(NamedTuple):
    """The last 429 of a job that counted: its lane's progress and calls by then."""

    in_a_row: int
    progress: int
    calls: int


@dataclass(slots=True)
class _Lane:
    calls: int = 0
    progress: int = 0
    under_way: dict[str, int] = field(default_factory=dict)  # job id → number of its call, oldest first
    refused: dict[str, _Refusal] = field(default_factory=dict)


class RateLimits:
    """Knows the lanes that have a call under way, or a job that was told to slow down."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _Lane] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def started(self, job: Job) -> None:
        """Note that a call for ``job`` is under way."""
        lane = self._lanes.get(job.lane)
        if lane is None:
            lane = self._lanes[job.lane] = _Lane()
        lane.calls += 1
        lane.under_way[job.id] = lane.calls

    def ended(self, job: Job, *, progress: bool) -> None:
        """Note that the call for ``job`` has ended, and whether it got through."""
        lane = self._lanes[job.lane]
        del lane.under_way[job.id]
        lane.progress += progress
        self._drop_if_idle(job, lane)

    def refused(self, job: Job) -> int:
        """Note that the call for ``job``, still under way here, got a 429.

        How many that makes in a row, while nothing of the lane got through.
        """
        lane = self._lanes[job.lane]
        before = lane.refused.get(job.id)
        if before is None or lane.progress > before.progress:
            in_a_row = 1
        elif next(iter(lane.under_way.values())) > before.calls:
            in_a_row = before.in_a_row + 1
        else:
            return before.in_a_row  # a call from before it is still under way: it may get through
        lane.refused[job.id] = _Refusal(in_a_row, lane.progress, lane.calls)
        return in_a_row

    def forget(self, job: Job) -> None:
        """Note that ``job`` is done."""
        lane = self._lanes.get(job.lane)
        if lane is not None and lane.refused.pop(job.id, None) is not None:
            self._drop_if_idle(job, lane)

    def _drop_if_idle(self, job: Job, lane: _Lane) -> None:
        if not lane.under_way and not lane.refused:
            del self._lanes[job.lane]
