"""The queue: whose turn it is, what a pause holds back, and that its memory is bounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncproxy.core.jobs import Lane
from asyncproxy.stores.fair_queue import FairQueue, QueuePosition


def lane(credential: str = "a", model: str = "m") -> Lane:
    return Lane("gateway", credential.encode(), model)


def filled(*jobs: tuple[str, Lane]) -> FairQueue:
    queue = FairQueue()
    for job_id, of in jobs:
        queue.push(job_id, of)
    return queue


def popped(queue: FairQueue, now: float = 0.0) -> list[str]:
    """The jobs that may go now, in their order."""
    jobs = []
    while (taken := queue.pop(now)) is not None:
        jobs.append(taken[0])
    return jobs


def order_of(queue: FairQueue, job_id: str, now: float = 0.0) -> int:
    """Pop a job that is known to be next. Its order."""
    taken = queue.pop(now)
    assert taken is not None
    assert taken[0] == job_id
    return taken[1]


def test_jobs_of_one_credential_go_first_come_first_served() -> None:
    queue = filled(*((str(i), lane(model=f"m{i % 3}")) for i in range(10)))
    assert popped(queue) == [str(i) for i in range(10)]


def test_credentials_take_turns() -> None:
    a, b, c = lane("a"), lane("b"), lane("c")
    queue = filled(("a1", a), ("a2", a), ("a3", a), ("b1", b), ("c1", c), ("c2", c))
    assert popped(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_newcomer_waits_for_one_turn_of_each_other_and_no_longer() -> None:
    queue = filled(*((f"a{i}", lane("a")) for i in range(1000)))
    assert queue.pop(0) is not None
    queue.push("b", lane("b"))
    assert popped(queue)[:3] == ["a1", "b", "a2"]


def test_many_models_do_not_buy_a_credential_more_turns() -> None:
    queue = filled(*((f"a{i}", lane("a", f"m{i}")) for i in range(5)))
    for i in range(2):
        queue.push(f"b{i}", lane("b"))
    assert popped(queue) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


def test_an_empty_queue_has_nothing() -> None:
    queue = FairQueue()
    assert queue.pop(0) is None
    assert len(queue) == 0
    assert "x" not in queue
    assert not queue.remove("x")
    assert queue.position("x") is None
    assert queue.next_due() is None
    queue.pause(lane(), 10)
    assert queue.next_due() is None


def test_a_job_is_in_the_queue_until_it_is_popped() -> None:
    queue = filled(("1", lane()), ("2", lane()))
    assert len(queue) == 2
    assert "1" in queue
    queue.pop(0)
    assert len(queue) == 1
    assert "1" not in queue
    assert "2" in queue


def test_a_paused_lane_leaves_others_running() -> None:
    queue = filled(
        ("slow1", lane("a", "slow")),
        ("fast1", lane("a", "fast")),
        ("slow2", lane("a", "slow")),
        ("fast2", lane("a", "fast")),
        ("other", lane("b", "slow")),
    )
    queue.pause(lane("a", "slow"), 10)
    assert popped(queue, 9.9) == ["fast1", "other", "fast2"]
    assert len(queue) == 2
    assert popped(queue, 10) == ["slow1", "slow2"]


def test_a_job_pushed_to_a_paused_lane_waits_too() -> None:
    queue = filled(("1", lane()))
    queue.pause(lane(), 10)
    queue.push("2", lane())
    assert popped(queue, 5) == []
    assert popped(queue, 10) == ["1", "2"]


def test_a_longer_pause_stays_when_a_shorter_one_comes() -> None:
    queue = filled(("1", lane()))
    queue.pause(lane(), 10)
    queue.pause(lane(), 5)
    assert popped(queue, 9) == []
    assert popped(queue, 10) == ["1"]


def test_a_longer_pause_replaces_a_shorter_one() -> None:
    queue = filled(("1", lane()))
    queue.pause(lane(), 5)
    queue.pause(lane(), 10)
    assert popped(queue, 7) == []
    assert popped(queue, 10) == ["1"]


def test_a_pause_holds_back_a_job_whose_backoff_has_passed() -> None:
    queue = FairQueue()
    queue.push("1", lane(), not_before=3)
    queue.pause(lane(), 10)
    assert popped(queue, 5) == []
    assert popped(queue, 10) == ["1"]


def test_a_pause_that_is_over_does_not_lift_a_backoff() -> None:
    queue = filled(("2", lane()))
    queue.push("1", lane(), not_before=10)
    queue.pause(lane(), 5)
    assert popped(queue, 5) == ["2"]
    assert popped(queue, 10) == ["1"]


def test_a_pause_is_forgotten_with_the_last_job_of_its_lane() -> None:
    queue = filled(("1", lane()))
    queue.pause(lane(), 10)
    assert queue.remove("1")
    queue.push("2", lane())
    assert popped(queue) == ["2"]


def test_a_job_is_not_given_out_before_its_backoff_has_passed() -> None:
    queue = FairQueue()
    queue.push("1", lane(), not_before=10)
    queue.push("2", lane())
    assert popped(queue, 9.9) == ["2"]
    assert "1" in queue
    assert popped(queue, 10) == ["1"]


def test_a_job_pushed_with_its_order_has_its_old_place() -> None:
    queue = filled(*((str(i), lane()) for i in range(4)))
    first, second = order_of(queue, "0"), order_of(queue, "1")
    queue.push("1", lane(), order=second)
    queue.push("0", lane(), order=first, not_before=5)
    queue.push("4", lane())
    assert order_of(queue, "1") == second
    assert order_of(queue, "0", 5) == first
    assert popped(queue, 5) == ["2", "3", "4"]


def test_an_old_place_counts_across_the_lanes_of_a_credential() -> None:
    queue = filled(("1", lane(model="x")), ("2", lane(model="y")), ("3", lane(model="x")))
    queue.push("1", lane(model="x"), order=order_of(queue, "1"))
    assert popped(queue) == ["1", "2", "3"]


def test_a_job_may_come_back_twice_after_a_pause_that_nobody_looked_at() -> None:
    """While all workers are busy nothing is popped, and a lane may be made known twice."""
    queue = filled(("1", lane(model="x")), ("2", lane(model="y")))
    order = order_of(queue, "1")
    for now in (10.0, 20.0, 30.0):
        queue.push("1", lane(model="x"), order=order)
        queue.pause(lane(model="x"), now)
        assert order_of(queue, "1", now) == order
    assert popped(queue, 30) == ["2"]


def test_a_removed_job_is_never_given_out() -> None:
    queue = filled(*((str(i), lane()) for i in range(5)))
    queue.push("later", lane(), not_before=5)
    for job_id in ("0", "2", "4", "later"):
        assert queue.remove(job_id)
        assert not queue.remove(job_id)
        assert job_id not in queue
    assert len(queue) == 2
    assert popped(queue, 10) == ["1", "3"]


def test_what_stands_behind_a_removed_job_is_still_given_out() -> None:
    queue = filled(("a1", lane("a")), ("a2", lane("a")), ("b1", lane("b")))
    queue.remove("a1")
    assert popped(queue) == ["a2", "b1"]


def test_a_removed_job_leaves_its_place_to_no_younger_one() -> None:
    queue = filled(("1", lane(model="x")), ("2", lane(model="y")), ("3", lane(model="x")))
    queue.remove("1")
    assert popped(queue) == ["2", "3"]


def test_next_due_is_the_earliest_backoff_or_end_of_a_pause() -> None:
    queue = filled(("1", lane("a")))
    assert queue.next_due() is None
    queue.push("2", lane("b"), not_before=20)
    assert queue.next_due() == 20
    queue.pause(lane("a"), 10)
    assert queue.next_due() == 10
    assert popped(queue, 10) == ["1"]
    assert queue.next_due() == 20
    assert popped(queue, 20) == ["2"]
    assert queue.next_due() is None


def test_the_place_of_a_job_counts_those_of_its_credential_before_it() -> None:
    queue = filled(*((str(i), lane()) for i in range(4)))
    assert [queue.position(str(i)) for i in range(4)] == [QueuePosition(i, 0.0) for i in range(4)]
    queue.pop(0)
    assert queue.position("0") is None
    assert queue.position("3") == QueuePosition(2, 0.0)
    queue.remove("1")
    assert queue.position("3") == QueuePosition(1, 0.0)


def test_the_place_of_a_job_takes_the_turns_of_others_into_account() -> None:
    queue = filled(*((f"a{i}", lane("a")) for i in range(100)), ("b0", lane("b")), ("b1", lane("b")))
    assert queue.position("b0") == QueuePosition(0, 0.0)
    assert queue.position("b1") == QueuePosition(2, 0.0)
    assert queue.position("a3") == QueuePosition(6, 0.0)
    assert queue.position("a99") == QueuePosition(101, 0.0)  # never more than there are


def test_a_job_that_came_back_stands_first() -> None:
    queue = filled(*((str(i), lane()) for i in range(5)))
    queue.push("0", lane(), order=order_of(queue, "0"))
    assert queue.position("0") == QueuePosition(0, 0.0)


def test_the_place_of_a_job_says_when_it_may_go_at_all() -> None:
    queue = FairQueue()
    queue.push("1", lane(), not_before=7)
    assert queue.position("1") == QueuePosition(0, 7.0)
    queue.pause(lane(), 5)
    assert queue.position("1") == QueuePosition(0, 7.0)
    queue.pause(lane(), 9)
    assert queue.position("1") == QueuePosition(0, 9.0)


# Memory. What is kept may be proportional to the jobs that wait, and to nothing else.


def kept(queue: FairQueue) -> int:
    """How many items the queue's containers hold, all of them together."""
    total, seen, todo = 0, set[int](), list[Any](vars(queue).values())
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner: Iterable[Any] = ()
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | set):
            inner = value
        elif isinstance(value, tuple):
            todo.extend(value)
            continue
        elif hasattr(type(value), "__slots__") and not isinstance(value, Lane):
            todo.extend(getattr(value, name) for name in type(value).__slots__)
            continue
        items = list(inner)
        total += len(items)
        todo.extend(items)
    return total


# Far more than the slack that a queue may have before it cleans up, far less than the cycles below.
BOUND = 1_000
CYCLES = 2_500


def test_the_measure_of_memory_sees_what_waits() -> None:
    queue = filled(*((str(i), lane(str(i), str(i))) for i in range(BOUND)))
    assert kept(queue) >= 4 * BOUND  # entries, tenants, lanes, heaps


@pytest.mark.parametrize("hostile", [False, True], ids=["one lane", "distinct lanes"])
@pytest.mark.parametrize("not_before", [0.0, 1e9], ids=["ready", "backoff"])
@pytest.mark.parametrize("pause", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("company", [False, True], ids=["alone", "beside others"])
def test_memory_is_bounded_when_jobs_come_and_are_removed(
    *, hostile: bool, not_before: float, pause: bool, company: bool
) -> None:
    queue = FairQueue()
    if company:
        for i in range(10):
            queue.push(f"stays{i}", lane("a", f"stays{i % 2}"))
    most = 0
    for i in range(CYCLES):
        of = lane(f"c{i}" if hostile and i % 2 else "a", f"m{i}" if hostile else "m")
        queue.push("x", of, not_before=not_before)
        if pause:
            queue.pause(of, 1e6 + i)
        assert queue.remove("x")
        if i % 250 == 0:
            most = max(most, kept(queue))
    assert max(most, kept(queue)) < BOUND


def test_memory_is_bounded_when_a_lane_is_paused_again_and_again() -> None:
    queue = filled(("1", lane()), ("2", lane()))
    for i in range(CYCLES):
        queue.pause(lane(), 1e6 + i)
    assert kept(queue) < BOUND
    assert popped(queue, 1e6 + CYCLES - 2) == []
    assert popped(queue, 1e6 + CYCLES - 1) == ["1", "2"]


def test_memory_is_bounded_when_many_lanes_are_paused_again_and_again() -> None:
    lanes = [lane(f"c{i % 7}", f"m{i}") for i in range(50)]
    queue = filled(*((str(i), of) for i, of in enumerate(lanes)))
    for i in range(CYCLES):
        queue.pause(lanes[i % 50], 1e6 + i)
    assert kept(queue) < BOUND


def test_memory_is_bounded_when_the_oldest_job_comes_back_again_and_again() -> None:
    """An upstream that refuses all but one call: the same job is popped and pushed, others wait."""
    queue = filled(("1", lane()), ("2", lane()), ("3", lane(model="other")))
    for i in range(CYCLES):
        queue.push("1", lane(), order=order_of(queue, "1", i))
    assert kept(queue) < BOUND


def test_jobs_whose_backoffs_end_together_are_given_out_once_each() -> None:
    """Each goes before the one that was made known just before: the queue cleans up meanwhile."""
    count = 500
    queue = filled(*((str(i), lane()) for i in range(count)))
    orders = [order_of(queue, str(i)) for i in range(count)]
    for i in reversed(range(count)):
        queue.push(str(i), lane(), order=orders[i], not_before=float(count - i))
    assert popped(queue, count) == [str(i) for i in range(count)]
    assert queue.next_due() is None
    assert kept(queue) == 0


def test_nothing_is_kept_for_credentials_without_jobs() -> None:
    queue = filled(*((str(i), lane(f"c{i}", f"m{i}")) for i in range(CYCLES)))
    assert len(popped(queue)) == CYCLES
    assert kept(queue) == 0


# A queue that is a list, and slow, and right.


class Waiting:
    """A job in the model."""

    def __init__(self, order: int, of: Lane, not_before: float) -> None:
        self.order = order
        self.lane = of
        self.not_before = not_before


LANES = st.sampled_from([lane(credential, model) for credential in "ab" for model in "xyz"])
DELAYS = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0, 5.0])


class QueueMachine(RuleBasedStateMachine):
    """Time does not go back; a job is pushed with an order only after a pop that gave that order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue()
        self.now = 1.0
        self.jobs: dict[str, Waiting] = {}
        self.paused: dict[Lane, float] = {}
        self.out: list[tuple[str, int, Lane]] = []  # popped, and may come back
        self.next_id = 0
        # Who was served while a credential had a job ready all the time: nobody may be twice.
        self.served: dict[bytes, set[bytes]] = {}

    def ready_at(self, job: Waiting) -> float:
        return max(job.not_before, self.paused.get(job.lane, 0.0))

    def ready(self) -> dict[str, Waiting]:
        return {key: job for key, job in self.jobs.items() if self.ready_at(job) <= self.now}

    def settle(self) -> None:
        """Forget what is bound to jobs that are there, or ready."""
        lanes = {job.lane for job in self.jobs.values()}
        self.paused = {of: until for of, until in self.paused.items() if of in lanes}
        ready = {job.lane.credential for job in self.ready().values()}
        self.served = {key: self.served.get(key, set()) for key in ready}

    @rule(lanes=st.lists(LANES, min_size=2, max_size=6))
    def push_some(self, lanes: list[Lane]) -> None:
        for of in lanes:
            self.push(of, 0.0)

    @rule(of=LANES, delay=DELAYS)
    def push(self, of: Lane, delay: float) -> None:
        job_id = str(self.next_id)
        not_before = self.now + delay if delay else 0.0
        self.queue.push(job_id, of, not_before=not_before)
        # The real orders are opaque: those of new jobs only have to ascend.
        self.jobs[job_id] = Waiting(self.next_id, of, not_before)
        self.next_id += 1
        self.settle()

    @rule()
    def pop(self) -> None:
        taken = self.queue.pop(self.now)
        ready = self.ready()
        if taken is None:
            assert not ready
            return
        job_id, order = taken
        assert job_id in ready
        job = self.jobs.pop(job_id)
        credential = job.lane.credential
        of_the_same = [j.order for j in ready.values() if j.lane.credential == credential]
        assert job.order == min(of_the_same), "not the oldest that its credential has ready"
        for other, served in self.served.items():
            if other != credential:
                assert credential not in served, "served twice while another waited"
                served.add(credential)
        self.served[credential] = set()
        self.out.append((job_id, order, job.lane))
        self.settle()

    @precondition(lambda self: self.out)
    @rule(data=st.data(), delay=DELAYS)
    def push_back(self, data: st.DataObject, delay: float) -> None:
        job_id, order, of = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        not_before = self.now + delay if delay else 0.0
        self.queue.push(job_id, of, order=order, not_before=not_before)
        self.jobs[job_id] = Waiting(int(job_id), of, not_before)
        self.settle()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        assert self.queue.remove(job_id)
        del self.jobs[job_id]
        self.settle()

    @rule(job_id=st.integers(-1, 50).map(str))
    def remove_what_is_not_there(self, job_id: str) -> None:
        if job_id not in self.jobs:
            assert not self.queue.remove(job_id)

    @rule(of=LANES, delay=DELAYS)
    def pause(self, of: Lane, delay: float) -> None:
        until = self.now + delay
        self.queue.pause(of, until)
        self.paused[of] = max(self.paused.get(of, 0.0), until)
        self.settle()

    @rule(seconds=DELAYS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    @invariant()
    def it_holds_the_same_jobs(self) -> None:
        assert len(self.queue) == len(self.jobs)
        assert all(job_id in self.queue for job_id in self.jobs)
        assert all(job_id not in self.queue for job_id, _, _ in self.out)

    @invariant()
    def it_knows_when_to_look_again(self) -> None:
        """Too early costs a look; too late, and a job that is ready is left lying."""
        later = [at for job in self.jobs.values() if (at := self.ready_at(job)) > self.now]
        if later:
            due = self.queue.next_due()
            assert due is not None
            assert due <= min(later)

    @invariant()
    def places_are_sane(self) -> None:
        for job_id, job in self.jobs.items():
            place = self.queue.position(job_id)
            assert place is not None
            assert 0 <= place.ahead < len(self.jobs)
            if self.ready_at(job) > self.now:
                assert place.not_before == self.ready_at(job)
            else:
                assert place.not_before <= self.now

    def teardown(self) -> None:
        """In the end every job is given out once, in the right order."""
        for seconds in (0, 1000):
            self.now += seconds
            self.settle()
            while self.ready():
                self.pop()
        assert not self.jobs
        assert len(self.queue) == 0
        assert self.queue.pop(self.now) is None


TestAgainstAModel = QueueMachine.TestCase
TestAgainstAModel.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, report_multiple_bugs=False
)
