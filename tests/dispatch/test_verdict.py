"""What the end of a call means for its job."""

from __future__ import annotations

import random

import msgspec
import pytest

from asyncproxy.core import errors
from asyncproxy.core.jobs import Fallback, Job, UpstreamResponse
from asyncproxy.dispatch.retry import Ending
from asyncproxy.dispatch.verdict import Again, CallPolicy, Done, NextModel, Verdict, judge

JOB = Job("a", "embeddings", b"c", "gateway", "m", 1000.0, 60)
WITH_FALLBACK = msgspec.structs.replace(JOB, fallbacks=(Fallback("other", "n"),), fallback_index=0)
POLICY = CallPolicy(attempts=3, backoff_s=1.0, max_backoff_s=8.0, outage_s=900.0)


def verdict_on(
    ending: Ending,
    job: Job = JOB,
    *,
    outcome: UpstreamResponse | errors.CallError | None = None,
    asked_s: float | None = None,
    lane_wait_s: float = 0.0,
    now: float = 1000.0,
    deadline_at: float = 1e9,
) -> Verdict:
    return judge(
        job,
        outcome or UpstreamResponse(500, (), ()),
        ending,
        POLICY,
        asked_s=asked_s,
        lane_wait_s=lane_wait_s,
        now=now,
        deadline_at=deadline_at,
        rng=random.Random(1),
    )


def again(verdict: Verdict) -> Again:
    assert isinstance(verdict, Again)
    return verdict


def test_a_success_is_recorded() -> None:
    assert verdict_on(Ending.SUCCEEDED) == Done()
    assert verdict_on(Ending.SUCCEEDED, WITH_FALLBACK) == Done()


def test_a_final_refusal_is_recorded() -> None:
    assert verdict_on(Ending.REFUSED) == Done()


def test_a_failure_is_an_attempt_and_the_last_one_is_recorded() -> None:
    job = JOB
    for attempts in (1, 2):
        job, delay_s = again(verdict_on(Ending.FAILED, job))
        assert job.attempts == attempts
        assert 0 <= delay_s <= attempts
    assert verdict_on(Ending.FAILED, job) == Done()


@pytest.mark.parametrize("ending", [Ending.AWAY, Ending.RATE_LIMITED])
def test_a_job_that_is_held_back_uses_up_no_attempt(ending: Ending) -> None:
    job = msgspec.structs.replace(JOB, attempts=2)
    for _ in range(50):
        job, delay_s = again(verdict_on(ending, job, lane_wait_s=7.0))
        assert delay_s == 7.0
    assert job.attempts == 2


@pytest.mark.parametrize("ending", [Ending.AWAY, Ending.RATE_LIMITED])
def test_a_job_that_was_held_back_for_longer_than_an_outage_fails(ending: Ending) -> None:
    job, _ = again(verdict_on(ending, now=1000.0))
    job, _ = again(verdict_on(ending, job, now=1600.0))
    assert job.held_s == 600.0
    job, _ = again(verdict_on(ending, job, now=1899.9))
    assert verdict_on(ending, job, now=1900.0) == Done()


def test_what_a_job_waits_for_other_reasons_does_not_count_as_held_back() -> None:
    job, _ = again(verdict_on(Ending.AWAY, now=1000.0))
    job, _ = again(verdict_on(Ending.FAILED, job, now=1100.0))
    assert job.held_s == 100.0
    job, _ = again(verdict_on(Ending.AWAY, job, now=5000.0))
    assert job.held_s == 100.0
    job, _ = again(verdict_on(Ending.AWAY, job, now=5010.0))
    assert job.held_s == 110.0


def test_the_wait_that_the_upstream_asks_for_is_kept() -> None:
    assert again(verdict_on(Ending.RATE_LIMITED, asked_s=42.0)).delay_s == 42.0
    assert again(verdict_on(Ending.FAILED, asked_s=42.0)).delay_s == 42.0
    assert again(verdict_on(Ending.AWAY, asked_s=0.0, lane_wait_s=3.0)).delay_s == 3.0


def test_a_wait_that_ends_after_the_deadline_is_not_begun() -> None:
    assert verdict_on(Ending.RATE_LIMITED, asked_s=10.0, deadline_at=1010.0) == Done()
    again(verdict_on(Ending.RATE_LIMITED, asked_s=9.0, deadline_at=1010.0))


@pytest.mark.parametrize(
    ("status", "tried"), [(400, True), (404, True), (422, True), (401, False), (403, False)]
)
def test_the_next_model_is_tried_after_any_failure_but_one_of_the_credential(
    status: int,
    tried: bool,  # noqa: FBT001
) -> None:
    outcome = UpstreamResponse(status, (), ())
    expected = NextModel() if tried else Done()
    assert verdict_on(Ending.REFUSED, WITH_FALLBACK, outcome=outcome) == expected


def test_the_next_model_is_tried_when_the_attempts_are_used_up() -> None:
    job = msgspec.structs.replace(WITH_FALLBACK, attempts=2)
    assert verdict_on(Ending.FAILED, job) == NextModel()


def test_the_next_model_is_tried_after_half_of_an_outage() -> None:
    job, _ = again(verdict_on(Ending.AWAY, WITH_FALLBACK, now=1000.0))
    job, _ = again(verdict_on(Ending.AWAY, job, now=1449.9))
    assert verdict_on(Ending.AWAY, job, now=1450.0) == NextModel()


def test_no_model_is_tried_after_the_deadline() -> None:
    outcome = errors.DeadlineExceeded("x")
    assert verdict_on(Ending.REFUSED, WITH_FALLBACK, outcome=outcome) == Done()
