"""The dispatcher on its own: what becomes of a job when something other than the upstream goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from asyncproxy.core.errors import ModelNotFound, StoreFull, StoreUnavailable, UpstreamUnreachable
from asyncproxy.core.events import JobFinished, Observer, RequestPassed
from asyncproxy.core.jobs import Call, Job, JobStatus, Outcome, UpstreamResponse
from asyncproxy.dispatch.dispatcher import Dispatcher
from asyncproxy.dispatch.verdict import CallPolicy
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.stores.base import Claim, Limits, UnreadableCall
from asyncproxy.stores.fair_queue import QueuePosition
from asyncproxy.stores.memory import MemoryStore
from asyncproxy.upstream.client import Upstream

OK = UpstreamResponse(200, ((b"Content-Type", b"application/json"),), (b"{}",))


class Now:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class FakeUpstream:
    """Answers a call when the test says so."""

    name: str = "gateway"
    total_s: float = 60.0
    calls: list[Call] = field(default_factory=list)
    answers: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    called: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, call: Call, *, timeout_s: float) -> UpstreamResponse:
        self.calls.append(call)
        self.called.set()
        answer = await self.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, UpstreamResponse)
        return answer


class Seen(Observer):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.jobs: asyncio.Queue[JobFinished] = asyncio.Queue()

    def job_finished(self, event: JobFinished) -> None:
        self.jobs.put_nowait(event)

    def request_passed(self, event: RequestPassed) -> None:
        raise AssertionError


@dataclass
class Rig:
    store: MemoryStore
    upstream: FakeUpstream
    dispatcher: Dispatcher
    seen: Seen
    now: Now

    async def submit(self, name: str, *, credential: bytes = b"a") -> Job:
        job = Job(name, "embeddings", credential, "gateway", "m", self.now(), 60)
        await self.store.create(job, Call("embeddings", "/v1/embeddings", "", b"{}"))
        return job

    async def status(self, name: str) -> JobStatus | None:
        found = await self.store.get(name)
        return None if found is None else found.status


def route(model: str) -> str:
    """Where the models go: what was another upstream's is ours now, but for one."""
    if model == "gone":
        raise ModelNotFound("There is no such model.")
    return "gateway"


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Awaitable[Rig]]]:
    async with AsyncExitStack() as stack:

        async def make_rig(policy: CallPolicy | None = None, deadline_s: float = 100.0) -> Rig:
            now, upstream, seen = Now(), FakeUpstream(), Seen()
            store = MemoryStore(Limits(100, 100, 10**6), clock=now, monotonic=now)
            dispatcher = Dispatcher(
                store,
                [
                    (
                        cast("Upstream", upstream),
                        policy or CallPolicy(concurrency=1, backoff_s=1, max_backoff_s=1),
                    )
                ],
                deadline_s=deadline_s,
                observer=seen,
                route=route,
                heavy_work=HeavyWork(),
                clock=now,
                monotonic=now,
                rng=random.Random(1),
            )
            await stack.enter_async_context(dispatcher.running(grace_s=0))
            return Rig(store, upstream, dispatcher, seen, now)

        yield make_rig


Make = Callable[..., Awaitable[Rig]]


async def next_event(rig: Rig) -> JobFinished:
    async with asyncio.timeout(10):
        return await rig.seen.jobs.get()


async def test_an_error_inside_the_proxy_fails_the_job_and_no_worker_dies(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make()

    def broken(*_args: object, **_kwargs: object) -> bool:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("asyncproxy.dispatch.gate.ending_of", broken)
        await rig.submit("a")
        rig.upstream.answers.put_nowait(OK)
        event = await next_event(rig)
    assert (event.status, event.status_code, event.code) == (JobStatus.FAILED, 500, "interrupted")
    assert "a bug" in caplog.text
    await rig.submit("b")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).status is JobStatus.COMPLETED


async def test_a_retry_waits_in_the_store_and_not_in_a_worker(make: Make) -> None:
    rig = await make()
    await rig.submit("a")
    rig.upstream.answers.put_nowait(UpstreamUnreachable("down"))
    await rig.submit("b")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "b"
    found = await rig.store.get("a")
    assert isinstance(found, Job)
    assert (found.status, found.attempts) == (JobStatus.PENDING, 1)
    rig.now.seconds += 1
    await rig.store.tick()
    rig.upstream.answers.put_nowait(OK)
    event = await next_event(rig)
    assert (event.job_id, event.attempts, event.status) == ("a", 2, JobStatus.COMPLETED)


async def test_a_drain_gives_back_what_has_not_ended(make: Make) -> None:
    rig = await make(CallPolicy(concurrency=2))
    await rig.submit("a")
    await rig.submit("b")
    await rig.submit("c")
    async with asyncio.timeout(10):
        while len(rig.upstream.calls) < 2:
            await asyncio.sleep(0)
    drain = asyncio.ensure_future(rig.dispatcher.drain(30))
    await asyncio.sleep(0)
    assert rig.dispatcher.draining
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "a"
    await rig.dispatcher.drain(0)
    await drain
    assert [await rig.status(name) for name in "abc"] == [
        JobStatus.COMPLETED,
        JobStatus.PENDING,
        JobStatus.PENDING,
    ]
    assert len(rig.upstream.calls) == 2
    found = await rig.store.get("b")
    assert isinstance(found, Job)
    assert found.attempts == 0  # that the proxy was stopped is not the upstream's failure


async def test_a_deleted_job_frees_its_worker(make: Make) -> None:
    rig = await make()
    job = await rig.submit("a")
    await rig.upstream.called.wait()
    assert await rig.store.delete("a")
    rig.dispatcher.abort(job.id)
    await rig.submit("b")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "b"
    assert len(rig.dispatcher._pools["gateway"].gate.rate_limits) == 0


async def test_an_abort_that_comes_with_the_answer_kills_no_worker(make: Make) -> None:
    """The call has ended, its worker has not run yet: the cancellation meets whatever it does next."""
    rig = await make()
    for name in "abcde":
        job = await rig.submit(name)
        rig.upstream.called.clear()
        await rig.upstream.called.wait()
        rig.upstream.answers.put_nowait(OK)
        await rig.store.delete(name)
        rig.dispatcher.abort(job.id)
        async with asyncio.timeout(10):
            while rig.dispatcher._attempts._workers:
                await asyncio.sleep(0)
        rig.upstream.answers = asyncio.Queue()  # the answer that nobody waited for any more
    await rig.submit("last")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "last"


async def test_retry_after_is_an_estimate_from_the_queue(make: Make) -> None:
    rig = await make(CallPolicy(concurrency=1))
    first = await rig.submit("first")
    await rig.upstream.called.wait()
    processing = await rig.store.get("first")
    assert isinstance(processing, Job)
    assert rig.dispatcher.retry_after_s(processing) == 1
    estimates = []
    for number in range(10):
        job = await rig.submit(f"own{number}")
        estimates.append(rig.dispatcher.retry_after_s(job))
    assert estimates == sorted(estimates)
    assert estimates[0] < estimates[-1] <= 11
    other = await rig.submit("other", credential=b"b")
    assert (
        rig.dispatcher.retry_after_s(other) <= 3
    )  # its turn comes early, however long the others' line
    for number in range(60):
        job = await rig.submit(f"more{number}")
        rig.dispatcher._pools["gateway"].mean_call_s = 300
    assert rig.dispatcher.retry_after_s(job) == 120
    assert first.id == "first"


async def test_a_paused_job_is_told_to_come_back_after_the_pause(make: Make) -> None:
    rig = await make()
    await rig.submit("a")
    rig.upstream.answers.put_nowait(UpstreamResponse(429, ((b"Retry-After", b"30"),), ()))
    async with asyncio.timeout(10):
        while await rig.status("a") is not JobStatus.PENDING or not rig.upstream.calls:
            await asyncio.sleep(0)
    found = await rig.store.get("a")
    assert isinstance(found, Job)
    assert 30 <= rig.dispatcher.retry_after_s(found) <= 32


async def test_the_deadline_bounds_an_attempt(make: Make) -> None:
    rig = await make(deadline_s=10)
    timeouts = []
    original = rig.upstream.call

    async def noting(call: Call, *, timeout_s: float) -> UpstreamResponse:
        timeouts.append(timeout_s)
        return await original(call, timeout_s=timeout_s)

    rig.upstream.call = noting  # type: ignore[method-assign]
    await rig.submit("a")
    rig.now.seconds += 4
    rig.upstream.answers.put_nowait(OK)
    await next_event(rig)
    assert timeouts == [6.0]


async def test_what_waits_past_its_deadline_fails_where_it_waits(make: Make) -> None:
    """Between two attempts, with nobody to claim it: housekeeping ends it."""
    rig = await make(
        CallPolicy(concurrency=1, attempts=5, backoff_s=1e6, max_backoff_s=1e6), deadline_s=10
    )
    await rig.submit("a")
    rig.upstream.answers.put_nowait(UpstreamUnreachable("down"))
    async with asyncio.timeout(10):
        while await rig.status("a") is not JobStatus.PENDING or not rig.upstream.calls:
            await asyncio.sleep(0)
    rig.now.seconds += 11
    await rig.dispatcher.tidy()
    event = await next_event(rig)
    assert (event.job_id, event.code) == ("a", "deadline_exceeded")
    assert event.calls == event.attempts == len(rig.upstream.calls) == 1


async def test_a_store_that_fails_for_a_while_costs_no_worker(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asyncproxy.dispatch.recorder.PAUSE_AFTER_ERROR_S", 0)
    rig = await make()
    claim, finish = rig.store.claim, rig.store.finish
    failures = iter(range(3))

    async def failing_claim(upstream: str) -> Claim:
        if next(failures, None) is not None:
            raise ConnectionError("the store is away")
        return await claim(upstream)

    async def failing_finish(job: Job, outcome: Outcome) -> bool:
        if next(failures, None) is not None:
            raise ConnectionError("the store is away")
        return await finish(job, outcome)

    rig.store.claim = failing_claim  # type: ignore[method-assign]
    await rig.submit("a")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).status is JobStatus.COMPLETED
    rig.store.finish = failing_finish  # type: ignore[method-assign]
    failures = iter(range(2))  # the outcome, and then its interruption, cannot be recorded
    await rig.submit("b")
    for _ in range(2):
        rig.upstream.answers.put_nowait(OK)
    event = await next_event(rig)
    assert (event.job_id, event.status) == ("b", JobStatus.COMPLETED)
    assert "the store is away" in caplog.text


async def test_what_expired_before_its_turn_is_not_sent(make: Make) -> None:
    rig = await make(deadline_s=10)
    await rig.submit("a")
    await rig.upstream.called.wait()
    await rig.submit("b")
    rig.now.seconds += 11
    rig.upstream.answers.put_nowait(OK)
    events = [await next_event(rig) for _ in range(2)]
    assert [(event.job_id, event.calls, event.attempts) for event in events] == [
        ("a", 1, 1),
        ("b", 0, 0),
    ]
    assert len(rig.upstream.calls) == 1
    found = await rig.store.get("b")
    assert isinstance(found, Outcome)
    assert b"deadline_exceeded" in found.envelope


@pytest.mark.parametrize("away", [StoreUnavailable("away"), StoreFull("full")])
async def test_an_outcome_is_kept_while_the_store_does_not_take_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, away: Exception
) -> None:
    monkeypatch.setattr("asyncproxy.dispatch.recorder._FIRST_RETRY_S", 0)
    rig = await make()
    finish = rig.store.finish
    failures = iter(range(3))

    async def failing_finish(job: Job, outcome: Outcome) -> bool:
        if next(failures, None) is not None:
            raise away
        return await finish(job, outcome)

    rig.store.finish = failing_finish  # type: ignore[method-assign]
    await rig.submit("a")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).status is JobStatus.COMPLETED
    assert len(rig.upstream.calls) == 1


async def test_a_job_whose_upstream_is_gone_goes_where_its_model_is_served(make: Make) -> None:
    rig = await make()
    for name, model in (("a", "m"), ("b", "gone")):
        job = Job(name, "embeddings", b"a", "was-once", model, rig.now(), 60)
        await rig.store.create(job, Call("embeddings", "/v1/embeddings", "", b"{}"))
        assert rig.dispatcher.retry_after_s(job) == 1
    await rig.dispatcher.tidy()
    failed = await next_event(rig)
    assert (failed.job_id, failed.status_code, failed.code) == ("b", 404, "model_not_found")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "a"


async def test_a_job_whose_upstream_nobody_serves_is_told_when_it_goes_elsewhere(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await make()
    job = Job("a", "embeddings", b"a", "was-once", "m", rig.now(), 60)
    monkeypatch.setattr(rig.store, "position", lambda _: QueuePosition(3, rig.now() + 14.5))
    assert rig.dispatcher.retry_after_s(job) == 15


async def test_a_request_that_cannot_be_read_ends_its_job_and_no_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await make()
    inner = rig.store.claim

    async def claim(upstream: str) -> Claim:
        claimed = await inner(upstream)
        if claimed.job.id == "a":
            raise UnreadableCall(claimed.job)
        return claimed

    monkeypatch.setattr(rig.store, "claim", claim)
    # The worker waits in the claim of before: the first job is for that one.
    await rig.submit("first")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "first"
    await rig.submit("a")
    event = await next_event(rig)
    assert (event.job_id, event.code) == ("a", "interrupted")
    await rig.submit("b")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).status is JobStatus.COMPLETED


async def test_an_outcome_that_waits_for_the_store_gets_the_grace_of_a_stop(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncproxy.dispatch.recorder._FIRST_RETRY_S", 0)
    rig = await make()
    finish, away, tried = rig.store.finish, asyncio.Event(), asyncio.Event()

    async def failing_finish(job: Job, outcome: Outcome) -> bool:
        tried.set()
        if not away.is_set():
            raise StoreUnavailable("away")
        return await finish(job, outcome)

    rig.store.finish = failing_finish  # type: ignore[method-assign]
    await rig.submit("a")
    rig.upstream.answers.put_nowait(OK)
    await tried.wait()
    draining = asyncio.ensure_future(rig.dispatcher.drain(30))
    await asyncio.sleep(0)
    assert not draining.done()
    away.set()
    async with asyncio.timeout(10):
        await draining
    assert await rig.status("a") is JobStatus.COMPLETED


async def test_a_store_that_fails_in_every_way_costs_no_worker(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an end nor a release can be recorded: the job is ended when one can."""
    monkeypatch.setattr("asyncproxy.dispatch.recorder.PAUSE_AFTER_ERROR_S", 0)
    rig = await make()
    finish, release = rig.store.finish, rig.store.release
    failures = iter(range(7))

    async def failing_finish(job: Job, outcome: Outcome) -> bool:
        if next(failures, None) is not None:
            raise ConnectionError("broken")
        return await finish(job, outcome)

    async def failing_release(job: Job, **more: Any) -> None:
        if next(failures, None) is not None:
            raise ConnectionError("broken")
        await release(job, **more)

    rig.store.finish = failing_finish  # type: ignore[method-assign]
    rig.store.release = failing_release  # type: ignore[method-assign]
    await rig.submit("a")
    for _ in range(3):
        rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "a"
    await rig.submit("b")
    assert (await next_event(rig)).job_id == "b"


async def test_a_job_that_is_lost_twice_costs_no_worker(make: Make) -> None:
    rig = await make()
    await rig.submit("a")
    await rig.upstream.called.wait()
    assert await rig.store.delete("a")
    assert rig.dispatcher.abort("a")
    assert rig.dispatcher.abort("a")
    await rig.submit("b")
    rig.upstream.answers.put_nowait(OK)
    assert (await next_event(rig)).job_id == "b"
