"""What only a store has that many processes share: leases, nodes that are told, a Redis that goes away."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from redis.asyncio import Redis
from redis.exceptions import RedisError

from asyncproxy.core.errors import IllegalTransition, StartupError, StoreFull, StoreUnavailable
from asyncproxy.core.jobs import Call, Job, JobStatus, Outcome
from asyncproxy.stores.base import Alias, Claim, Limits, UnreadableCall
from asyncproxy.stores.redis import claims as claims_module
from asyncproxy.stores.redis import connection
from asyncproxy.stores.redis.schema import SCHEMA
from asyncproxy.stores.redis.store import RedisStore
from tests import redis_server
from tests.redis_server import RedisServer
from tests.stores.test_contract import CALL, LIMITS, UPSTREAM, Clock, call, completed, job, large

LEASE_S = 15.0


class Lab:
    """Nodes on one Redis, which have a clock in common, and what they were told to be lost."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self.server = server
        self.stack = stack
        self.clock = Clock()
        self.prefix = secrets.token_hex(8)
        self.lost: list[str] = []
        self.redis: Redis = Redis(port=server.port)

    async def node(self, limits: Limits = LIMITS, **options: Any) -> RedisStore:
        """Another node. ``clock=None``: with the time of Redis."""
        known = {
            "keys": [b"k" * 32],
            "seal_outcomes": False,
            "prefix": self.prefix,
            "lease_s": LEASE_S,
            "clock": self.clock,
            "monotonic": self.clock,
        }
        store = RedisStore(self.server.url, limits, **{**known, **options})
        await self.stack.enter_async_context(store.opened(self.lost.append))
        return store

    def key(self, rest: str) -> str:
        return f"{{{self.prefix}}}:{rest}"

    async def submit(self, store: RedisStore, *names: str, credential: bytes = b"alice") -> None:
        for name in names:
            await store.create(job(name, clock=self.clock, credential=credential), CALL)

    async def finish(self, store: RedisStore, claim: Claim, body: bytes = b'{"ok":1}') -> bool:
        return await store.finish(claim.job, completed(claim.job, self.clock, body))


async def lab_on(server: RedisServer) -> AsyncIterator[Lab]:
    async with AsyncExitStack() as stack:
        lab = Lab(server, stack)
        stack.push_async_callback(lab.redis.aclose)
        yield lab


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async for lab in lab_on(redis_server.shared()):
        yield lab


@pytest.fixture
async def own_lab() -> AsyncIterator[Lab]:
    """One whose Redis writes everything to disk, and that a test may kill."""
    server = RedisServer(appendonly="yes", appendfsync="always")
    try:
        async for lab in lab_on(server):
            yield lab
    finally:
        server.close()


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await true():
            await asyncio.sleep(0.005)


async def back(store: RedisStore) -> None:
    """Wait until a store is within reach again."""

    async def answers() -> bool:
        try:
            await store.check()
        except StoreUnavailable:
            return False
        return True

    await until(answers)


async def claims(store: RedisStore) -> Claim:
    async with asyncio.timeout(60):
        return await store.claim(UPSTREAM)


async def finds_nothing(store: RedisStore) -> None:
    claim = asyncio.ensure_future(store.claim(UPSTREAM))
    for _ in range(3):
        await store.usage()
        await asyncio.sleep(0)
    assert not claim.done()
    claim.cancel()
    await asyncio.gather(claim, return_exceptions=True)


async def test_nodes_never_claim_the_same_job(lab: Lab) -> None:
    nodes = [await lab.node() for _ in range(3)]
    taken = asyncio.gather(*(claims(node) for node in nodes for _ in range(20)))
    names = [str(number) for number in range(60)]
    await asyncio.gather(*(lab.submit(nodes[number % 3], name) for number, name in enumerate(names)))
    assert sorted(claim.job.id for claim in await taken) == sorted(names)


async def test_credentials_take_turns_across_nodes(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, *(f"many{number}" for number in range(10)), credential=b"many")
    await lab.submit(b, "one", credential=b"one")
    order = [(await claims(node)).job.id for node in (a, b, a)]
    assert "one" in order[:2]


async def test_a_node_without_work_hears_of_a_job_from_another(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    waiting = asyncio.ensure_future(claims(b))
    await b.usage()
    await lab.submit(a, "a")
    assert (await waiting).job.id == "a"


async def test_a_turn_that_a_node_has_no_use_for_is_passed_on(lab: Lab) -> None:
    a, b, c = await lab.node(), await lab.node(), await lab.node()
    await finds_nothing(a)
    await finds_nothing(b)
    waiting = asyncio.ensure_future(claims(c))
    await c.usage()
    await lab.submit(a, "a")
    assert (await waiting).job.id == "a"


async def test_a_node_that_is_gone_takes_no_turn(lab: Lab) -> None:
    a, c = await lab.node(), await lab.node()
    async with AsyncExitStack() as stack:
        b = RedisStore(
            lab.server.url, LIMITS, keys=[b"k" * 32], seal_outcomes=False, prefix=lab.prefix, lease_s=1
        )
        await stack.enter_async_context(b.opened(lab.lost.append))
        await finds_nothing(b)
    waiting = asyncio.ensure_future(claims(c))
    await c.usage()
    await lab.submit(a, "a")
    assert (await waiting).job.id == "a"


async def test_a_waiter_hears_of_a_finish_on_another_node(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(b, "a")
    waiting = asyncio.ensure_future(b.wait("a", 60))
    await b.usage()
    claim = await claims(a)
    outcome = completed(claim.job, lab.clock)
    assert await a.finish(claim.job, outcome)
    async with asyncio.timeout(60):
        assert await waiting == outcome


async def test_a_waiter_hears_of_a_delete_on_another_node(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a")
    waiting = asyncio.ensure_future(b.wait("a", 60))
    await b.usage()
    assert await a.delete("a")
    async with asyncio.timeout(60):
        assert await waiting is None


async def test_a_delete_reaches_the_node_that_sends_the_job(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a")
    claim = await claims(a)
    assert await b.delete("a")

    async def told() -> bool:
        return lab.lost == ["a"]

    await until(told)
    assert not await lab.finish(a, claim)


async def test_a_silent_node_loses_its_jobs_to_another(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a", "b")
    first = await claims(a)
    lab.clock.now += LEASE_S - 0.001
    await b.tick()
    found = await b.get("a")
    assert isinstance(found, Job)
    assert found.status is JobStatus.PROCESSING
    lab.clock.now += 0.001
    second = await claims(b)
    assert (second.job.id, second.job.claims, second.job.attempts) == ("a", 2, 0), "at its old place"
    # The one that slept wakes up.
    await a.renew()
    assert lab.lost == ["a"]
    assert not await lab.finish(a, first, b"1")
    await a.release(first.job, attempts=7)
    assert await a.get("a") == second.job
    assert await lab.finish(b, second, b"2")


async def test_a_renewed_lease_goes_on(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a")
    claim = await claims(a)
    for _ in range(10):
        lab.clock.now += LEASE_S / 3
        await a.renew()
        await b.tick()
    await finds_nothing(b)
    assert lab.lost == []
    assert await lab.finish(a, claim)


async def test_a_lease_that_ran_out_counts_until_another_claims(lab: Lab) -> None:
    """A call is not thrown away, and not made again, because Redis was away for longer than a lease."""
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a", "b")
    first, second = await claims(a), await claims(a)
    lab.clock.now += LEASE_S
    await b.tick()
    found = await b.get("a")
    assert isinstance(found, Job)
    assert found.status is JobStatus.PENDING
    assert await lab.finish(a, first)
    await a.renew()
    await finds_nothing(b)
    assert await lab.finish(a, second)
    assert (await b.usage()).live == 0


async def test_a_released_claim_does_not_count(lab: Lab) -> None:
    a = await lab.node()
    await lab.submit(a, "a")
    claim = await claims(a)
    await a.release(claim.job, attempts=1)
    with pytest.raises(IllegalTransition):
        await lab.finish(a, claim)
    await a.release(claim.job, attempts=5)
    assert (await claims(a)).job.attempts == 1


async def test_a_pause_holds_on_all_nodes(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a", "b")
    claim = await claims(a)
    await a.release(claim.job, attempts=0, delay_s=10, whole_lane=True)
    await finds_nothing(b)
    assert (position := a.position(claim.job)) is not None
    assert position.not_before == lab.clock.now + 10
    lab.clock.now += 10
    assert [(await claims(b)).job.id, (await claims(a)).job.id] == ["a", "b"]


async def test_a_pause_costs_the_same_for_any_number_of_jobs(lab: Lab) -> None:
    a = await lab.node()

    async def steps(jobs: int, model: str) -> int:
        waiting = [job(f"{model}{number}", clock=lab.clock, model=model) for number in range(jobs)]
        await asyncio.gather(*(a.create(one, CALL) for one in waiting))
        before = await commands(lab.redis)
        await a.pause(waiting[0].lane, 10)
        return await commands(lab.redis) - before

    assert await steps(1, "m") == await steps(500, "n")


async def commands(redis: Redis) -> int:
    """How many commands Redis has run, those in scripts too."""
    stats: dict[str, Any] = await redis.info("commandstats")
    return sum(
        one["calls"] for name, one in stats.items() if name not in ("cmdstat_info", "cmdstat_hello")
    )


async def test_submit_poll_and_finish_are_one_round_trip_each(lab: Lab) -> None:
    a = await lab.node()
    sent: list[str] = []
    inner = a._node.call

    async def counting(*args: Any, **kwargs: Any) -> Any:
        sent.append(args[0])
        return await inner(*args, **kwargs)

    a._node.call = counting
    await lab.submit(a, "a")
    assert sent == ["EVALSHA"]
    await a.get("a")
    assert sent == ["EVALSHA", "HMGET"]
    claim = await claims(a)
    assert sent == ["EVALSHA", "HMGET", "EVALSHA"]
    await lab.finish(a, claim)
    assert sent == ["EVALSHA", "HMGET", "EVALSHA", "EVALSHA"]


async def test_many_claims_are_one_question(lab: Lab) -> None:
    a = await lab.node()
    await lab.submit(a, *"abcde")
    asked: list[int] = []
    inner = a._claims._ask

    async def counting(upstream: str, count: int) -> Any:
        asked.append(count)
        return await inner(upstream, count)

    a._claims._ask = counting  # type: ignore[method-assign]
    taken = await asyncio.gather(*(claims(a) for _ in range(5)))
    assert [claim.job.id for claim in taken] == list("abcde")
    assert asked == [5]


async def test_one_answer_holds_only_so_many_bytes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "_MOST_CALL_BYTES", 1)
    a = await lab.node()
    await lab.submit(a, *"abc")
    taken = await asyncio.gather(*(claims(a) for _ in range(3)))
    assert {claim.job.id for claim in taken} == set("abc")


async def test_a_large_request_goes_its_way(lab: Lab) -> None:
    limits = Limits(10, 10, 100 * 1024**2)
    a, b = await lab.node(limits), await lab.node(limits)
    waiting = asyncio.ensure_future(claims(b))
    sent = call(large(3 * 1024**2))
    await a.create(job("a", clock=lab.clock), sent)
    claim = await waiting
    assert claim.call == sent
    outcome = completed(claim.job, lab.clock, large(4 * 1024**2))
    hearing = asyncio.ensure_future(a.wait("a", 60))
    await a.usage()
    assert await b.finish(claim.job, outcome)
    async with asyncio.timeout(60):
        heard = await hearing
    for found in (heard, await a.get("a")):
        assert isinstance(found, Outcome)
        assert found.part_sizes == outcome.sizes
        assert b"".join([part async for part in a.read(found)]) == large(4 * 1024**2)
    await lab.redis.delete(lab.key("parts:a"))  # as if it had expired between two questions
    with pytest.raises(StoreUnavailable):
        await anext(a.read(msgspec.structs.replace(outcome, parts=(), part_sizes=outcome.sizes)))


async def test_a_large_result_of_the_version_before_goes_its_way(lab: Lab) -> None:
    """It is in one piece, in a field of its own."""
    a = await lab.node(Limits(10, 10, 100 * 1024**2))
    await lab.submit(a, "a")
    outcome = completed((await claims(a)).job, lab.clock, large(4 * 1024**2))
    whole = a._codec._sealed if a._codec._seal_outcomes else bytes
    data = whole(msgspec.msgpack.encode(outcome))
    await lab.redis.hset(lab.key("job:a"), mapping={"s": 2, "F": data, "e": 2**50})
    found = await a.get("a")
    assert found == outcome
    assert isinstance(found, Outcome)
    assert b"".join([part async for part in a.read(found)]) == large(4 * 1024**2)
    await lab.redis.hdel(lab.key("job:a"), "F")  # as if it had expired between the two questions
    assert await a.get("a") is None


async def test_a_large_request_that_is_deleted_while_it_is_claimed(lab: Lab) -> None:
    limits = Limits(10, 10, 100 * 1024**2)
    a = await lab.node(limits)
    inner = a._node.call

    async def deleting(*args: Any, **kwargs: Any) -> Any:
        if args[0] == "HGET":
            await a.delete("a")
        return await inner(*args, **kwargs)

    a._node.call = deleting
    await a.create(job("a", clock=lab.clock), call(large(1024**2)))
    await lab.submit(a, "b")
    taken = [asyncio.ensure_future(claims(a)) for _ in range(2)]
    done, left = await asyncio.wait(taken, return_when=asyncio.FIRST_COMPLETED)
    assert done.pop().result().job.id == "b"
    left.pop().cancel()


async def test_a_finish_whose_reply_was_lost_is_recorded_once(lab: Lab) -> None:
    a = await lab.node()
    await lab.submit(a, "a")
    claim = await claims(a)
    outcome = completed(claim.job, lab.clock)
    inner = a._node.call

    async def losing(*args: Any, **kwargs: Any) -> Any:
        await inner(*args, **kwargs)
        raise StoreUnavailable("the reply was lost")

    a._node.call = losing
    with pytest.raises(StoreUnavailable):
        await a.finish(claim.job, outcome)
    a._node.call = inner
    assert await a.finish(claim.job, outcome), "it was this one"
    assert not await a.finish(claim.job, completed(claim.job, lab.clock, b"2"))
    assert await a.usage() == (0, 1, outcome.size)


async def test_a_result_expires_by_itself_and_with_its_name(lab: Lab) -> None:
    a = await lab.node(clock=None)
    alias = Alias(b"name", b"")
    assert await a.create(job("a", clock=lab.clock), CALL, alias) is None
    assert await lab.redis.pttl(lab.key("job:a")) == -1, "a live job does not expire"
    claim = await claims(a)
    outcome = msgspec.structs.replace(completed(claim.job, lab.clock), expires_at=2**40)
    assert await a.finish(claim.job, outcome)
    lifetime = await lab.redis.pttl(lab.key("job:a"))
    assert lifetime > 10**12
    assert await lab.redis.pttl(lab.key("alias:" + b"name".hex())) > 10**12
    # As if its time had come, at once for Redis.
    await lab.redis.pexpire(lab.key("job:a"), 0)
    assert await a.get("a") is None
    assert await a.create(job("b", clock=lab.clock), CALL, alias) is None, "the name is free"


async def test_a_result_whose_time_is_over_is_gone_at_once(lab: Lab) -> None:
    a = await lab.node(clock=None)
    await lab.submit(a, "a")
    claim = await claims(a)
    assert await lab.finish(a, claim), "by the clock of the lab, it expired years ago"

    async def gone() -> bool:
        return await a.get("a") is None and await a.usage() == (0, 0, 0)

    await until(gone)


async def test_nothing_stays_when_all_is_gone(lab: Lab) -> None:
    """No table grows with what clients invent."""
    a = await lab.node()
    for number in range(5):
        one = job(str(number), clock=lab.clock, credential=b"%d" % number, model=f"m{number}")
        await a.create(one, CALL, Alias(b"%d" % number, b"f"))
    for step in range(5):
        claim = await claims(a)
        if step == 0:
            await a.release(claim.job, attempts=1, delay_s=5)
        elif step == 1:
            await a.release(claim.job, attempts=1, delay_s=5, whole_lane=True)
        else:
            await lab.finish(a, claim)
    for number in range(5):
        assert await a.delete(str(number))
    lab.clock.now += 100
    await finds_nothing(a)
    left = {key.decode().removeprefix(lab.key("")) async for key in lab.redis.scan_iter(lab.key("*"))}
    assert left == {"meta", "totals", "served", f"idle:{UPSTREAM}"}


async def test_a_job_that_a_node_has_no_key_for_is_left_to_the_others(lab: Lab) -> None:
    """While keys are rotated. It is tried for some minutes, and ends then: somebody waits for it."""
    a = await lab.node()
    await lab.submit(a, "a", "b")
    sealed = await lab.redis.hget(lab.key("job:a"), "c")
    await lab.redis.hset(lab.key("job:a"), "c", "sealed with another key")
    assert (await claims(a)).job.id == "b"
    found = await a.get("a")
    assert isinstance(found, Job)
    assert (found.status, found.attempts) == (JobStatus.PENDING, 0)
    await lab.redis.hset(lab.key("job:a"), "c", sealed)  # a node that has the key sees this
    lab.clock.now += claims_module._WITHOUT_KEY_S
    await a.tick()
    assert (await claims(a)).call == CALL


async def test_a_request_that_nobody_can_read_is_its_claimers_to_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "_CLAIMS_WITHOUT_KEY", 1)
    a = await lab.node()
    await lab.submit(a, "a", "b")
    await lab.redis.hset(lab.key("job:a"), "c", "damaged")
    with pytest.raises(UnreadableCall) as caught:
        await claims(a)
    assert (await claims(a)).job.id == "b"
    assert await lab.finish(a, Claim(caught.value.job, CALL))


async def test_an_upstream_is_nobodys_after_some_leases_only(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await finds_nothing(a)
    await lab.submit(a, "a")
    assert await b.claim_orphans({"another"}) == []
    lab.clock.now += 3 * LEASE_S
    await a.renew()
    lab.clock.now += 3 * LEASE_S
    assert await b.claim_orphans({"another"}) == []
    lab.clock.now += 3 * LEASE_S
    assert [orphan.id for orphan in await b.claim_orphans({"another"})] == ["a"]


async def test_an_upstream_that_the_last_node_gave_up_is_nobodys_after_a_lease(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await finds_nothing(a)
    await finds_nothing(b)
    await lab.submit(a, "a")
    waiting = await a.get("a")
    assert isinstance(waiting, Job)
    assert await a.claim_orphans({"another"}) == []
    lab.clock.now += LEASE_S - 1
    await b.renew()
    lab.clock.now += LEASE_S - 1
    assert await a.claim_orphans({"another"}) == [], "the other node serves it"
    assert await b.claim_orphans({"another"}) == []
    lab.clock.now += LEASE_S - 1
    assert await a.claim_orphans({"another"}) == []
    lab.clock.now += 1
    assert [orphan.id for orphan in await a.claim_orphans({"another"})] == ["a"]


async def test_it_is_known_when_the_jobs_of_an_upstream_that_nobody_serves_go_elsewhere(
    lab: Lab,
) -> None:
    a, b = await lab.node(), await lab.node()
    await finds_nothing(a)
    await lab.submit(a, "a")
    await a.release((await claims(a)).job, attempts=1, delay_s=10_000)
    waiting = await b.get("a")
    assert isinstance(waiting, Job)
    await b.claim_orphans({"another"})
    assert (position := b.position(waiting)) is None or not position.not_before, (
        "the other node serves it"
    )
    lab.clock.now += LEASE_S
    await b.claim_orphans({"another"})
    assert (position := b.position(waiting)) is not None
    assert position.not_before == lab.clock.now + 3 * LEASE_S
    await a.claim_orphans({"another"})
    assert (position := a.position(waiting)) is not None
    assert position.not_before == lab.clock.now + LEASE_S, "no later, though its backoff is longer"
    lab.clock.now += LEASE_S
    assert [orphan.id for orphan in await b.claim_orphans({"another"})] == ["a"]


async def test_orphans_that_are_held_back_are_found_too(lab: Lab) -> None:
    a = await lab.node()
    await lab.submit(a, "a", "b")
    await a.release((await claims(a)).job, attempts=1, delay_s=10_000)
    await a.pause(job("b", clock=lab.clock).lane, 10_000)
    lab.clock.now += 1000
    assert {orphan.id for orphan in await a.claim_orphans({"another"})} == {"a", "b"}
    assert await a.claim_orphans({"another"}) == []


async def test_a_server_that_forgot_the_scripts_is_told_again(lab: Lab) -> None:
    a = await lab.node()
    await lab.redis.script_flush()
    await lab.submit(a, "a")
    assert (await claims(a)).job.id == "a"


async def test_cut_connections_fail_what_is_under_way_and_come_back(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a, b = await lab.node(), await lab.node()
    claiming = asyncio.ensure_future(claims(a))
    await a.usage()
    answers = [asyncio.ensure_future(a.usage()) for _ in range(100)]
    await asyncio.sleep(0)
    a._node.link._lines.small._connection._writer.transport.abort()  # type: ignore[union-attr]
    results = await asyncio.gather(*answers, return_exceptions=True)
    assert any(isinstance(result, StoreUnavailable) for result in results)
    assert all(isinstance(result, tuple | StoreUnavailable) for result in results)
    await back(a)
    await lab.submit(b, "a")
    assert (await claiming).job.id == "a"
    said = [record.levelname for record in caplog.records if record.name == connection.__name__]
    assert said == ["WARNING", "INFO"]


async def test_a_waiter_hears_what_was_said_while_its_node_was_cut_off(lab: Lab) -> None:
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a")
    waiting = asyncio.ensure_future(a.wait("a", 60))
    await a.usage()
    claim = await claims(b)
    a._node.link._lines._ear._writer.transport.abort()  # type: ignore[union-attr]
    assert await lab.finish(b, claim)
    async with asyncio.timeout(60):
        assert isinstance(await waiting, Outcome)


async def test_a_silent_redis_is_out_of_reach(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_TIMEOUT_S", 0.05)
    server = RedisServer()
    try:
        async for own in lab_on(server):
            a = await own.node()
            server.freeze()
            with pytest.raises(StoreUnavailable) as caught:
                await a.usage()
            assert "no reply" in caught.value.detail
            assert dict(caught.value.headers)["Retry-After"]
            server.thaw()
            await back(a)
    finally:
        server.close()


async def test_redis_dies_and_comes_back_with_all_that_was_accepted(own_lab: Lab) -> None:
    lab = own_lab
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "waits", "runs")
    done = await claims(a)
    assert await lab.finish(a, done)
    running = await claims(a)
    waiting = asyncio.ensure_future(b.wait("runs", 60))
    await b.usage()
    lab.server.kill()
    with pytest.raises(StoreUnavailable):
        await a.usage()
    with pytest.raises(StoreUnavailable):
        await a.create(job("refused", clock=lab.clock), CALL)
    with pytest.raises(StoreUnavailable):
        await lab.finish(a, running)
    claiming = asyncio.ensure_future(claims(b))  # it does not raise, it waits
    lab.server.start()
    await back(a)
    await back(b)
    assert isinstance(await b.get(done.job.id), Outcome)
    assert await b.get("refused") is None
    assert await lab.finish(a, running)
    async with asyncio.timeout(60):
        assert isinstance(await waiting, Outcome)
    await lab.submit(a, "later")
    assert (await claiming).job.id == "later"


async def test_a_node_takes_nothing_over_right_after_redis_came_back(own_lab: Lab) -> None:
    """All leases lapsed with it: the others get the time to say that they live."""
    lab = own_lab
    a, b = await lab.node(), await lab.node()
    await lab.submit(a, "a")
    claim = await claims(a)
    lab.server.kill()
    lab.clock.now += 2 * LEASE_S
    a._leases.forget(claim.job)  # it has no chance to renew before the other one looks
    lab.server.start()
    await back(a)
    await back(b)
    await b.tick()
    await finds_nothing(b)
    assert await lab.finish(a, claim)


async def test_out_of_memory_is_full_and_what_is_there_goes_on(own_lab: Lab) -> None:
    lab = own_lab
    a = await lab.node()
    await lab.submit(a, "a", "b")
    await lab.redis.config_set("maxmemory", 1)
    with pytest.raises(StoreFull):
        await lab.submit(a, "refused")
    claim = await claims(a)
    assert await lab.finish(a, claim)
    assert isinstance(await a.get("a"), Outcome)
    await a.release((await claims(a)).job, attempts=1)
    assert await a.delete("a")
    await lab.redis.config_set("maxmemory", 0)
    await lab.submit(a, "accepted")
    assert (await a.usage()).live == 2


async def test_neither_credential_nor_text_is_on_the_disk_of_redis(own_lab: Lab) -> None:
    lab = own_lab
    a = await lab.node(seal_outcomes=True)
    head = "Authorization\nBearer sk-credential"
    secret = Call("embeddings", "/v1/embeddings", head, b"the input text")
    for name in "ab":
        await a.create(job(name, clock=lab.clock), secret)
    claim = await claims(a)
    await a.finish(claim.job, completed(claim.job, lab.clock, b'"the output text"'))
    await lab.redis.save()
    written = b"".join(path.read_bytes() for path in lab.server.folder.rglob("*") if path.is_file())
    assert lab.prefix.encode() in written
    for text in (b"sk-credential", b"input text", b"output text"):
        assert text not in written


async def test_another_key_is_refused(lab: Lab) -> None:
    await lab.node(keys=[b"a" * 32])
    with pytest.raises(StartupError, match=r"store\.encryption_key"):
        await lab.node(keys=[b"b" * 32])


async def test_keys_can_be_rotated(lab: Lab) -> None:
    old, new = b"o" * 32, b"n" * 32
    first = await lab.node(keys=[old])
    await lab.submit(first, "a")
    second = await lab.node(keys=[new, old])
    claim = await claims(second)
    assert claim.call == CALL
    assert await lab.finish(second, claim)
    third = await lab.node(keys=[new])
    assert isinstance(await third.get("a"), Outcome)


@pytest.mark.parametrize("schema", [str(SCHEMA + 1), "x"])
async def test_a_newer_schema_is_refused_and_left_alone(lab: Lab, schema: str) -> None:
    await lab.redis.hset(lab.key("meta"), "schema", schema)
    with pytest.raises(StartupError, match="schema"):
        await lab.node()
    assert await lab.redis.hget(lab.key("meta"), "schema") == schema.encode()


async def test_no_redis_is_one_clear_line_without_the_password(lab: Lab) -> None:
    url = f"redis://user:hidden@127.0.0.1:{redis_server.free_port()}/0"
    store = RedisStore(
        url, LIMITS, keys=[b"k" * 32], seal_outcomes=False, prefix=lab.prefix, lease_s=LEASE_S
    )
    with pytest.raises(StartupError) as caught:
        async with store.opened(lab.lost.append):
            raise AssertionError("it cannot be opened")
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_redis_that_loses_jobs_by_its_configuration_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = RedisServer(maxmemory="1gb", **{"maxmemory-policy": "allkeys-lru"})
    try:
        async for lab in lab_on(server):
            await lab.node()
    finally:
        server.close()
    assert "allkeys-lru" in caplog.text
    assert "appendonly" in caplog.text


async def test_a_node_that_stops_gives_back_what_it_was_about_to_get(lab: Lab) -> None:
    b = await lab.node()
    async with AsyncExitStack() as stack:
        a = RedisStore(
            lab.server.url, LIMITS, keys=[b"k" * 32], seal_outcomes=False, prefix=lab.prefix, lease_s=15
        )
        await stack.enter_async_context(a.opened(lab.lost.append))
        await lab.submit(b, *"abc")
        asking = [asyncio.ensure_future(a.claim(UPSTREAM)) for _ in range(3)]
        while a._claims._claimers == {} or a._claims._claimers[UPSTREAM]._quiet.is_set():
            await asyncio.sleep(0)
        for one in asking:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    assert {(await claims(b)).job.id for _ in range(3)} == set("abc")


def store_at(url: str, prefix: str, **options: Any) -> RedisStore:
    known = {"keys": [b"k" * 32], "seal_outcomes": False, "lease_s": LEASE_S}
    return RedisStore(url, LIMITS, prefix=prefix, **{**known, **options})


async def goes_its_way(store: RedisStore, name: str = "a") -> None:
    await store.create(job(name, clock=Clock()), CALL)
    claim = await claims(store)
    outcome = msgspec.structs.replace(completed(claim.job, Clock()), expires_at=2**40)
    assert await store.finish(claim.job, outcome)
    assert await store.get(name) == outcome


async def test_a_password_is_used_and_said_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(requirepass="hidden")
    try:
        async with store_at(f"redis://:hidden@127.0.0.1:{server.port}/0", "p").opened(print):
            pass
        with pytest.raises(StartupError) as caught:
            async with store_at(f"redis://:wrong-one@127.0.0.1:{server.port}/0", "p").opened(print):
                raise AssertionError("it cannot be opened")
    finally:
        server.close()
    assert "hidden" not in caplog.text
    assert "wrong-one" not in str(caught.value)


async def test_tls_is_verified(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    for name, ca in (("ca.pem", authority), ("other.pem", other)):
        ca.cert_pem.write_to_path(tmp_path / name)
    port = redis_server.free_port()
    server = RedisServer(
        **{
            "tls-port": str(port),
            "tls-cert-file": str(tmp_path / "server.pem"),
            "tls-key-file": str(tmp_path / "server.pem"),
            "tls-auth-clients": "no",
        }
    )
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}"
    try:
        async with (store := store_at(f"{url}/ca.pem", "p")).opened(print):
            await goes_its_way(store)
        with pytest.raises(StartupError, match="certificate"):
            async with store_at(f"{url}/other.pem", "p").opened(print):
                raise AssertionError("it cannot be opened")
    finally:
        server.close()


async def test_a_cluster_holds_a_deployment_on_one_of_its_servers() -> None:
    buses = [str(redis_server.free_port()) for _ in range(2)]
    servers = [RedisServer(**{"cluster-enabled": "yes", "cluster-port": bus}) for bus in buses]
    admins = [Redis(port=server.port) for server in servers]
    try:
        for admin, slots in zip(admins, ("0 8191", "8192 16383"), strict=True):
            await command(admin, f"CLUSTER ADDSLOTSRANGE {slots}")
        await command(admins[0], f"CLUSTER MEET 127.0.0.1 {servers[1].port} {buses[1]}")

        async def joined() -> bool:
            infos = [await command(admin, "CLUSTER INFO") for admin in admins]
            return all(b"cluster_state:ok" in info for info in infos)

        await until(joined)
        for server in servers:  # one of them does not have the slot
            async with (store := store_at(server.url, "p")).opened(print):
                await goes_its_way(store, server.url)
        assert sorted([await admin.dbsize() > 0 for admin in admins]) == [False, True]
    finally:
        for admin in admins:
            await admin.aclose()
        for server in servers:
            server.close()


async def test_a_user_without_role_or_config_can_start(caplog: pytest.LogCaptureFixture) -> None:
    """Such a user cannot be told from one on a server that does not know the commands."""
    async with (store := store_at(redis_server.restricted(), secrets.token_hex(8))).opened(print):
        await store.check()
        await store.create(job("a", clock=Clock()), CALL)
        assert (await claims(store)).job.id == "a"
    admin: Redis = Redis(port=redis_server.shared().port)
    refused = await command(admin, "ACL LOG")
    await admin.aclose()
    # CONFIG and ROLE are asked for and not needed. CLIENT is what the library introduces itself with.
    assert {entry[b"object"].decode().partition("|")[0] for entry in map(as_dict, refused)} <= {
        "client",
        "config",
        "role",
    }


def as_dict(entry: Any) -> dict[bytes, bytes]:
    """A reply of RESP2 that is a mapping."""
    return entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))


async def test_a_failover_goes_on_with_the_replica(tmp_path: Path) -> None:
    master = RedisServer(**{"repl-diskless-sync-delay": "0"})
    replica = RedisServer(replicaof=f"127.0.0.1 {master.port}")
    port = redis_server.free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nsentinel monitor jobs 127.0.0.1 {master.port} 1\n")
    sentinel = await asyncio.create_subprocess_exec(
        master.program, str(config), "--sentinel", stdout=asyncio.subprocess.DEVNULL
    )
    first, second = Redis(port=master.port), Redis(port=replica.port)
    asked: Redis = Redis(port=port)
    try:

        async def ready() -> bool:
            try:
                return bool(await command(asked, "SENTINEL MASTER jobs"))
            except RedisError:
                return False

        async def replicated() -> bool:
            return bool((await second.info("replication"))["master_link_status"] == "up")

        await until(ready)
        await until(replicated)
        store = store_at(f"redis+sentinel://127.0.0.1:{port}/jobs/0", "p")
        async with store.opened(print):
            await store.create(job("before", clock=Clock()), CALL)
            await first.wait(1, 10_000)
            # The steps of a Sentinel's failover, which takes its time over them.
            await command(asked, "SENTINEL REMOVE jobs")
            await command(second, "REPLICAOF NO ONE")
            await command(first, f"REPLICAOF 127.0.0.1 {replica.port}")
            await command(asked, f"SENTINEL MONITOR jobs 127.0.0.1 {replica.port} 1")
            await until(lambda: accepts(store, "after"))
            assert {(await claims(store)).job.id for _ in range(2)} == {"before", "after"}
            assert await second.exists("{p}:job:after")
    finally:
        for client in (first, second, asked):
            await client.aclose()
        sentinel.kill()
        await sentinel.wait()
        master.close()
        replica.close()


async def accepts(store: RedisStore, name: str) -> bool:
    try:
        await store.create(job(name, clock=Clock()), CALL)
    except StoreUnavailable:
        return False
    return True


async def command(redis: Redis, text: str) -> Any:
    return await redis.execute_command(*text.split())  # type: ignore[no-untyped-call]
