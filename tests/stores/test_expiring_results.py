"""Results that expire: at their time and not before, whatever else went, and what is left of them."""

from __future__ import annotations

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncproxy.core.jobs import JobStatus, Outcome
from asyncproxy.stores.expiring_results import ExpiringResults

START = 1_700_000_000.0


def outcome(job_id: str, expires_at: float, size: int = 10) -> Outcome:
    return Outcome(
        id=job_id,
        endpoint="embeddings",
        credential=b"",
        status=JobStatus.COMPLETED,
        status_code=200,
        expires_at=expires_at,
        envelope=b"x" * size,
        content_head=b"",
    )


def places(results: ExpiringResults) -> int:
    """How many ids wait in it to expire."""
    return len(results._ripe) + sum(map(len, results._buckets.values()))


def test_a_result_is_there_until_its_time_and_not_at_it() -> None:
    results = ExpiringResults()
    results.keep(outcome("a", START + 1.5))
    results.expire(START + 1.499)
    assert results.get("a", START + 1.499) is not None
    assert results.get("a", START + 1.5) is None  # also where nobody has said expire()
    assert results.pop("a", START + 1.5) is None
    assert len(results) == 1
    results.expire(START + 1.5)
    assert len(results) == results.bytes == places(results) == 0


def test_results_of_one_second_expire_each_at_its_own_time() -> None:
    results = ExpiringResults()
    for tenth in (7, 1, 9, 3):
        results.keep(outcome(str(tenth), START + tenth / 10))
    for tenth in range(10):
        results.expire(START + tenth / 10)
        assert {job_id for job_id in "1379" if job_id in results} == {
            job_id for job_id in "1379" if int(job_id) > tenth
        }


def test_a_result_that_is_kept_for_its_own_second_expires_in_it() -> None:
    results = ExpiringResults()
    results.keep(outcome("a", START + 0.9))
    results.expire(START + 0.1)
    results.keep(outcome("b", START + 0.5))
    results.keep(outcome("late", START - 100))
    results.expire(START + 0.6)
    assert "a" in results
    assert "b" not in results
    assert "late" not in results


def test_after_a_long_sleep_all_that_is_overdue_goes_and_nothing_else() -> None:
    results = ExpiringResults()
    for n in range(5000):
        results.keep(outcome(str(n), START + n * 7919 % 5000 + 0.5))
    results.expire(START + 4000.7)
    assert len(results) == places(results) == 999
    assert all(
        int(job_id) * 7919 % 5000 > 4000 for job_id in map(str, range(5000)) if job_id in results
    )
    assert results._ripe == []


def test_what_left_before_its_time_does_not_add_up() -> None:
    """A client that deletes each result: a day's lifetime must not mean a day's ids."""
    results = ExpiringResults()
    for n in range(100):
        results.keep(outcome(f"stays{n}", START + 86400))
    for n in range(10_000):
        results.keep(outcome(f"goes{n}", START + 3600 + n % 7))
        assert results.pop(f"goes{n}", START) is not None
    assert places(results) < 300
    results.expire(START + 86400)
    assert len(results) == results.bytes == places(results) == results._stale == 0


class Model(RuleBasedStateMachine):
    """Against a dict that is searched whole."""

    def __init__(self) -> None:
        super().__init__()
        self.results = ExpiringResults()
        self.model: dict[str, Outcome] = {}
        self.now = START
        self.made = 0

    @rule(lifetime_s=st.floats(-1, 4), size=st.integers(0, 50))
    def keep(self, lifetime_s: float, size: int) -> None:
        self.made += 1
        one = outcome(f"job{self.made}", self.now + lifetime_s, size)
        self.results.keep(one)
        self.model[one.id] = one

    @rule(step_s=st.floats(0, 1.5))
    def expire(self, step_s: float) -> None:
        self.now += step_s
        self.results.expire(self.now)
        self.model = {k: one for k, one in self.model.items() if self.now < one.expires_at}
        assert len(self.results) == len(self.model)

    @rule(data=st.data(), again_s=st.none() | st.floats(0, 2))
    def pop(self, data: st.DataObject, again_s: float | None) -> None:
        """Also to keep it for a shorter time, as results that were delivered are."""
        if not self.model:
            return
        one = self.model.pop(data.draw(st.sampled_from(sorted(self.model))))
        there = self.now < one.expires_at
        assert (self.results.pop(one.id, self.now) is one) == there
        if not there:
            self.model[one.id] = one
        elif again_s is not None:
            sooner = msgspec.structs.replace(one, expires_at=min(one.expires_at, self.now + again_s))
            self.results.keep(sooner)
            self.model[one.id] = sooner

    @invariant()
    def it_has_what_the_model_has(self) -> None:
        assert self.results.bytes == sum(one.size for one in self.model.values())
        for job_id, one in self.model.items():
            assert (self.results.get(job_id, self.now) is one) == (self.now < one.expires_at)
        assert places(self.results) <= 2 * len(self.model) + 65


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
