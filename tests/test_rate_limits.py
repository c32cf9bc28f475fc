"""Is a 429 a limit, or a refusal?"""

from __future__ import annotations

from asyncproxy.jobs import Call, Job
from asyncproxy.rate_limits import RateLimits


def job(name: str, model: str = "m") -> Job:
    call = Call("embeddings", "/v1/embeddings", (), b"{}")
    return Job(name, "embeddings", b"alice", "gateway", model, 0.0, 60, call)


def refuse(limits: RateLimits, of: Job) -> int:
    """A call that gets a 429: how many that makes in a row."""
    limits.started(of)
    in_a_row = limits.refused(of)
    limits.ended(of, progress=False)
    return in_a_row


def succeed(limits: RateLimits, of: Job) -> None:
    limits.started(of)
    limits.ended(of, progress=True)
    limits.forget(of)


def test_refusals_in_a_row_are_counted() -> None:
    limits, one = RateLimits(), job("one")
    assert [refuse(limits, one) for _ in range(4)] == [1, 2, 3, 4]


def test_each_job_has_its_own_row() -> None:
    limits = RateLimits()
    assert refuse(limits, job("one")) == 1
    assert refuse(limits, job("two")) == 1
    assert refuse(limits, job("one")) == 2


def test_progress_of_the_lane_ends_the_row() -> None:
    limits, one = RateLimits(), job("one")
    assert [refuse(limits, one) for _ in range(2)] == [1, 2]
    succeed(limits, job("two"))
    assert refuse(limits, one) == 1


def test_progress_of_another_lane_does_not() -> None:
    limits, one = RateLimits(), job("one")
    refuse(limits, one)
    succeed(limits, job("two", model="n"))
    assert refuse(limits, one) == 2


def test_a_call_that_may_yet_get_through_leaves_it_undecided() -> None:
    """One call is served, slowly: the refusals of the others do not count until it has ended."""
    limits, slow, one = RateLimits(), job("slow"), job("one")
    limits.started(slow)
    assert [refuse(limits, one) for _ in range(5)] == [1, 1, 1, 1, 1]
    limits.ended(slow, progress=False)
    assert [refuse(limits, one) for _ in range(2)] == [2, 3]


def test_a_call_that_began_after_the_last_refusal_does_not_hold_it_up() -> None:
    limits, one = RateLimits(), job("one")
    assert refuse(limits, one) == 1
    limits.started(one)
    limits.started(job("later"))
    assert limits.refused(one) == 2


def test_a_whole_round_of_refusals_counts_for_each() -> None:
    """Many at once, and none gets through: each round counts once, so that all end soon."""
    limits, jobs = RateLimits(), [job(str(n)) for n in range(10)]
    for expected in (1, 2, 3):
        for each in jobs:
            limits.started(each)
        rows = []
        for each in jobs:
            rows.append(limits.refused(each))
            limits.ended(each, progress=False)
        assert rows == [expected] * 10


def test_nothing_is_kept_of_lanes_that_are_idle() -> None:
    limits, one = RateLimits(), job("one")
    succeed(limits, one)
    assert len(limits) == 0
    refuse(limits, one)
    assert len(limits) == 1
    limits.forget(one)
    assert len(limits) == 0
    limits.forget(one)
