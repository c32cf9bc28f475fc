"""What a call that has ended says about its upstream and its lane."""

from __future__ import annotations

import random

import msgspec
import pytest

from asyncproxy.core import errors
from asyncproxy.core.jobs import Job, Lane, UpstreamResponse
from asyncproxy.dispatch.gate import Gate, Passage
from asyncproxy.dispatch.outage import Presence
from asyncproxy.dispatch.retry import Ending
from asyncproxy.dispatch.verdict import CallPolicy

JOB = Job("a", "embeddings", b"c", "gateway", "m", 1000.0, 60)
OTHER = Job("b", "embeddings", b"d", "gateway", "m", 1000.0, 60)


class Lab:
    """A gate whose clock stands until it is moved."""

    def __init__(self, concurrency: int = 8) -> None:
        self.now = 1000.0
        self.allowed: dict[Lane, int | None] = {}
        self.gate = Gate(
            CallPolicy(concurrency=concurrency, backoff_s=1.0, max_backoff_s=8.0),
            clock=lambda: self.now,
            monotonic=lambda: self.now,
            rng=random.Random(1),
            allow=self.allowed.__setitem__,
        )

    def begin(self, job: Job = JOB) -> Passage:
        passage = self.gate.begin(job, self.gate.outage.admit())
        self.now += 0.001
        return passage

    def end(
        self, passage: Passage, outcome: int | errors.CallError | None, job: Job = JOB
    ) -> tuple[Ending, float]:
        response = UpstreamResponse(outcome, (), ()) if isinstance(outcome, int) else outcome
        found = self.gate.end(passage, job, response, None)
        self.gate.leave(passage)
        self.gate.outage.leave(passage.epoch)
        self.now += 0.001
        return found

    def call(self, outcome: int | errors.CallError | None, job: Job = JOB) -> tuple[Ending, float]:
        return self.end(self.begin(job), outcome, job)


def unreachable() -> errors.UpstreamUnreachable:
    error = errors.UpstreamUnreachable("x")
    error.delivered = False
    return error


@pytest.mark.parametrize("outcome", [unreachable(), 503, 502, 504])
def test_an_upstream_that_takes_no_call_is_away(outcome: int | errors.CallError) -> None:
    lab = Lab()
    ending, wait_s = lab.call(outcome)
    assert ending is Ending.AWAY
    assert lab.gate.is_away
    assert wait_s > lab.gate.outage.ask_at - lab.now, "another job asks first, if one waits"
    assert [change.away for change in lab.gate.changes] == [True]


@pytest.mark.parametrize("status", [200, 400, 404, 429, 500])
def test_an_answer_of_the_upstream_itself_brings_it_back(status: int) -> None:
    lab = Lab()
    lab.call(unreachable())
    lab.now = lab.gate.outage.ask_at
    lab.call(status)
    assert lab.gate.outage.presence is Presence.RETURNING
    away, back = lab.gate.changes
    assert (away.away, back.away) == (True, False)
    assert back.away_s > 0


@pytest.mark.parametrize("status", [502, 504])
def test_a_bad_gateway_is_a_failed_call_while_others_get_through(status: int) -> None:
    lab = Lab()
    passage = lab.begin()
    lab.call(200, OTHER)
    assert lab.end(passage, status)[0] is Ending.FAILED
    assert not lab.gate.is_away


def test_a_job_that_breaks_the_gateway_each_time_is_not_held_back_for_ever() -> None:
    """Behind a load balancer it is 502 while the gateway restarts, and nothing else is in flight."""
    lab = Lab()
    ending, _ = lab.call(502)
    assert ending is Ending.AWAY
    held = msgspec.structs.replace(JOB, held_at=lab.now)
    lab.now = lab.gate.outage.ask_at
    lab.call(200, OTHER)
    assert lab.call(502, held)[0] is Ending.FAILED


def test_unavailable_for_one_lane_alone_is_the_pace_of_that_lane() -> None:
    lab = Lab()
    passage = lab.begin()
    lab.call(200, OTHER)
    ending, wait_s = lab.end(passage, 503)
    assert (ending, wait_s) == (Ending.AWAY, 1.0)
    assert not lab.gate.is_away
    assert lab.allowed == {JOB.lane: 1}


def test_a_rate_limit_tells_the_store_how_many_more_may_be_claimed() -> None:
    lab = Lab()
    first, second, third, fourth = (lab.begin() for _ in range(4))
    lab.end(first, 429)
    assert lab.allowed == {JOB.lane: 0}
    lab.end(second, 429)
    assert lab.allowed == {JOB.lane: 0}
    lab.end(third, 200)
    assert lab.allowed == {JOB.lane: 1}
    lab.end(fourth, 200)
    assert lab.allowed == {JOB.lane: 3}, "a full round went well"


def test_the_store_hears_that_a_quiet_lane_is_limited_no_more() -> None:
    lab = Lab()
    lab.call(429)
    assert lab.allowed == {JOB.lane: 1}
    lab.now += 100
    lab.gate.tidy()
    assert lab.allowed == {JOB.lane: None}
    assert len(lab.gate.rate_limits) == 0


def test_a_call_that_breaks_while_the_upstream_returns_sends_it_away_again() -> None:
    lab = Lab()
    lab.call(unreachable())
    lab.now = lab.gate.outage.ask_at
    lab.call(200)
    ending, _ = lab.call(errors.UpstreamUnreachable("broke off"))
    assert ending is Ending.FAILED, "it is an attempt all the same"
    assert lab.gate.is_away


@pytest.mark.parametrize(
    "error",
    [
        errors.UpstreamUnreachable("broke off"),
        errors.UpstreamTimeout("slow"),
        errors.ResultTooLarge("x"),
    ],
)
def test_a_call_that_breaks_says_nothing_about_an_upstream_that_is_there(
    error: errors.CallError,
) -> None:
    lab = Lab()
    lab.call(error)
    assert lab.gate.outage.presence is Presence.THERE


def test_an_aborted_call_says_nothing() -> None:
    lab = Lab()
    lab.call(unreachable())
    lab.now = lab.gate.outage.ask_at
    lab.call(None)
    assert lab.gate.is_away
    assert lab.gate.outage.wait_s(lab.now) == 0
    assert len(lab.gate.rate_limits) == 0


def test_a_gateway_that_shuts_down_while_it_ends_old_calls_costs_no_attempt() -> None:
    lab = Lab()
    old = [lab.begin(OTHER) for _ in range(5)]
    job = JOB
    for passage in old[:4]:
        assert lab.call(502, job)[0] is Ending.AWAY
        job = msgspec.structs.replace(JOB, held_at=lab.now)
        lab.now += 0.001
        lab.end(passage, 200, OTHER)


def test_a_job_that_failed_before_fails_if_the_upstream_goes_away_with_it_again() -> None:
    lab = Lab()
    suspect = msgspec.structs.replace(JOB, attempts=1)
    assert lab.call(502, suspect)[0] is Ending.FAILED
    assert lab.gate.is_away
    lab.now = lab.gate.outage.ask_at
    assert lab.call(502, suspect)[0] is Ending.AWAY, "it was away before"


def test_one_lane_that_is_refused_does_not_send_the_others_away() -> None:
    """A gateway with many models answers 503 for one of them."""
    lab = Lab()
    good = lab.begin(OTHER)
    for _ in range(6):
        assert lab.call(503)[0] is Ending.AWAY
    assert not lab.gate.is_away
    lab.end(good, 200, OTHER)
    assert not lab.gate.is_away


def test_an_upstream_is_away_once_all_lanes_in_flight_were_refused() -> None:
    lab = Lab()
    first, other = lab.begin(), lab.begin(OTHER)
    lab.end(first, 503)
    assert not lab.gate.is_away
    lab.end(other, 503, OTHER)
    assert lab.gate.is_away


def test_a_call_that_hangs_does_not_hide_an_outage() -> None:
    lab = Lab(concurrency=8)
    lab.begin(OTHER)
    refused = 0
    while not lab.gate.is_away and refused < 100:
        lab.call(503)
        refused += 1
    assert refused == 16, "two rounds of all workers"


def test_jobs_whose_calls_broke_each_time_have_their_last_attempts_one_by_one() -> None:
    lab = Lab()
    broken = errors.UpstreamUnreachable("broke off")
    first, second = (msgspec.structs.replace(job, attempts=1) for job in (JOB, OTHER))
    lab.call(broken, first)
    lab.call(broken, second)
    first, second = (msgspec.structs.replace(job, attempts=2) for job in (JOB, OTHER))
    passage = lab.begin(first)
    assert not lab.gate.may_begin(second)
    assert lab.gate.may_begin(msgspec.structs.replace(JOB, id="c", attempts=2)), "it did not break"
    lab.end(passage, broken, first)
    assert lab.gate.may_begin(second)
    lab.end(lab.begin(second), 200, second)
    assert lab.gate.may_begin(first)


def test_the_next_job_of_a_limited_lane_waits_until_the_store_has_the_pause() -> None:
    lab = Lab()
    passage = lab.begin()
    lab.gate.end(passage, JOB, UpstreamResponse(429, (), ()), None)
    assert lab.allowed == {}
    lab.gate.leave(passage)
    assert lab.allowed == {JOB.lane: 1}


def test_a_claim_that_came_to_nothing_gives_its_room_back() -> None:
    """The store took one off, and no call began: its request could not be read, or it was recalled."""
    lab = Lab()
    lab.call(429)
    lab.allowed[JOB.lane] = 0
    lab.gate.tidy()
    assert lab.allowed == {JOB.lane: 1}


def test_a_gate_that_is_replaced_limits_no_lane_any_more() -> None:
    lab = Lab()
    first, second = lab.begin(), lab.begin()
    lab.end(first, 429)
    lab.gate.close()
    assert lab.allowed == {JOB.lane: None}
    lab.end(second, 429)
    assert lab.allowed == {JOB.lane: None}, "calls that end later neither"


def test_another_lane_asks_before_the_one_that_was_refused() -> None:
    lab = Lab()
    ending, wait_s = lab.call(503)
    refused = UpstreamResponse(503, (), ())
    lane_s = lab.gate.other_lanes_first_s(refused, ending)
    assert lab.gate.outage.ask_at - lab.now < lane_s < wait_s
    assert lab.gate.other_lanes_first_s(unreachable(), ending) == 0


def test_a_job_that_failed_before_lets_another_one_ask_first() -> None:
    lab = Lab()
    lab.call(unreachable())
    suspect = msgspec.structs.replace(JOB, attempts=1)
    assert not lab.gate.may_begin(suspect)
    assert lab.gate.may_begin(OTHER)
    assert lab.gate.may_begin(suspect), "no other one waits"
    lab.now = lab.gate.outage.ask_at
    lab.call(unreachable(), suspect)
    assert not lab.gate.may_begin(suspect), "each time"


def test_a_bad_gateway_never_says_that_the_upstream_is_back() -> None:
    lab = Lab()
    held = msgspec.structs.replace(JOB, held_at=lab.now, attempts=1)
    lab.call(200, OTHER)
    lab.call(unreachable())
    lab.now = lab.gate.outage.ask_at
    assert lab.call(502, held)[0] is Ending.AWAY
    assert lab.gate.is_away


def test_a_job_that_failed_before_fails_though_another_call_told_of_the_outage() -> None:
    """A load balancer answers 502 to all that were in flight, in any order."""
    lab = Lab()
    suspect = msgspec.structs.replace(JOB, attempts=1)
    other, passage = lab.begin(), lab.begin(suspect)
    assert lab.end(other, 502)[0] is Ending.AWAY
    assert lab.end(passage, 502, suspect)[0] is Ending.FAILED


def test_a_job_that_failed_before_is_held_back_while_other_lanes_end_old_calls() -> None:
    lab = Lab()
    lab.begin(OTHER)
    suspect = msgspec.structs.replace(JOB, attempts=1)
    for _ in range(5):
        assert lab.call(502, suspect)[0] is Ending.AWAY


def test_a_lane_that_is_known_to_be_refused_does_not_send_the_upstream_away_again() -> None:
    lab = Lab()
    lab.call(503)
    lab.now = lab.gate.outage.ask_at
    lab.call(200, OTHER)
    assert not lab.gate.is_away
    ending, wait_s = lab.call(503)
    assert (ending, wait_s) == (Ending.AWAY, 1.0)
    assert not lab.gate.is_away
    lab.call(200)
    lab.call(503)
    assert lab.gate.is_away, "it got through meanwhile"


def test_a_refused_lane_that_nobody_uses_any_more_is_forgotten() -> None:
    lab = Lab()
    lab.call(503)
    assert len(lab.gate) == 1
    lab.now += 100
    lab.gate.tidy()
    assert len(lab.gate) == 0
