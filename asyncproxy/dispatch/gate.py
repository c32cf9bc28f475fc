"""What keeps calls from an upstream that does not take them: its outage, and the pace of its lanes.

No I/O: the clocks are passed in, and what changes for the store is told to ``allow``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from asyncproxy.core.errors import CallError
from asyncproxy.core.jobs import Job, Lane, UpstreamResponse
from asyncproxy.dispatch.outage import Outage, Presence
from asyncproxy.dispatch.rate_limits import Flight, RateLimits
from asyncproxy.dispatch.retry import Ending, ending_of
from asyncproxy.dispatch.verdict import CallPolicy

__all__ = ["Change", "Gate", "Passage"]

# While an upstream is away, a job that has asked comes back so much later than the next call that asks,
# or by the longest wait if that is less: if other jobs wait, one of them asks.
_AFTER_THE_NEXT_S = 1.0

# How an upstream says that it took the call: whatever became of it.
_TAKEN = frozenset({Ending.SUCCEEDED, Ending.REFUSED, Ending.FAILED, Ending.RATE_LIMITED})


class Passage(NamedTuple):
    """A call that was let through:

    its epoch, its place in its lane, and when it began (epoch seconds).
    """

    epoch: int
    flight: Flight
    began_at: float


class Change(NamedTuple):
    """An upstream went away (``away``), or came back after ``away_s``. ``reason`` is what was seen."""

    away: bool
    away_s: float
    reason: str


class Gate:
    """Lets the calls of one upstream through.

    ``clock`` gives seconds since the epoch, ``monotonic`` paces, ``rng`` jitters. ``allow`` tells the
    store how many more jobs of a lane may be claimed (None: any number).
    """

    def __init__(
        self,
        policy: CallPolicy,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        rng: random.Random,
        allow: Callable[[Lane, int | None], None],
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._allow = allow
        self.outage = Outage(
            ceiling=policy.concurrency, base_s=policy.backoff_s, max_s=policy.max_backoff_s, rng=rng
        )
        self.rate_limits = RateLimits(
            ceiling=policy.concurrency, base_s=policy.backoff_s, max_s=policy.max_backoff_s
        )
        self._margin_s = min(_AFTER_THE_NEXT_S, policy.max_backoff_s)
        self.reason = ""  # what was seen last of an upstream that is away
        self.changes: list[Change] = []  # since somebody looked
        self._taken_at = -math.inf  # when a call was taken last, in seconds since the epoch

    def reconfigure(self, policy: CallPolicy) -> None:
        """Go by another policy from now on. What is known of the upstream stays."""
        bounds = {"base_s": policy.backoff_s, "max_s": policy.max_backoff_s}
        self._margin_s = min(_AFTER_THE_NEXT_S, policy.max_backoff_s)
        self.outage.reconfigure(ceiling=policy.concurrency, **bounds)
        self.rate_limits.reconfigure(ceiling=policy.concurrency, **bounds)

    @property
    def is_away(self) -> bool:
        """Whether the upstream takes no calls."""
        return self.outage.presence is Presence.AWAY

    @property
    def away_s(self) -> float:
        """For how long the upstream has been away. 0: it is there."""
        return self._monotonic() - self.outage.since if self.is_away else 0.0

    def begin(self, job: Job, epoch: int) -> Passage:
        """Note that an admitted call for ``job`` begins."""
        return Passage(epoch, self.rate_limits.began(job.lane), self._clock())

    def end(
        self,
        passage: Passage,
        job: Job,
        outcome: UpstreamResponse | CallError | None,
        asked_s: float | None,
    ) -> tuple[Ending, float]:
        """Note how a call has ended: None if it was aborted.

        Returns what that means, and the seconds that the job's upstream or lane has to wait for.
        """
        now = self._monotonic()
        wait_s = 0.0
        if outcome is None:
            ending = Ending.REFUSED
        else:
            ending = self._ending(outcome, job, passage)
            wait_s = self._noted(ending, outcome, passage, now, asked_s)
        flight = passage.flight
        was_limited = flight.pace.limit is not None
        self.rate_limits.ended(flight, now)
        if was_limited or flight.pace.limit is not None:
            self._allow(flight.lane, self.rate_limits.room(flight))
        return ending, wait_s

    def tidy(self) -> None:
        """Forget the lanes that are quiet."""
        for lane in self.rate_limits.tidy(self._monotonic()):
            self._allow(lane, None)

    def _ending(self, outcome: UpstreamResponse | CallError, job: Job, passage: Passage) -> Ending:
        ending = ending_of(outcome)
        if ending is not Ending.AWAY_OR_FAILED:
            return ending
        # A job that is refused like this while others get through breaks the upstream by itself.
        since = job.held_at or passage.began_at
        return Ending.FAILED if self._taken_at > since else Ending.AWAY

    def _noted(
        self,
        ending: Ending,
        outcome: UpstreamResponse | CallError,
        passage: Passage,
        now: float,
        asked_s: float | None,
    ) -> float:
        """Adjust outage and pace. Returns the seconds to wait."""
        outage, flight = self.outage, passage.flight
        answered = isinstance(outcome, UpstreamResponse)
        if ending in _TAKEN and answered:
            self._taken_at = self._clock()
            if outage.got_through(passage.epoch):
                self.changes.append(Change(away=False, away_s=now - outage.since, reason=self.reason))
            if ending is Ending.RATE_LIMITED:
                return self.rate_limits.refused(flight)
            return self.rate_limits.got_through(flight)
        if ending is Ending.AWAY and answered and self._taken_at > passage.began_at:
            return self.rate_limits.refused(flight)  # others get through: it is this lane's alone
        if ending is Ending.REFUSED:
            return 0.0  # an error of ours, which says nothing about the upstream
        if ending is Ending.AWAY or outage.presence is not Presence.THERE:
            self.reason = str(outcome.status) if isinstance(outcome, UpstreamResponse) else outcome.code
            if outage.not_taken(passage.epoch, now, asked_s=asked_s):
                self.changes.append(Change(away=True, away_s=0.0, reason=self.reason))
            return max(0.0, outage.ask_at - now) + self._margin_s
        return 0.0
