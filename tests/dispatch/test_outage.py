"""The state table of an upstream: there, away, returning."""

from __future__ import annotations

import math
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncproxy.dispatch.outage import Outage, Presence


def make(ceiling: int = 8) -> Outage:
    return Outage(ceiling=ceiling, base_s=1.0, max_s=30.0, rng=random.Random(1))


def go_away(outage: Outage, now: float = 100.0) -> int:
    """The epoch of a call that was not taken."""
    epoch = outage.admit()
    assert outage.not_taken(epoch, now)
    return epoch


def ask(outage: Outage) -> int:
    """A call that asks whether the upstream is back, as soon as one may."""
    assert outage.wait_s(outage.ask_at) == 0
    return outage.admit()


def test_an_upstream_that_is_there_takes_as_many_calls_as_its_concurrency() -> None:
    outage = make(3)
    for _ in range(3):
        assert outage.wait_s(0.0) == 0
        outage.admit()
    assert outage.wait_s(0.0) == math.inf
    outage.leave(0)
    assert outage.wait_s(0.0) == 0


def test_the_first_call_that_is_not_taken_says_that_the_upstream_is_away() -> None:
    outage = make()
    epochs = [outage.admit() for _ in range(8)]
    assert [outage.not_taken(epoch, 100.0) for epoch in epochs] == [True] + [False] * 7
    assert outage.presence is Presence.AWAY
    assert outage.since == 100.0
    assert outage.asked == 1, "calls from before the outage say nothing about it"


def test_one_call_at_a_time_asks_and_not_before_its_time() -> None:
    outage = make()
    go_away(outage)
    assert 0 < outage.wait_s(100.0) <= 1
    epoch = ask(outage)
    assert outage.wait_s(1e9) == math.inf
    outage.not_taken(epoch, 200.0)
    outage.leave(epoch)
    assert 200 <= outage.ask_at <= 202


def test_the_waits_between_calls_that_ask_grow_to_their_bound() -> None:
    outage, now = make(), 100.0
    go_away(outage, now)
    waits = []
    for _ in range(200):
        waits.append(outage.ask_at - now)
        now = outage.ask_at
        epoch = ask(outage)
        outage.not_taken(epoch, now)
        outage.leave(epoch)
    assert max(waits) <= 30
    assert 10 < sum(waits[10:]) / len(waits[10:]) < 20, "full jitter: half of the bound on average"


def test_a_wait_that_the_upstream_asks_for_is_kept() -> None:
    outage = make()
    outage.not_taken(outage.admit(), 100.0, asked_s=90.0)
    assert outage.ask_at == 190.0


def test_a_call_that_gets_through_brings_the_upstream_back_slowly() -> None:
    outage = make(8)
    go_away(outage)
    epoch = ask(outage)
    assert outage.got_through(epoch)
    outage.leave(epoch)
    limits = [outage.limit]
    while outage.presence is Presence.RETURNING:
        round_ = [outage.admit() for _ in range(outage.limit)]
        assert outage.wait_s(1e9) == math.inf
        for epoch in round_:
            assert not outage.got_through(epoch)
            outage.leave(epoch)
        limits.append(outage.limit)
    assert limits == [2, 4, 8]
    assert outage.presence is Presence.THERE


def test_an_upstream_that_goes_away_while_it_returns_begins_anew() -> None:
    outage = make(8)
    go_away(outage)
    outage.got_through(ask(outage))
    epoch = outage.admit()
    assert outage.not_taken(epoch, 300.0)
    assert outage.since == 300.0
    assert outage.asked == 1


def test_an_answer_to_a_call_from_before_the_outage_says_nothing() -> None:
    outage = make()
    before, other = outage.admit(), outage.admit()
    outage.not_taken(before, 100.0)
    assert not outage.got_through(other)
    assert outage.presence is Presence.AWAY


def test_a_call_that_asks_and_is_given_up_lets_the_next_one_ask() -> None:
    outage = make()
    go_away(outage)
    outage.leave(ask(outage))
    assert outage.wait_s(outage.ask_at) == 0


def test_concurrency_of_one_is_there_as_soon_as_it_is_back() -> None:
    outage = make(1)
    go_away(outage)
    outage.got_through(ask(outage))
    assert outage.presence is Presence.THERE


def test_another_concurrency_holds_at_once_and_the_outage_stays() -> None:
    outage = make(8)
    outage.reconfigure(ceiling=3, base_s=1.0, max_s=30.0)
    assert outage.limit == 3
    go_away(outage)
    outage.reconfigure(ceiling=20, base_s=1.0, max_s=30.0)
    assert outage.presence is Presence.AWAY


class Upstreams(RuleBasedStateMachine):
    """Any history of admissions, answers, refusals, aborts and time."""

    def __init__(self) -> None:
        super().__init__()
        self.outage = make(5)
        self.now = 0.0
        self.in_flight: list[int] = []

    @precondition(lambda self: self.outage.wait_s(self.now) == 0)
    @rule()
    def begin(self) -> None:
        self.in_flight.append(self.outage.admit())

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), how=st.sampled_from(["through", "not_taken", "aborted"]))
    def end(self, data: st.DataObject, how: str) -> None:
        epoch = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        if how == "through":
            self.outage.got_through(epoch)
        elif how == "not_taken":
            self.outage.not_taken(epoch, self.now)
        self.outage.leave(epoch)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_limit_never_passes_the_concurrency(self) -> None:
        assert 1 <= self.outage.limit <= 5
        current = sum(epoch == self.outage.epoch for epoch in self.in_flight)
        assert current <= 5
        if self.outage.presence is Presence.AWAY:
            assert current <= 1

    @invariant()
    def no_job_waits_for_ever(self) -> None:
        """With nothing in flight a call may be made within the longest wait."""
        if not any(epoch == self.outage.epoch for epoch in self.in_flight):
            assert self.outage.wait_s(self.now) <= 30


TestUpstreams = Upstreams.TestCase
TestUpstreams.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
