"""Any history of calls of several lanes: what the gate and the verdict together hold."""

from __future__ import annotations

import math
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncproxy.core.errors import CallError, UpstreamUnreachable
from asyncproxy.core.jobs import Job, UpstreamResponse
from asyncproxy.dispatch.gate import Gate, Passage
from asyncproxy.dispatch.retry import Ending
from asyncproxy.dispatch.verdict import Again, CallPolicy, Done, judge
from asyncproxy.stores.fair_queue import FairQueue

POLICY = CallPolicy(concurrency=4, attempts=3, backoff_s=0.5, max_backoff_s=8.0, outage_s=60.0)
STATUSES = [200, 400, 429, 500, 502, 503, 504]


def broken(*, delivered: bool) -> UpstreamUnreachable:
    error = UpstreamUnreachable("x")
    error.delivered = delivered
    return error


class World(RuleBasedStateMachine):
    """A queue, a gate, and calls that end in any order and in any way."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.count = 0
        self.rng = random.Random(1)
        self.queue = FairQueue()
        self.jobs: dict[str, Job] = {}
        self.in_flight: list[tuple[Job, int, Passage]] = []  # with their orders in the queue
        self.gate = Gate(
            POLICY,
            clock=lambda: self.now,
            monotonic=lambda: self.now,
            rng=self.rng,
            allow=self.queue.allow,
        )

    @rule(credential=st.sampled_from([b"a", b"b"]), model=st.sampled_from(["m", "n"]))
    def submit(self, credential: bytes, model: str) -> None:
        self.count += 1
        job = Job(f"job-{self.count}", "embeddings", credential, "gateway", model, self.now, 60)
        self.jobs[job.id] = job
        self.queue.push(job.id, job.lane)

    @rule()
    def begin(self) -> None:
        self.claim()

    @rule()
    def claim_in_vain(self) -> None:
        """A claim that was recalled gives its job back, and no call begins."""
        if self.gate.outage.wait_s(self.now):
            return
        epoch = self.gate.outage.admit()
        if (taken := self.queue.pop(self.now)) is not None:
            self.queue.push(taken[0], self.jobs[taken[0]].lane, order=taken[1])
        self.gate.outage.leave(epoch)

    @precondition(lambda self: self.in_flight)
    @rule(
        data=st.data(),
        how=st.sampled_from([*STATUSES, "refused", "broken", "aborted"]),
        asked_s=st.sampled_from([None, 0.0, 3.0]),
    )
    def end(self, data: st.DataObject, how: int | str, asked_s: float | None) -> None:
        index = data.draw(st.integers(0, len(self.in_flight) - 1))
        outcome: UpstreamResponse | CallError | None = None
        if isinstance(how, int):
            outcome = UpstreamResponse(how, (), ())
        elif how != "aborted":
            outcome, asked_s = broken(delivered=how == "broken"), None
        self.finish(index, outcome, asked_s)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.gate.tidy()

    @invariant()
    def the_limit_never_passes_the_concurrency(self) -> None:
        assert 1 <= self.gate.outage.limit <= POLICY.concurrency
        current = sum(passage.epoch == self.gate.outage.epoch for _, _, passage in self.in_flight)
        assert current <= (1 if self.gate.is_away else POLICY.concurrency)

    def teardown(self) -> None:
        """The upstream takes everything from now on: each job ends soon, and nothing is kept."""
        for _ in range(len(self.in_flight)):
            self.finish(0, None, None)
        until = self.now + 20 * POLICY.max_backoff_s + 5 * self.count
        while self.jobs and self.now < until:
            while self.claim():
                pass
            self.now += 0.1
            while self.in_flight:
                self.finish(0, UpstreamResponse(200, (), ()), None)
            self.gate.tidy()
        assert not self.jobs, "no job waits for ever"
        self.now += 5 * POLICY.max_backoff_s
        self.gate.tidy()
        assert len(self.gate) == 0
        assert not self.queue.limited

    def claim(self) -> bool:
        if self.gate.outage.wait_s(self.now) or (taken := self.queue.pop(self.now)) is None:
            return False
        job_id, order = taken
        job = self.jobs[job_id]
        epoch = self.gate.outage.admit()
        if self.gate.may_begin(job):
            self.in_flight.append((job, order, self.gate.begin(job, epoch)))
            return True
        self.queue.push(job_id, job.lane, order=order, not_before=self.now + POLICY.backoff_s)
        self.gate.outage.leave(epoch)
        return True

    def finish(
        self, index: int, outcome: UpstreamResponse | CallError | None, asked_s: float | None
    ) -> None:
        job, order, passage = self.in_flight.pop(index)
        ending, wait_s = self.gate.end(passage, job, outcome, asked_s)
        if outcome is None:
            self.queue.push(job.id, job.lane, order=order)
        else:
            verdict = judge(
                job,
                outcome,
                ending,
                POLICY,
                asked_s=asked_s,
                lane_wait_s=wait_s,
                now=self.now,
                deadline_at=math.inf,
                rng=self.rng,
            )
            if isinstance(verdict, Again):
                self.jobs[job.id] = again = verdict.job
                self.queue.push(job.id, job.lane, order=order, not_before=self.now + verdict.delay_s)
                held = ending in (Ending.AWAY, Ending.RATE_LIMITED)
                assert again.attempts == job.attempts + (not held), "waiting is no attempt"
            else:
                assert isinstance(verdict, Done)
                del self.jobs[job.id]
                if ending is Ending.FAILED:
                    assert job.attempts + 1 >= POLICY.attempts
                elif ending in (Ending.AWAY, Ending.RATE_LIMITED):
                    assert job.held_s + self.now - job.held_at >= POLICY.outage_s, "none fails early"
            if wait_s and not self.gate.is_away:
                self.queue.pause(job.lane, self.now + max(wait_s, asked_s or 0.0))
        self.gate.leave(passage)
        self.gate.outage.leave(passage.epoch)


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
