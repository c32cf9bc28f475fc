"""Does a 429 count against the job that got it? Pure.

An upstream that lets one request a second through answers all others 429. Were each of these an
attempt, the jobs behind would fail for having waited their turn. So it counts only if nothing of the
lane got through since the job's last 429: then the limit is no limit but a refusal (a quota that is
used up, say), and ends as one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncproxy.jobs import Job, Lane

__all__ = ["RateLimits"]


@dataclass(slots=True)
class _Limited:
    progress: int = 0
    seen: dict[str, int] = field(default_factory=dict)  # job id → progress at its last 429


class RateLimits:
    """Remembers the jobs that were told to slow down, and nothing of the others."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _Limited] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def counts(self, job: Job) -> bool:
        """Note that ``job`` was told to slow down. Whether that counts as an attempt."""
        lane = self._lanes.setdefault(job.lane, _Limited())
        before = lane.seen.get(job.id)
        lane.seen[job.id] = lane.progress
        return before is None or before == lane.progress

    def progressed(self, lane: Lane) -> None:
        """Note that a call of ``lane`` got through."""
        if self._lanes and (limited := self._lanes.get(lane)) is not None:
            limited.progress += 1

    def forget(self, job: Job) -> None:
        """Note that ``job`` is done."""
        if self._lanes and (limited := self._lanes.get(job.lane)) is not None:
            limited.seen.pop(job.id, None)
            if not limited.seen:
                del self._lanes[job.lane]
