"""When a 429 is a limit, and when it is a refusal."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncproxy.core.jobs import Job
from asyncproxy.dispatch.rate_limits import RateLimits


def job(name: str, *, credential: bytes = b"a", model: str = "m", upstream: str = "gateway") -> Job:
    return Job(name, "embeddings", credential, upstream, model, 0.0, 60)


A, B, C = job("a"), job("b"), job("c")


def refuse(limits: RateLimits, of: Job) -> int:
    """A call that gets a 429, start to end."""
    limits.started(of)
    in_a_row = limits.refused(of)
    limits.ended(of, progress=False)
    return in_a_row


def succeed(limits: RateLimits, of: Job) -> None:
    """A call that gets through, start to end."""
    limits.started(of)
    limits.ended(of, progress=True)
    limits.forget(of)


def test_refusals_with_nothing_getting_through_add_up() -> None:
    limits = RateLimits()
    assert [refuse(limits, A) for _ in range(4)] == [1, 2, 3, 4]


def test_each_job_of_a_lane_counts_its_own_refusals() -> None:
    limits = RateLimits()
    assert [refuse(limits, of) for of in (A, B, A, B, C, A)] == [1, 1, 2, 2, 1, 3]


def test_progress_of_another_job_begins_the_count_anew() -> None:
    limits = RateLimits()
    assert [refuse(limits, A), refuse(limits, A)] == [1, 2]
    succeed(limits, B)
    assert [refuse(limits, A), refuse(limits, A), refuse(limits, A)] == [1, 2, 3]


def test_progress_during_the_call_begins_the_count_anew() -> None:
    limits = RateLimits()
    assert [refuse(limits, A), refuse(limits, A)] == [1, 2]
    limits.started(A)
    succeed(limits, B)
    assert limits.refused(A) == 1


def test_a_call_that_failed_in_another_way_is_no_progress() -> None:
    limits = RateLimits()
    assert refuse(limits, A) == 1
    limits.started(B)
    limits.ended(B, progress=False)
    assert refuse(limits, A) == 2


def test_a_call_that_is_still_under_way_leaves_it_undecided() -> None:
    limits = RateLimits()
    limits.started(B)
    assert [refuse(limits, A) for _ in range(5)] == [1, 1, 1, 1, 1]
    limits.ended(B, progress=False)
    assert [refuse(limits, A) for _ in range(2)] == [2, 3]


def test_a_call_that_was_under_way_and_got_through_is_progress() -> None:
    limits = RateLimits()
    limits.started(B)
    assert [refuse(limits, A), refuse(limits, A)] == [1, 1]
    limits.ended(B, progress=True)
    assert [refuse(limits, A), refuse(limits, A)] == [1, 2]


def test_a_call_that_began_after_the_last_refusal_does_not_stop_the_count() -> None:
    limits = RateLimits()
    assert refuse(limits, A) == 1
    limits.started(B)
    assert refuse(limits, A) == 2
    # Now B's call is one from before: until it ends, nothing is known.
    assert refuse(limits, A) == 2


def test_the_oldest_call_under_way_decides() -> None:
    limits = RateLimits()
    limits.started(B)
    assert refuse(limits, A) == 1
    limits.started(C)
    assert refuse(limits, A) == 1
    limits.ended(B, progress=False)
    assert refuse(limits, A) == 2  # C began after the refusal that counted
    assert refuse(limits, A) == 2  # and before this one
    limits.ended(C, progress=False)
    assert refuse(limits, A) == 3


def test_jobs_that_take_turns_at_an_upstream_that_serves_one_at_a_time_are_never_refused() -> None:
    limits = RateLimits()
    waiting = [job(str(i)) for i in range(20)]
    while waiting:
        served, *waiting = waiting
        limits.started(served)
        for other in waiting:
            assert refuse(limits, other) == 1
        limits.ended(served, progress=True)
        limits.forget(served)
    assert len(limits) == 0


def test_lanes_do_not_speak_for_each_other() -> None:
    limits = RateLimits()
    others = [job("x", credential=b"other"), job("y", model="other"), job("z", upstream="other")]
    assert refuse(limits, A) == 1
    for other in others:
        succeed(limits, other)
        limits.started(other)
    assert [refuse(limits, A), refuse(limits, A)] == [2, 3]
    assert len(limits) == 4


def test_a_job_that_is_forgotten_counts_from_one_again() -> None:
    limits = RateLimits()
    assert [refuse(limits, A), refuse(limits, A)] == [1, 2]
    limits.forget(A)
    assert refuse(limits, A) == 1


def test_a_lane_is_kept_while_a_call_is_under_way_or_a_job_was_refused() -> None:
    limits = RateLimits()
    assert len(limits) == 0
    limits.started(A)
    assert len(limits) == 1
    limits.refused(A)
    limits.ended(A, progress=False)
    assert len(limits) == 1
    limits.started(A)
    limits.forget(A)
    assert len(limits) == 1
    limits.ended(A, progress=True)
    assert len(limits) == 0


def test_a_job_that_was_never_refused_is_forgotten_without_a_trace() -> None:
    limits = RateLimits()
    limits.forget(A)
    assert len(limits) == 0
    limits.started(B)
    limits.forget(A)
    limits.forget(B)
    assert len(limits) == 1
    limits.ended(B, progress=False)
    assert len(limits) == 0


def test_nothing_is_kept_for_lanes_that_clients_invent() -> None:
    limits = RateLimits()
    for i in range(2000):
        of = job(f"j{i}", credential=b"c%d" % i, model=f"m{i}")
        refuse(limits, of)
        succeed(limits, of)
    assert len(limits) == 0
    assert not limits._lanes


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["call", "refuse", "forget"]))))
@settings(max_examples=150, deadline=None)
def test_nothing_is_kept_when_all_jobs_are_done(steps: list[tuple[str, str]]) -> None:
    limits = RateLimits()
    jobs = {name: job(name, model=str(ord(name) % 2)) for name in "abcdef"}
    under_way: set[str] = set()
    for name, step in steps:
        of = jobs[name]
        if step == "forget":
            limits.forget(of)
        elif name not in under_way:
            limits.started(of)
            under_way.add(name)
        else:
            if step == "refuse":
                assert limits.refused(of) >= 1
            limits.ended(of, progress=step == "call")
            under_way.remove(name)
        assert len(limits) >= len({jobs[name].lane for name in under_way})
    for name in under_way:
        limits.ended(jobs[name], progress=False)
    for of in jobs.values():
        limits.forget(of)
    assert len(limits) == 0
