"""Outcomes until they expire. Pure: the time, in seconds since the epoch, is a parameter."""

from __future__ import annotations

import heapq
from typing import cast

from asyncproxy.core.jobs import Outcome

__all__ = ["ExpiringResults"]


class ExpiringResults:
    """Outcomes by id.

    Their ids wait in a bucket for each second in which one expires, and only the bucket of the second
    that it is gets sorted: to keep an outcome and to let it expire costs the same for a thousand as for
    a million. A heap of all, as caches with a lifetime per entry have, would cost more with each.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._outcomes = _dict_with_hashes()
        self._buckets: dict[int, list[str]] = {}  # by the second
        self._seconds: list[int] = []  # a heap of those that there are buckets for
        self._ripe: list[tuple[float, str]] = []  # out of their bucket; the last one expires first
        self._stale = 0  # ids in buckets whose outcome has gone before its time

    def __len__(self) -> int:
        return len(self._outcomes)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._outcomes

    def keep(self, outcome: Outcome) -> None:
        """Add an outcome whose id is not here."""
        self._outcomes[outcome.id] = outcome
        self.bytes += outcome.size
        self._file(outcome)

    def get(self, job_id: str, now: float) -> Outcome | None:
        """An outcome that has not expired."""
        outcome = self._outcomes.get(job_id)
        return outcome if outcome is not None and now < outcome.expires_at else None

    def pop(self, job_id: str, now: float) -> Outcome | None:
        """Take out an outcome before its time. None: it is not here any more."""
        outcome = self.get(job_id, now)
        if outcome is not None:
            self._forget(outcome)
            self._stale += 1
            if self._stale > 64 + len(self._outcomes):  # the ids take memory too
                self._refile()
        return outcome

    def expire(self, now: float) -> None:
        """Forget what has expired."""
        seconds, ripe = self._seconds, self._ripe
        while seconds and seconds[0] <= now:
            second = heapq.heappop(seconds)
            bucket = self._buckets.pop(second)
            if second + 1 <= now:  # all of it is overdue
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
        """Forget an outcome whose time has come, if it is here."""
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
        """Put each id where it belongs, and no other one."""
        self._buckets, self._seconds, self._ripe, self._stale = {}, [], [], 0
        for outcome in self._outcomes.values():
            self._file(outcome)


def _dict_with_hashes() -> dict[str, Outcome]:
    """A dict that keeps the hashes of its keys, as CPython's do once a key was no ``str``.

    One that never had any but ``str`` asks each key that is in the way of another for its hash: at a
    million outcomes, that is memory which no cache holds.
    """
    outcomes: dict[str | None, Outcome | None] = {None: None}
    del outcomes[None]
    return cast("dict[str, Outcome]", outcomes)
