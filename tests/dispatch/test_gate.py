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
