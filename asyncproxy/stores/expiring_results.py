"""Outcomes until they expire. Pure: the time, in seconds since the epoch, is a parameter."""

from __future__ import annotations

import heapq
from typing import cast

from asyncproxy.core.jobs import Outcome

__all__ = ["ExpiringResults"]


class ExpiringResults:
    """Outcomes by id.

    Outcomes that expire in the same second share a bucket of ids. Only the bucket of the current second
    is sorted. So adding and expiring an outcome costs the same among a thousand as among a million. A
    cache with a lifetime per entry has a heap of all entries, whose cost grows with their number.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._outcomes = _dict_with_hashes()
        self._buckets: dict[int, list[str]] = {}  # by the second
        self._seconds: list[int] = []  # a heap of the seconds that have a bucket
        self._ripe: list[tuple[float, str]] = []  # taken out of a bucket; the last one expires first
        self._stale = 0  # ids in buckets whose outcome was taken out before its time

    def __len__(self) -> int:
        return len(self._outcomes)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._outcomes

    def keep(self, outcome: Outcome) -> None:
        """Add an outcome. Its id must be new."""
        self._outcomes[outcome.id] = outcome
        self.bytes += outcome.size
        self._file(outcome)

    def get(self, job_id: str, now: float) -> Outcome | None:
        """An outcome that has not expired."""
        outcome = self._outcomes.get(job_id)
        return outcome if outcome is not None and now < outcome.expires_at else None

    def pop(self, job_id: str, now: float) -> Outcome | None:
        """Take out an outcome before it expires. None: it has expired or was taken out."""
        outcome = self.get(job_id, now)
        if outcome is not None:
            self._forget(outcome)
            self._stale += 1
            if self._stale > 64 + len(self._outcomes):  # the ids take memory too
                self._refile()
        return outcome

    def expire(self, now: float) -> None:
        """Drop the outcomes that have expired."""
        seconds, ripe = self._seconds, self._ripe
        while seconds and seconds[0] <= now:
            second = heapq.heappop(seconds)
            bucket = self._buckets.pop(second)
            if second + 1 <= now:  # every id of the bucket has expired
                for job_id in bucket:
                    self._let_go(job_id)
            else:
                outcomes = self._outcomes
                there = [job_id for job_id in bucket if job_id in outcomes]
                self._stale -= len(bucket) - len(there)
                ripe += [(outcomes[job_id].expires_at, job_id) for job_id in there]
                ripe.sort(reverse=True)
        while ripe and ripe[-1][0] <= now:
            self._let_go(ripe.pop()[1])

    def _let_go(self, job_id: str) -> None:
        """Drop an expired outcome, if it is still here."""
        outcome = self._outcomes.get(job_id)
        if outcome is None:
            self._stale -= 1
        else:
            self._forget(outcome)

    def _forget(self, outcome: Outcome) -> None:
        del self._outcomes[outcome.id]
        self.bytes -= outcome.size

    def _file(self, outcome: Outcome) -> None:
        second = int(outcome.expires_at)
        bucket = self._buckets.get(second)
        if bucket is None:
            bucket = self._buckets[second] = []
            heapq.heappush(self._seconds, second)
        bucket.append(outcome.id)

    def _refile(self) -> None:
        """Build all buckets anew, without stale ids."""
        self._buckets, self._seconds, self._ripe, self._stale = {}, [], [], 0
        for outcome in self._outcomes.values():
            self._file(outcome)


def _dict_with_hashes() -> dict[str, Outcome]:
    """A dict that stores the hashes of its keys.

    A dict with only ``str`` keys (CPython 3.11 or newer) stores no hashes, so a collision reads the
    other key's object: a cache miss each, with a million outcomes. A key of another type makes the dict
    store hashes, also after that key was deleted.
    """
    outcomes: dict[str | None, Outcome | None] = {None: None}
    del outcomes[None]
    return cast("dict[str, Outcome]", outcomes)
