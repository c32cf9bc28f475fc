"""What keeps calls from an upstream that does not take them: its outage, and the pace of its lanes.

No I/O: the clocks are passed in, and what changes for the store is told to ``allow``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from asyncproxy.core.errors import CallError, UpstreamUnreachable
from asyncproxy.core.jobs import Job, Lane, UpstreamResponse
from asyncproxy.dispatch.outage import Outage, Presence
from asyncproxy.dispatch.rate_limits import Flight, RateLimits
from asyncproxy.dispatch.retry import Ending, ending_of
from asyncproxy.dispatch.verdict import CallPolicy

__all__ = ["Change", "Gate", "Passage"]

# While an upstream is away, a job that has asked comes back so much later than the next call that asks,
# or by the longest wait if that is less: if other jobs wait, one of them asks.
_AFTER_THE_NEXT_S = 1.0

# Jobs remembered because their last call broke. The first are forgotten first.
_MOST_BROKEN = 4096

# Refused answers in a row, in rounds of all workers, after which an upstream is away.
_TOO_MANY_ROUNDS = 2

# How an answer says that the upstream did not take the call.
_REFUSALS = frozenset({Ending.AWAY, Ending.AWAY_OR_FAILED})


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
        self._policy = policy
        self.reason = ""  # what was seen last of an upstream that is away
        self.changes: list[Change] = []  # since somebody looked
        # When the call began that was taken and began last, in seconds since the epoch. The end of a
        # call does not count: a gateway that shuts down ends old calls and takes no new ones.
        self._taken_at = -math.inf
        self._suspects: set[Lane] = set()  # lanes that were refused since a call was taken
        self._suspects_since = math.inf  # when the first of them was, in seconds since the epoch
        # The lanes whose last answer was a refusal: when the first and the last refusal came.
        self._refused: dict[Lane, tuple[float, float]] = {}
        self._refused_in_a_row = 0  # answers since a call was taken
        self._broken: dict[str, None] = {}  # jobs with one attempt left whose last call broke
        self._passed_over: set[str] = set()  # jobs that let others ask first
        self._last_chance = ""  # the broken job whose last attempt is in flight
        self._closed = False

    def reconfigure(self, policy: CallPolicy) -> None:
        """Go by another policy from now on. What is known of the upstream stays."""
        bounds = {"base_s": policy.backoff_s, "max_s": policy.max_backoff_s}
        self._policy = policy
        self.outage.reconfigure(ceiling=policy.concurrency, **bounds)
        self.rate_limits.reconfigure(ceiling=policy.concurrency, **bounds)

    def __len__(self) -> int:
        """How many lanes and jobs are remembered."""
        lanes = len(self.rate_limits) + len(self._refused) + len(self._suspects)
        return lanes + len(self._broken) + len(self._passed_over)

    @property
    def _margin_s(self) -> float:
        return min(_AFTER_THE_NEXT_S, self._policy.max_backoff_s)

    @property
    def is_away(self) -> bool:
        """Whether the upstream takes no calls."""
        return self.outage.presence is Presence.AWAY

    @property
    def away_s(self) -> float:
        """For how long the upstream has been away. 0: it is there."""
        return self._monotonic() - self.outage.since if self.is_away else 0.0

    def may_begin(self, job: Job) -> bool:
        """Whether a call for ``job`` may begin beside those in flight.

        If the calls of a job broke each time, its last attempt waits for the last attempt of another
        such job. One of them may break the upstream. Then the other would fail with it. A job that has
        failed before does not ask whether an upstream is back, if a job waits that has not.
        """
        if self._last_chance and job.id in self._broken:
            return False
        if self.is_away and job.attempts and job.id not in self._passed_over:
            self._passed_over.add(job.id)
            return False
        return True

    def begin(self, job: Job, epoch: int) -> Passage:
        """Note that an admitted call for ``job`` begins."""
        if self._passed_over:
            self._passed_over.clear()
        if job.id in self._broken:
            self._last_chance = job.id
        return Passage(epoch, self.rate_limits.began(job.lane), self._clock())

    def end(
        self,
        passage: Passage,
        job: Job,
        outcome: UpstreamResponse | CallError | None,
        asked_s: float | None,
    ) -> tuple[Ending, float]:
        """Note how a call has ended: None if it was aborted. :meth:`leave` has to follow.

        Returns what that means, and the seconds that the job's upstream or lane has to wait for.
        """
        if self._last_chance == job.id:
            self._last_chance = ""
        self._broken.pop(job.id, None)
        if outcome is None:
            return Ending.REFUSED, 0.0
        ending = ending_of(outcome)
        is_refusal = isinstance(outcome, UpstreamResponse) and ending in _REFUSALS
        all_refused = is_refusal and self._all_refused(passage)
        if ending is Ending.AWAY_OR_FAILED:
            ending = self._away_or_failed(job, passage, all_refused=all_refused)
        if ending is Ending.FAILED and job.attempts + 2 == self._policy.attempts and _broke(outcome):
            self._broken[job.id] = None
            if len(self._broken) > _MOST_BROKEN:
                del self._broken[next(iter(self._broken))]
        now = self._monotonic()
        if is_refusal and not all_refused:
            # Others may get through: it is this lane's alone, or this job's.
            is_lane = ending is Ending.AWAY
            return ending, self.rate_limits.refused(passage.flight) if is_lane else 0.0
        if isinstance(outcome, UpstreamResponse) and not is_refusal:
            return ending, self._taken(ending, passage, now)
        if is_refusal or ending is Ending.AWAY:
            return ending, self._not_taken(outcome, passage, now, asked_s)
        # A call that broke says something about an upstream that is not there, or no more.
        if ending is Ending.FAILED and self.outage.presence is not Presence.THERE:
            return ending, self._not_taken(outcome, passage, now, asked_s)
        return ending, 0.0

    def other_lanes_first_s(self, outcome: UpstreamResponse | CallError, ending: Ending) -> float:
        """Seconds for which no other job of a refused lane may ask either: another lane asks first.

        The upstream may be away for this lane alone. A connection that is refused is refused to all.
        """
        if ending is not Ending.AWAY or not self.is_away or isinstance(outcome, CallError):
            return 0.0
        return self.outage.ask_at - self._monotonic() + self._margin_s / 2

    def leave(self, passage: Passage) -> None:
        """Let the next call of the lane begin.

        To be called after the store knows of the pause that :meth:`end` asked for. Otherwise the store
        hands out the next job of the lane before the pause begins.
        """
        flight = passage.flight
        was_limited = flight.pace.limit is not None
        self.rate_limits.ended(flight, self._monotonic())
        if (was_limited or flight.pace.limit is not None) and not self._closed:
            self._allow(flight.lane, self.rate_limits.room(flight))

    def tidy(self) -> None:
        """Forget the lanes that are quiet, and tell the store again how many calls the others may make.

        A claim that came to nothing took one off and began no call.
        """
        for lane in self.rate_limits.tidy(self._monotonic()):
            self._allow(lane, None)
        before = self._clock() - 2 * self._policy.max_backoff_s
        self._refused = {lane: times for lane, times in self._refused.items() if times[1] > before}
        for lane, limit in self.rate_limits.idle():
            self._allow(lane, limit)

    def close(self) -> None:
        """Limit no lane any more: another gate takes the place of this one."""
        self._closed = True
        for lane in self.rate_limits.limited_lanes():
            self._allow(lane, None)

    def _away_or_failed(self, job: Job, passage: Passage, *, all_refused: bool) -> Ending:
        """What a 502 or 504 is for ``job``."""
        if self.is_away and passage.epoch == self.outage.epoch:
            return Ending.AWAY
        # A job that is refused like this while others get through breaks the upstream by itself.
        if self._taken_at > (job.held_at or passage.began_at):
            return Ending.FAILED
        # So may a job that has failed before, if the upstream goes away with its call.
        return Ending.FAILED if job.attempts and all_refused else Ending.AWAY

    def _taken(self, ending: Ending, passage: Passage, now: float) -> float:
        """Note that the upstream itself answered. Returns the gap before the lane's next call."""
        outage, flight = self.outage, passage.flight
        self._taken_at = max(self._taken_at, passage.began_at)
        if self._refused:
            self._refused.pop(flight.lane, None)
        if passage.began_at > self._suspects_since:
            self._trust()
        if outage.got_through(passage.epoch):
            self.changes.append(Change(away=False, away_s=now - outage.since, reason=self.reason))
        if ending is Ending.RATE_LIMITED:
            return self.rate_limits.refused(flight)
        return self.rate_limits.got_through(flight)

    def _not_taken(
        self,
        outcome: UpstreamResponse | CallError,
        passage: Passage,
        now: float,
        asked_s: float | None,
    ) -> float:
        """Note that the upstream did not take a call. Returns the seconds to wait."""
        outage = self.outage
        self.reason = str(outcome.status) if isinstance(outcome, UpstreamResponse) else outcome.code
        if outage.not_taken(passage.epoch, now, asked_s=asked_s):
            self._trust()
            self.changes.append(Change(away=True, away_s=0.0, reason=self.reason))
        return max(0.0, outage.ask_at - now) + self._margin_s

    def _all_refused(self, passage: Passage) -> bool:
        """Note that a lane was refused. Whether the upstream itself is away, and not only the lane.

        It is if every lane with a call in flight was refused, or so many calls in a row that no call in
        flight can be waited for. A lane that is refused while others get through says nothing.
        """
        lane, now = passage.flight.lane, self._clock()
        first, _ = self._refused.get(lane, (now, now))
        self._refused[lane] = first, now
        if self.is_away:
            return True
        if self._is_alone(lane):
            return False
        if not self._refused_in_a_row:
            self._suspects_since = now
        self._refused_in_a_row += 1
        busy = self.rate_limits.busy
        self._suspects = (self._suspects & busy) | {lane}
        if self._refused_in_a_row >= _TOO_MANY_ROUNDS * self._policy.concurrency:
            return True
        others = busy - self._suspects
        return self._taken_at <= passage.began_at and all(map(self._is_alone, others))

    def _is_alone(self, lane: Lane) -> bool:
        """Whether a lane is refused while others get through."""
        return lane in self._refused and self._taken_at > self._refused[lane][0]

    def _trust(self) -> None:
        """Forget which lanes were refused."""
        self._suspects = set()
        self._suspects_since = math.inf
        self._refused_in_a_row = 0


def _broke(outcome: UpstreamResponse | CallError) -> bool:
    """Whether a failed call may have broken the upstream."""
    if isinstance(outcome, UpstreamResponse):
        return ending_of(outcome) is Ending.AWAY_OR_FAILED
    return isinstance(outcome, UpstreamUnreachable)
