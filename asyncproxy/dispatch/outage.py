"""Whether an upstream takes calls, and how many at once. Pure: the clock is passed in.

    there ──a call was not taken──▶ away ──a call got through──▶ returning ──▶ there
      ▲                              ▲  one call at a time asks        │
      │                              └──────a call was not taken───────┤
      └───────────────each round that went well doubles the limit──────┘

An *epoch* begins each time the upstream goes away. A call belongs to the epoch in which it was
admitted: what becomes of a call from before says nothing about now.
"""

from __future__ import annotations

import enum
import math
import random
from typing import Final

from asyncproxy.dispatch.retry import backoff

__all__ = ["Outage", "Presence"]

# Calls at once when an upstream has just come back.
_FIRST_LIMIT: Final = 1


class Presence(enum.Enum):
    """What is known of an upstream."""

    THERE = "there"
    AWAY = "away"
    RETURNING = "returning"


class Outage:
    """Admits the calls of one upstream.

    ``ceiling`` is its configured concurrency. ``base_s`` and ``max_s`` bound the waits between two
    calls that ask whether the upstream is back.
    """

    def __init__(self, *, ceiling: int, base_s: float, max_s: float, rng: random.Random) -> None:
        self.presence = Presence.THERE
        self.limit = ceiling
        self.since = 0.0  # when the upstream went away; kept until it is there again
        self.ask_at = 0.0  # while it is away: when a call may ask
        self.epoch = 0
        self.asked = 0  # calls that were not taken, in a row
        self._ceiling = ceiling
        self._base_s = base_s
        self._max_s = max_s
        self._rng = rng
        self._admitted = 0  # in this epoch, and not left yet
        self._good = 0  # got through since the limit was raised

    def reconfigure(self, *, ceiling: int, base_s: float, max_s: float) -> None:
        """Go by other numbers from now on. What is known of the upstream stays."""
        self._base_s, self._max_s = base_s, max_s
        self._ceiling = ceiling
        self.limit = ceiling if self.presence is Presence.THERE else min(self.limit, ceiling)

    def wait_s(self, now: float) -> float:
        """Seconds until a call may be admitted: 0 is now, infinite is "when another one has left"."""
        if self.presence is Presence.AWAY:
            return math.inf if self._admitted else max(0.0, self.ask_at - now)
        return 0.0 if self._admitted < self.limit else math.inf

    def admit(self) -> int:
        """Admit a call. Returns its epoch, which :meth:`leave` and the others take."""
        self._admitted += 1
        return self.epoch

    def leave(self, epoch: int) -> None:
        """Note that an admitted call has ended, or was never made."""
        if epoch == self.epoch:
            self._admitted -= 1

    def got_through(self, epoch: int) -> bool:
        """Note that a call was answered by the upstream itself. True: the upstream has come back."""
        if self.presence is Presence.THERE or epoch != self.epoch:
            return False
        came_back = self.presence is Presence.AWAY
        if came_back:
            self.presence, self.limit, self.asked, self._good = Presence.RETURNING, _FIRST_LIMIT, 0, 0
        self._good += 1
        if self._good >= self.limit:
            self.limit, self._good = min(2 * self.limit, self._ceiling), 0
        if self.limit >= self._ceiling:
            self.presence = Presence.THERE
        return came_back

    def not_taken(self, epoch: int, now: float, *, asked_s: float | None = None) -> bool:
        """Note that a call was not taken. True: the upstream has gone away just now.

        ``asked_s`` is the wait that the upstream asks for, if it does.
        """
        if epoch != self.epoch:
            return False
        went = self.presence is not Presence.AWAY
        if went:
            self.presence = Presence.AWAY
            self.since = now
            self.epoch += 1
            self._admitted = 0
        self.asked += 1
        wait_s = backoff(self.asked, base_s=self._base_s, max_s=self._max_s, rng=self._rng)
        self.ask_at = now + (wait_s if asked_s is None else max(asked_s, wait_s))
        return went
