"""The pace that an upstream takes from a lane: fewer calls in flight, then pauses between them. Pure.

Additive increase, multiplicative decrease (Chiu and Jain, 1989), by loss and not by delay: a gateway
that batches what is in flight gets slower and better with more of it.

A refusal halves the calls that may be in flight, once per round trip: refusals of calls that began
before the last cut say nothing new. Each full round that went well allows one more. A refusal that
leaves one call in flight doubles the gap between two calls, and each call that got through shortens it.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, NamedTuple

from asyncproxy.core.jobs import Lane

__all__ = ["Flight", "RateLimits"]

# A call that got through leaves so much of the gap: some seven calls pass for each one that is refused.
_SHORTER: Final = 0.9
# A gap that is shorter than this part of the first one is none.
_NO_GAP: Final = 0.1


@dataclass(slots=True, eq=False)
class _Pace:
    """What is known of one lane."""

    in_flight: int = 0
    limit: int | None = None  # None: as many as the upstream's concurrency allows
    gap_s: float = 0.0
    began: int = 0  # calls so far
    cut_at: int = 0  # calls that had begun at the last cut
    good: int = 0  # calls that got through since the limit changed
    idle_since: float = 0.0  # when its last call ended


class Flight(NamedTuple):
    """A call in flight: its lane, and its number there."""

    lane: Lane
    pace: _Pace
    number: int


class RateLimits:
    """Knows the lanes that have a call in flight, and those that are slowed down.

    ``ceiling`` is the concurrency of the upstream, ``base_s`` its first and ``max_s`` its longest wait.
    """

    def __init__(self, *, ceiling: int, base_s: float, max_s: float) -> None:
        self._lanes: dict[Lane, _Pace] = {}
        self._busy: set[Lane] = set()
        self.reconfigure(ceiling=ceiling, base_s=base_s, max_s=max_s)

    def reconfigure(self, *, ceiling: int, base_s: float, max_s: float) -> None:
        """Go by other numbers from now on."""
        self._ceiling = ceiling
        self._base_s = base_s
        self._max_s = max_s

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def limited(self) -> int:
        """How many lanes are slowed down."""
        return sum(pace.limit is not None for pace in self._lanes.values())

    @property
    def busy(self) -> AbstractSet[Lane]:
        """The lanes that have a call in flight."""
        return self._busy

    def limited_lanes(self) -> list[Lane]:
        """The lanes that are slowed down."""
        return [lane for lane, pace in self._lanes.items() if pace.limit is not None]

    def idle(self) -> list[tuple[Lane, int]]:
        """The lanes that are slowed down and have no call in flight, and how many each may have."""
        return [
            (lane, pace.limit)
            for lane, pace in self._lanes.items()
            if pace.limit is not None and not pace.in_flight
        ]

    def began(self, lane: Lane) -> Flight:
        """Note that a call of ``lane`` begins."""
        pace = self._lanes.get(lane)
        if pace is None:
            pace = self._lanes[lane] = _Pace()
        if not pace.in_flight:
            self._busy.add(lane)
        pace.in_flight += 1
        pace.began += 1
        return Flight(lane, pace, pace.began)

    def got_through(self, flight: Flight) -> float:
        """Note that a call was taken. Returns the gap in seconds to leave before the next one."""
        pace = flight.pace
        if pace.limit is None:
            return 0.0
        if pace.gap_s:
            pace.gap_s *= _SHORTER
            if pace.gap_s < _NO_GAP * self._base_s:
                pace.gap_s = 0.0
            return pace.gap_s
        pace.good += 1
        if pace.good >= pace.limit:
            pace.limit, pace.good = pace.limit + 1, 0
            if pace.limit >= self._ceiling:
                pace.limit = None
        return 0.0

    def refused(self, flight: Flight) -> float:
        """Note that a call was refused. Returns the gap in seconds to leave before the next one."""
        pace = flight.pace
        if flight.number <= pace.cut_at:
            return pace.gap_s
        pace.limit = max(1, pace.in_flight // 2)
        if pace.limit == 1:
            # One at a time may still be too many. Without a gap the limit would swing between 1 and 2.
            pace.gap_s = min(max(2 * pace.gap_s, self._base_s), self._max_s)
        pace.cut_at, pace.good = pace.began, 0
        return pace.gap_s

    def ended(self, flight: Flight, now: float) -> None:
        """Note that a call is in flight no more, however it ended."""
        pace = flight.pace
        pace.in_flight -= 1
        if pace.in_flight:
            return
        pace.idle_since = now
        self._busy.discard(flight.lane)
        if pace.limit is None:
            del self._lanes[flight.lane]

    def room(self, flight: Flight) -> int | None:
        """How many more calls of a lane may begin now. None: any number."""
        pace = flight.pace
        return None if pace.limit is None else max(0, pace.limit - pace.in_flight)

    def tidy(self, now: float) -> list[Lane]:
        """Forget the lanes that made no call for two of the longest waits, and name them."""
        before = now - 2 * self._max_s
        quiet = [
            lane
            for lane, pace in self._lanes.items()
            if not pace.in_flight and pace.idle_since <= before
        ]
        for lane in quiet:
            del self._lanes[lane]
        return quiet
