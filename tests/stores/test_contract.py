"""One suite for every store: what `stores/base.py` promises, and the invariants under any history.

A hypothesis state machine drives a dispatcher's moves, clients' moves and the clock against a model.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncproxy.core.errors import (
    ApiError,
    DeadlineExceeded,
    IdempotencyKeyReused,
    IllegalTransition,
    Overloaded,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
)
from asyncproxy.core.jobs import TERMINAL, Call, Job, JobStatus, Outcome, UpstreamResponse
from asyncproxy.stores.base import Alias, Claim, Limits, Store
from asyncproxy.stores.memory import MemoryStore
from asyncproxy.stores.redis.store import RedisStore
from asyncproxy.stores.sqlite.store import SqliteStore
from asyncproxy.wire import envelope
from tests import redis_server

T = TypeVar("T")

UPSTREAM = "gateway"
LIMITS = Limits(max_live=1000, max_live_per_credential=1000, max_bytes=1024**2)
START = 1_700_000_000.0


class Clock:
    """Both clocks of a store: a test moves them."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


MakeStore = Callable[[Limits, Clock], AbstractAsyncContextManager[Store]]


@asynccontextmanager
async def memory(limits: Limits, clock: Clock) -> AsyncIterator[Store]:
    store = MemoryStore(limits, clock=clock, monotonic=clock)
    async with store.opened(lambda _: None):
        yield store


@asynccontextmanager
async def sqlite(limits: Limits, clock: Clock) -> AsyncIterator[Store]:
    # One reader: what is asked first is answered first, which settled() relies on.
    with TemporaryDirectory() as folder, patch("asyncproxy.stores.sqlite.readers.COUNT", 1):
        store = SqliteStore(
            Path(folder) / "jobs.db", limits, full_durability=False, clock=clock, monotonic=clock
        )
        async with store.opened(lambda _: None):
            yield store


@asynccontextmanager
async def redis(limits: Limits, clock: Clock) -> AsyncIterator[Store]:
    store = RedisStore(
        redis_server.restricted(),  # who may do no more than the page for operators says is needed
        limits,
        keys=[b"k" * 32],
        seal_outcomes=False,
        prefix=f"contract-{secrets.token_hex(8)}",
        lease_s=100_000,  # longer than any history: what a lease is for is in test_redis.py
        clock=clock,
        monotonic=clock,
    )
    async with store.opened(lambda _: None):
        yield store


STORES: dict[str, MakeStore] = {"memory": memory, "sqlite": sqlite, "redis": redis}


@dataclass
class Bench:
    """Fresh stores of one kind, and their clock."""

    make: MakeStore
    clock: Clock
    stack: AsyncExitStack

    async def store(self, limits: Limits = LIMITS) -> Store:
        return await self.stack.enter_async_context(self.make(limits, self.clock))


@pytest.fixture(params=sorted(STORES))
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        yield Bench(STORES[request.param], Clock(), stack)


def call(body: bytes = b"{}") -> Call:
    return Call("embeddings", "/v1/embeddings", "Authorization\nBearer sk", body)


CALL = call()


def job(
    name: str, *, clock: Clock, credential: bytes = b"alice", model: str = "m", ttl_s: int = 60
) -> Job:
    return Job(name, "embeddings", credential, UPSTREAM, model, clock.now, ttl_s)


def large(size: int) -> bytes:
    """A JSON text of about so many bytes."""
    return b'"' + b"x" * size + b'"'


def completed(claimed: Job, clock: Clock, body: bytes = b'{"ok":1}') -> Outcome:
    return envelope.finished(
        claimed,
        UpstreamResponse(200, ((b"Content-Type", b"application/json"),), (body,)),
        now=clock.now,
    )


async def finish_next(store: Store, clock: Clock, body: bytes = b'{"ok":1}') -> None:
    claimed = (await store.claim(UPSTREAM)).job
    assert await store.finish(claimed, completed(claimed, clock, body))


async def settled(store: Store) -> None:
    """Let everything that was begun get as far as it can: each store answers in order."""
    for _ in range(3):
        await store.usage()
        await store.get("nobody's")
        for _ in range(5):
            await asyncio.sleep(0)


async def nothing_to_claim(store: Store) -> None:
    claim = asyncio.ensure_future(store.claim(UPSTREAM))
    await settled(store)
    assert not claim.done()
    claim.cancel()
    await asyncio.gather(claim, return_exceptions=True)


async def test_a_job_goes_its_way(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    pending = job("a", clock=clock)
    await store.create(pending, CALL)
    assert await store.get("a") == pending
    claimed, sent = await store.claim(UPSTREAM)
    assert sent == CALL
    assert claimed.status is JobStatus.PROCESSING
    assert await store.get("a") == claimed
    outcome = completed(claimed, clock)
    assert await store.finish(claimed, outcome)
    assert await store.get("a") == outcome
    assert await store.usage() == (0, 1, outcome.size)


async def test_a_finished_job_holds_neither_body_nor_credential(bench: Bench) -> None:
    store = await bench.store()
    await store.create(job("a", clock=bench.clock), call(b"the secret text"))
    await finish_next(store, bench.clock)
    found = await store.get("a")
    assert isinstance(found, Outcome)
    kept = repr(msgspec.structs.asdict(found))
    assert "secret" not in kept
    assert "Bearer" not in kept


async def test_the_outcome_is_recorded_once(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    await store.create(job("a", clock=clock), CALL)
    claimed = (await store.claim(UPSTREAM)).job
    first = completed(claimed, clock, b"1")
    assert await store.finish(claimed, first)
    assert not await store.finish(claimed, completed(claimed, clock, b"2"))
    await store.release(claimed, attempts=2)
    assert await store.get("a") == first
    await nothing_to_claim(store)


async def test_only_a_claimed_job_can_finish(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    pending = job("a", clock=clock)
    await store.create(pending, CALL)
    with pytest.raises(IllegalTransition):
        completed(pending, clock)
    claimed = msgspec.structs.replace(pending, status=JobStatus.PROCESSING)
    with pytest.raises(IllegalTransition):
        await store.finish(claimed, completed(claimed, clock))
    assert await store.get("a") == pending


async def test_a_release_goes_back_to_the_old_place(bench: Bench) -> None:
    store = await bench.store()
    for name in "abc":
        await store.create(job(name, clock=bench.clock), CALL)
    first = (await store.claim(UPSTREAM)).job
    await store.release(first, attempts=1)
    again = (await store.claim(UPSTREAM)).job
    assert (again.id, again.attempts) == ("a", 1)


async def test_a_release_with_a_delay_lets_others_go_first(bench: Bench) -> None:
    store = await bench.store()
    for name in "ab":
        await store.create(job(name, clock=bench.clock), CALL)
    await store.release((await store.claim(UPSTREAM)).job, attempts=1, delay_s=10)
    assert (await store.claim(UPSTREAM)).job.id == "b"
    await nothing_to_claim(store)
    bench.clock.now += 10
    await store.tick()
    assert (await store.claim(UPSTREAM)).job.id == "a"


async def test_a_pause_holds_its_lane_only(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    slow = job("a1", clock=clock)
    await store.create(slow, CALL)
    await store.create(job("a2", clock=clock), CALL)
    await store.pause(slow.lane, 10)
    await store.pause(slow.lane, 1)  # a shorter one does not end it
    await store.create(job("other model", clock=clock, model="n"), CALL)
    await store.create(job("other credential", clock=clock, credential=b"bob"), CALL)
    assert {(await store.claim(UPSTREAM)).job.id for _ in range(2)} == {
        "other model",
        "other credential",
    }
    clock.now += 5
    await store.tick()
    await nothing_to_claim(store)
    clock.now += 5
    await store.tick()
    assert [(await store.claim(UPSTREAM)).job.id for _ in range(2)] == ["a1", "a2"]


async def finish_large(store: Store, clock: Clock, body: bytes) -> Outcome:
    """A finished job with a result in parts, as a poll finds it."""
    await store.create(job("a", clock=clock), CALL)
    await finish_next(store, clock, body)
    found = await store.get("a")
    assert isinstance(found, Outcome)
    assert len(found.sizes) > 3
    return found


LARGE = json.dumps([str(number) for number in range(120_000)]).encode()


@pytest.mark.parametrize("start", [0, 1, 200_000, 196_608, len(LARGE) - 1, len(LARGE)])
async def test_a_large_result_is_read_in_parts_from_any_byte_on(bench: Bench, start: int) -> None:
    store = await bench.store(LIMITS._replace(max_bytes=16 * 1024**2))
    found = await finish_large(store, bench.clock, LARGE)
    assert len(found.envelope) < 1000
    parts = [part async for part in store.read(found, start)]
    assert b"".join(parts) == LARGE[start:]
    assert all(len(part) <= 256 * 1024 for part in parts)


async def test_a_large_result_takes_its_size_in_the_store_and_gives_it_back(bench: Bench) -> None:
    store = await bench.store(LIMITS._replace(max_bytes=16 * 1024**2))
    found = await finish_large(store, bench.clock, LARGE)
    assert (await store.usage()).bytes == found.size > len(LARGE)
    bench.clock.now += 60
    await store.tick()
    assert await store.usage() == (0, 0, 0)
    assert await store.get("a") is None


async def test_a_large_result_that_is_deleted_while_it_is_read_breaks_off_or_is_read(
    bench: Bench,
) -> None:
    """It never ends early as if that were all."""
    store = await bench.store(LIMITS._replace(max_bytes=16 * 1024**2))
    found = await finish_large(store, bench.clock, LARGE)
    reading = store.read(found)
    read = await anext(reading)
    assert await store.delete("a")
    with suppress(StoreUnavailable):
        async for part in reading:
            read += part
        assert read == LARGE


async def test_a_lane_gives_out_no_more_jobs_than_it_has_room_for(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    limited = job("a0", clock=clock)
    for number in range(5):
        await store.create(job(f"a{number}", clock=clock), CALL)
    store.allow(limited.lane, 2)
    assert [(await store.claim(UPSTREAM)).job.id for _ in range(2)] == ["a0", "a1"]
    await nothing_to_claim(store)
    await store.create(job("other model", clock=clock, model="n"), CALL)
    await store.create(job("other credential", clock=clock, credential=b"bob"), CALL)
    found = {(await store.claim(UPSTREAM)).job.id for _ in range(2)}
    assert found == {"other model", "other credential"}
    await nothing_to_claim(store)
    claim = asyncio.ensure_future(store.claim(UPSTREAM))
    await settled(store)
    store.allow(limited.lane, 1)
    async with asyncio.timeout(60):
        assert (await claim).job.id == "a2"
    await nothing_to_claim(store)
    store.allow(limited.lane, None)
    assert [(await store.claim(UPSTREAM)).job.id for _ in range(2)] == ["a3", "a4"]


async def test_a_job_that_comes_to_a_lane_without_room_waits_there(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    store.allow(job("a", clock=clock).lane, 0)
    await store.create(job("a", clock=clock), CALL)
    await nothing_to_claim(store)
    assert await store.delete("a")
    store.allow(job("b", clock=clock).lane, 1)
    await store.create(job("b", clock=clock), CALL)
    assert (await store.claim(UPSTREAM)).job.id == "b"


async def test_a_release_keeps_what_the_job_has_been_through(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    await store.create(job("a", clock=clock), CALL)
    claimed = (await store.claim(UPSTREAM)).job
    been = msgspec.structs.replace(claimed, calls=3, held_s=12.5, held_at=clock.now)
    await store.release(been, attempts=1)
    again = (await store.claim(UPSTREAM)).job
    assert (again.attempts, again.calls, again.held_s, again.held_at) == (1, 3, 12.5, clock.now)


async def test_credentials_take_turns(bench: Bench) -> None:
    store = await bench.store()
    for number in range(10):
        await store.create(job(f"many{number}", clock=bench.clock, credential=b"many"), CALL)
    await store.create(job("one", clock=bench.clock, credential=b"one"), CALL)
    order = [(await store.claim(UPSTREAM)).job.id for _ in range(11)]
    assert order.index("one") <= 1
    assert [name for name in order if name != "one"] == [f"many{n}" for n in range(10)]


async def test_a_waiting_claim_gets_what_comes(bench: Bench) -> None:
    store = await bench.store()
    claims = [asyncio.ensure_future(store.claim(UPSTREAM)) for _ in range(3)]
    await asyncio.sleep(0)
    for name in "abc":
        await store.create(job(name, clock=bench.clock), CALL)
    assert {(await claim).job.id for claim in claims} == {"a", "b", "c"}


async def test_a_cancelled_claim_loses_no_job(bench: Bench) -> None:
    store = await bench.store()
    claims = [asyncio.ensure_future(store.claim(UPSTREAM)) for _ in range(2)]
    await asyncio.sleep(0)
    await store.create(job("a", clock=bench.clock), CALL)
    for claim in claims:  # one of them has been woken by now, and neither has run
        claim.cancel()
    await asyncio.gather(*claims, return_exceptions=True)
    got = [claim.result().job.id for claim in claims if not claim.cancelled()]
    assert got or (await store.claim(UPSTREAM)).job.id == "a"


async def test_a_cancelled_claim_passes_its_turn_on(bench: Bench) -> None:
    store = await bench.store()
    claims = [asyncio.ensure_future(store.claim(UPSTREAM)) for _ in range(2)]
    await asyncio.sleep(0)
    await store.create(job("a", clock=bench.clock), CALL)
    claims[1].cancel()
    await asyncio.gather(claims[1], return_exceptions=True)
    if claims[1].cancelled():  # it had been woken, and had not run yet
        async with asyncio.timeout(60):
            assert (await claims[0]).job.id == "a"
    else:
        assert claims[1].result().job.id == "a"
        claims[0].cancel()


async def test_limits_refuse_and_change_nothing(bench: Bench) -> None:
    limits = Limits(max_live=2, max_live_per_credential=1, max_bytes=100_000)
    store, clock = await bench.store(limits), bench.clock
    await store.create(job("a", clock=clock), CALL)
    with pytest.raises(TooManyJobs):
        await store.create(job("b", clock=clock), CALL)
    await store.create(job("c", clock=clock, credential=b"bob"), CALL)
    with pytest.raises(Overloaded):
        await store.create(job("d", clock=clock, credential=b"carol"), CALL)
    assert await store.get("b") is None
    assert (await store.usage()).live == 2
    await store.delete("c")
    await store.create(job("d", clock=clock, credential=b"carol"), CALL)


async def test_a_full_store_refuses_until_a_result_expires(bench: Bench) -> None:
    store, clock = await bench.store(Limits(100, 100, 20_000)), bench.clock
    await store.create(job("a", clock=clock, ttl_s=10), CALL)
    await finish_next(store, clock, large(17_000))
    with pytest.raises(StoreFull):
        await store.create(job("b", clock=clock), call(b"x" * 2_000))
    assert await store.get("a") is not None
    clock.now += 10
    await store.create(job("b", clock=clock), call(b"x" * 2_000))
    assert await store.get("a") is None


async def test_waiting_requests_take_half_at_the_most(bench: Bench) -> None:
    store = await bench.store(Limits(100, 100, 10_000))
    with pytest.raises(StoreFull):
        await store.create(job("a", clock=bench.clock), call(b"x" * 5_001))
    await store.create(job("b", clock=bench.clock), call(b"x" * 3_000))


async def test_while_results_fill_it_nothing_is_sent(bench: Bench) -> None:
    store, clock = await bench.store(Limits(100, 100, 20_000)), bench.clock
    for name in "ab":
        await store.create(job(name, clock=clock, ttl_s=10), CALL)
    await finish_next(store, clock, large(30_000))
    await nothing_to_claim(store)
    clock.now += 10
    waiting = asyncio.ensure_future(store.claim(UPSTREAM))
    await asyncio.sleep(0)
    await store.tick()
    assert (await waiting).job.id == "b"


async def test_expiry_is_at_its_time_and_not_before(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    for name, ttl_s in (("short", 10), ("long", 20)):
        await store.create(job(name, clock=clock, ttl_s=ttl_s), CALL)
        await finish_next(store, clock)
    clock.now = START + 9.999
    assert await store.get("short") is not None
    clock.now = START + 10
    assert await store.get("short") is None
    assert await store.get("long") is not None
    await store.tick()
    assert (await store.usage()).results == 1
    clock.now = START + 20
    await store.tick()
    assert await store.usage() == (0, 0, 0)


async def test_delete_in_every_state(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    assert not await store.delete("a")
    await store.create(job("a", clock=clock), CALL)
    assert await store.delete("a")
    await nothing_to_claim(store)
    await store.create(job("b", clock=clock), CALL)
    claimed = (await store.claim(UPSTREAM)).job
    assert await store.delete("b")
    assert not await store.finish(claimed, completed(claimed, clock))
    await store.release(claimed, attempts=1)
    await nothing_to_claim(store)
    await store.create(job("c", clock=clock), CALL)
    await finish_next(store, clock)
    assert await store.delete("c")
    assert not await store.delete("c")
    assert await store.usage() == (0, 0, 0)


async def test_overdue_jobs_are_claimed_once(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    await store.create(job("sent", clock=clock), CALL)
    await store.claim(UPSTREAM)
    await store.create(job("waits", clock=clock), CALL)
    clock.now += 10
    await store.create(job("young", clock=clock), CALL)
    overdue = await store.claim_overdue(START + 5)
    assert [(j.id, j.status) for j in overdue] == [("waits", JobStatus.PROCESSING)]
    assert await store.claim_overdue(START + 5) == []
    assert (await store.claim(UPSTREAM)).job.id == "young"


async def test_a_claim_that_was_lost_changes_nothing_any_more(bench: Bench) -> None:
    """A worker that slept for too long: the job was given back and taken again meanwhile."""
    store, clock = await bench.store(), bench.clock
    await store.create(job("a", clock=clock), CALL)
    first = (await store.claim(UPSTREAM)).job
    await store.release(first, attempts=0)
    second = (await store.claim(UPSTREAM)).job
    assert not await store.finish(first, completed(first, clock, b"1"))
    await store.release(first, attempts=7)
    assert await store.get("a") == second
    assert await store.finish(second, completed(second, clock, b"2"))


async def test_a_release_may_change_upstream_model_and_call(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    await store.create(job("a", clock=clock), CALL)
    claimed = (await store.claim(UPSTREAM)).job
    moved = msgspec.structs.replace(claimed, upstream="other", model="n")
    await store.release(moved, attempts=0, call=call(b"another body"))
    await nothing_to_claim(store)
    again = await store.claim("other")
    assert (again.job.model, again.call.body) == ("n", b"another body")


async def test_orphans_are_the_jobs_of_upstreams_that_nobody_serves(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    for name in "ab":
        await store.create(job(name, clock=clock), CALL)
    running = (await store.claim(UPSTREAM)).job
    assert await store.claim_orphans({UPSTREAM}) == []
    clock.now += 1_000_000  # longer than a node may be away that serves it
    (orphan,) = await store.claim_orphans({"another"})
    assert (orphan.id, orphan.status) == ("b", JobStatus.PROCESSING)
    moved = msgspec.structs.replace(orphan, upstream="another")
    await store.release(moved, attempts=orphan.attempts)
    again = await store.claim("another")
    assert (again.job.id, again.call) == ("b", CALL)
    assert await store.finish(running, completed(running, clock))


async def test_an_alias_finds_its_job_for_as_long_as_that_lives(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    alias = Alias(b"name", b"print")
    pending = job("a", clock=clock, ttl_s=10)
    assert await store.create(pending, CALL, alias) is None
    assert await store.create(job("b", clock=clock), CALL, alias) == pending
    with pytest.raises(IdempotencyKeyReused):
        await store.create(job("c", clock=clock), CALL, Alias(b"name", b"another print"))
    await finish_next(store, clock)
    found = await store.create(job("d", clock=clock), CALL, alias)
    assert isinstance(found, Outcome)
    assert found.id == "a"
    assert (await store.usage()).live == 0
    clock.now += 10
    assert await store.create(job("e", clock=clock), CALL, alias) is None
    assert await store.delete("e")
    assert await store.create(job("f", clock=clock), CALL, alias) is None


async def test_equal_requests_at_once_are_one_job(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    alias = Alias(b"name", b"print")
    found = await asyncio.gather(
        *(store.create(job(name, clock=clock), CALL, alias) for name in "abcdef")
    )
    (ours,) = [name for name, there in zip("abcdef", found, strict=True) if there is None]
    assert {there.id for there in found if there is not None} == {ours}
    assert (await store.usage()).live == 1


async def test_an_alias_that_does_not_attach_is_the_new_jobs(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    for name in "ab":
        made = await store.create(
            job(name, clock=clock), CALL, Alias(b"name", b"", reuse_existing=False)
        )
        assert made is None
    found = await store.create(job("c", clock=clock), CALL, Alias(b"name", b""))
    assert found is not None
    assert found.id == "b"
    assert await store.delete("a")  # the name is not its any more
    assert (await store.create(job("d", clock=clock), CALL, Alias(b"name", b""))) is not None


@pytest.mark.parametrize("keep_s", [0.0, 5.0])
async def test_a_name_for_once_goes_with_the_delivery(bench: Bench, keep_s: float) -> None:
    store, clock = await bench.store(), bench.clock
    once = Alias(b"name", b"", single_use=True)
    await store.create(job("a", clock=clock), CALL, once)
    await finish_next(store, clock)
    outcome = await store.create(job("b", clock=clock), CALL, once)
    assert isinstance(outcome, Outcome)
    await store.retire(outcome, keep_s)
    assert (await store.get("a") is not None) is bool(keep_s)
    clock.now += keep_s
    assert await store.get("a") is None
    await store.tick()
    assert await store.usage() == (0, 0, 0)
    assert await store.create(job("c", clock=clock), CALL, once) is None


async def test_a_name_that_is_not_for_once_stays_after_the_delivery(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    alias = Alias(b"name", b"")
    await store.create(job("a", clock=clock), CALL, alias)
    await finish_next(store, clock)
    outcome = await store.get("a")
    assert isinstance(outcome, Outcome)
    await store.retire(outcome, 0)
    assert await store.create(job("b", clock=clock), CALL, alias) == outcome


async def test_who_waits_hears_of_the_end_at_once(bench: Bench) -> None:
    store, clock = await bench.store(), bench.clock
    for name in "abc":
        await store.create(job(name, clock=clock), CALL)
    waiting = [asyncio.ensure_future(store.wait(name, 30)) for name in "aab"]
    await settled(store)
    await finish_next(store, clock)
    await store.delete("b")
    async with asyncio.timeout(60):
        first, second, deleted = await asyncio.gather(*waiting)
    assert first == second == await store.get("a")
    assert isinstance(first, Outcome)
    assert deleted is None
    still = await store.wait("c", 0.001)
    assert isinstance(still, Job)
    store.release_waiters()
    assert await store.wait("c", 30) == still


async def test_a_store_that_works_passes_its_check(bench: Bench) -> None:
    await (await bench.store()).check()


async def test_credential_keys_are_secrets(bench: Bench) -> None:
    keys = (await bench.store()).credential_keys
    assert keys
    assert all(len(key) == 32 for key in keys)


class Histories(RuleBasedStateMachine):
    """Any history of clients, dispatcher, upstream and clock, against a model of three dicts."""

    kind = "memory"

    @initialize(max_live=st.integers(1, 6), per_credential=st.integers(1, 4))
    def begin(self, max_live: int, per_credential: int) -> None:
        self.runner = asyncio.Runner()
        self.clock = Clock()
        self.limits = Limits(max_live, per_credential, 100_000)
        self.stack = AsyncExitStack()
        made = STORES[self.kind](self.limits, self.clock)
        self.store = self.run(self.stack.enter_async_context(made))
        self.live: dict[str, Job] = {}
        self.done: dict[str, tuple[Job, Outcome]] = {}
        self.gone: set[str] = set()
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.stack.aclose())
            self.runner.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    @rule(
        credential=st.sampled_from([b"a", b"b", b"c"]),
        model=st.sampled_from("mn"),
        ttl_s=st.integers(1, 30),
    )
    def submit(self, credential: bytes, model: str, ttl_s: int) -> None:
        self.count += 1
        new = job(str(self.count), clock=self.clock, credential=credential, model=model, ttl_s=ttl_s)
        own = sum(j.credential == credential for j in self.live.values())
        before = self.run(self.store.usage())
        try:
            self.run(self.store.create(new, CALL))
        except ApiError as error:
            full = isinstance(error, Overloaded) and len(self.live) >= self.limits.max_live
            assert full or (
                isinstance(error, TooManyJobs) and own >= self.limits.max_live_per_credential
            )
            assert self.run(self.store.usage()) == before
        else:
            assert own < self.limits.max_live_per_credential
            assert len(self.live) < self.limits.max_live
            self.live[new.id] = new

    @rule(
        outcome=st.sampled_from(
            ["completed", "failed", "ours", "released", "delayed", "paused", "kept"]
        )
    )
    def claim(self, outcome: str) -> None:
        claim = self.run(_claim_now(self.store))
        if claim is None:
            return
        claimed = claim.job
        known = self.live[claimed.id]
        assert known.status is JobStatus.PENDING
        older = [
            j
            for j in self.live.values()
            if j.lane == claimed.lane and j.status is JobStatus.PENDING and int(j.id) < int(claimed.id)
        ]
        assert not [j for j in older if j.attempts == 0], "first come, first served"
        self.live[claimed.id] = claimed
        if outcome in ("completed", "failed", "ours"):
            self.end(claimed, outcome)
        elif outcome != "kept":
            delay_s = 5.0 if outcome == "delayed" else 0.0
            self.run(self.store.release(claimed, attempts=claimed.attempts + 1, delay_s=delay_s))
            if outcome == "paused":
                self.run(self.store.pause(claimed.lane, 5.0))
            self.live[claimed.id] = msgspec.structs.replace(
                claimed, status=JobStatus.PENDING, attempts=claimed.attempts + 1
            )

    def end(self, claimed: Job, outcome: str) -> None:
        if outcome == "completed":
            finished = completed(claimed, self.clock)
        elif outcome == "failed":
            finished = envelope.finished(
                claimed, UpstreamResponse(400, (), (b"bad",)), now=self.clock.now
            )
        else:
            finished = envelope.failed(claimed, DeadlineExceeded("late"), now=self.clock.now)
        assert self.run(self.store.finish(claimed, finished))
        del self.live[claimed.id]
        self.done[claimed.id] = claimed, finished

    @precondition(lambda self: any(j.status is JobStatus.PROCESSING for j in self.live.values()))
    @rule(data=st.data())
    def end_a_kept_one(self, data: st.DataObject) -> None:
        kept = [j for j in self.live.values() if j.status is JobStatus.PROCESSING]
        self.end(data.draw(st.sampled_from(kept)), data.draw(st.sampled_from(["completed", "failed"])))

    @precondition(lambda self: self.live or self.done)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted([*self.live, *self.done])))
        expected = name in self.live or self.done[name][1].expires_at > self.clock.now
        assert self.run(self.store.delete(name)) is expected
        self.live.pop(name, None)
        self.done.pop(name, None)
        self.gone.add(name)

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def finish_twice(self, data: st.DataObject) -> None:
        claimed, finished = data.draw(st.sampled_from(list(self.done.values())))
        other = msgspec.structs.replace(finished, envelope=b"{}")
        assert not self.run(self.store.finish(claimed, other))

    @rule(seconds=st.sampled_from([0.5, 5.0, 29.0]), tick=st.booleans())
    def time_passes(self, seconds: float, tick: bool) -> None:  # noqa: FBT001
        self.clock.now += seconds
        if tick:
            self.run(self.store.tick())

    @rule()
    def deadline(self) -> None:
        before = self.clock.now - 20
        expected = {
            j.id for j in self.live.values() if j.status is JobStatus.PENDING and j.created_at <= before
        }
        overdue = self.run(self.store.claim_overdue(before))
        assert {j.id for j in overdue} == expected
        for late in overdue:
            self.live[late.id] = late
            self.end(late, "ours")

    @invariant()
    def what_a_client_sees_is_true(self) -> None:
        if not hasattr(self, "store"):
            return
        for name, known in self.live.items():
            found = self.run(self.store.get(name))
            assert isinstance(found, Job)
            assert (found.status, found.attempts) == (known.status, known.attempts)
        for name, (_, finished) in self.done.items():
            found = self.run(self.store.get(name))
            assert finished.status in TERMINAL
            assert found == (finished if finished.expires_at > self.clock.now else None)
        for name in self.gone:
            assert self.run(self.store.get(name)) is None
        usage = self.run(self.store.usage())
        assert usage.live == len(self.live)
        assert usage.live <= self.limits.max_live
        size = sum(j.size + CALL.size for j in self.live.values())
        size += sum(f.size for _, f in self.done.values() if f.expires_at > self.clock.now)
        assert usage.bytes >= size


async def _claim_now(store: Store) -> Claim | None:
    claim = asyncio.ensure_future(store.claim(UPSTREAM))
    await settled(store)
    if claim.done():
        return claim.result()
    claim.cancel()
    await asyncio.gather(claim, return_exceptions=True)
    return None


class SqliteHistories(Histories):
    kind = "sqlite"


TestSqliteHistories = SqliteHistories.TestCase
TestSqliteHistories.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)

TestMemoryHistories = Histories.TestCase
TestMemoryHistories.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


class RedisHistories(Histories):
    kind = "redis"


TestRedisHistories = RedisHistories.TestCase
TestRedisHistories.settings = settings(max_examples=25, stateful_step_count=50, deadline=None)
