"""What outages and rate limits cost, minutes of them in virtual time: the dispatcher with its real policy."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import cast

import pytest

from asyncproxy.core.errors import UpstreamUnreachable
from asyncproxy.core.events import Observer, UpstreamAway, UpstreamBack
from asyncproxy.core.jobs import Call, Job, JobStatus, Outcome, UpstreamResponse
from asyncproxy.dispatch.dispatcher import Dispatcher
from asyncproxy.dispatch.verdict import CallPolicy
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.stores.base import Limits
from asyncproxy.stores.memory import MemoryStore
from asyncproxy.upstream.client import Upstream
from tests import virtual_time
from tests.chaos.mortal_gateway import Budget

JSON = ((b"Content-Type", b"application/json"),)
OK = UpstreamResponse(200, JSON, (b"{}",))
MINUTE = 60.0

Outcomes = Callable[[str], Awaitable[UpstreamResponse]]


def now() -> float:
    return asyncio.get_running_loop().time()


def unreachable(*, delivered: bool = False) -> UpstreamUnreachable:
    error = UpstreamUnreachable("x")
    error.delivered = delivered
    return error


class Told(Observer):
    """What was told of an upstream."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, UpstreamAway | UpstreamBack]] = []

    def upstream_away(self, event: UpstreamAway) -> None:
        self.lines.append((now(), event))

    def upstream_back(self, event: UpstreamBack) -> None:
        self.lines.append((now(), event))


class World:
    """A gateway that does what ``outcomes`` says of a text, and proxies in front of it."""

    def __init__(
        self, outcomes: Outcomes, policy: CallPolicy | None = None, *, call_s: float = 0.5
    ) -> None:
        self.name = "gateway"
        self.total_s = 600.0
        self.calls: list[tuple[float, str]] = []  # when they began, and their texts
        self.statuses: list[int] = []  # 0: broken, or not connected
        self.in_flight = self.most = 0
        self.told = Told()
        self._outcomes = outcomes
        self._call_s = call_s
        self._count = 0
        limits = Limits(100_000, 100_000, 10**9)
        clock = asyncio.get_running_loop().time
        self.policy = policy or CallPolicy()
        self.store = MemoryStore(limits, clock=clock, monotonic=clock)
        self.dispatcher = Dispatcher(
            self.store,
            [(cast("Upstream", self), self.policy)],
            deadline_s=86400.0,
            observer=self.told,
            route=lambda _: "gateway",
            heavy_work=HeavyWork(),
            clock=clock,
            monotonic=clock,
            rng=random.Random(7),
        )

    async def call(self, call: Call, *, timeout_s: float) -> UpstreamResponse:
        text = call.body.decode()
        self.calls.append((now(), text))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        status = 0
        try:
            response = await self._outcomes(text)
            if response.status == 200:
                await asyncio.sleep(self._call_s)
            status = response.status
        finally:
            self.in_flight -= 1
            self.statuses.append(status)
        return response

    async def submit(
        self, count: int, text: str = "", *, model: str = "m", credential: bytes = b"c"
    ) -> list[str]:
        names = []
        for _ in range(count):
            self._count += 1
            name = f"job-{self._count}"
            job = Job(name, "embeddings", credential, "gateway", model, now(), 86400)
            await self.store.create(job, Call("embeddings", "/", "", (text or model).encode()))
            names.append(name)
        return names

    async def ended(self, names: list[str]) -> list[str]:
        """See to the ends of jobs. Those that failed."""
        failed = []
        for name in names:
            while not isinstance(found := await self.store.get(name), Outcome):
                await asyncio.sleep(0.05)
            if found.status is not JobStatus.COMPLETED:
                failed.append(name)
        return failed

    def calls_between(self, start: float, end: float) -> int:
        return sum(start <= at < end for at, _ in self.calls)


def in_world(
    outcomes: Outcomes,
    scenario: Callable[[World], Awaitable[None]],
    policy: CallPolicy | None = None,
    *,
    call_s: float = 0.5,
) -> None:
    async def main() -> None:
        world = World(outcomes, policy, call_s=call_s)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(world.dispatcher.running(grace_s=0))
            await scenario(world)
            assert world.most <= world.policy.concurrency
            if not (await world.store.usage()).live:
                await asyncio.sleep(2 * MINUTE)
                assert len(world.dispatcher.gates["gateway"]) == 0, "nothing is kept of lanes and jobs"

    virtual_time.run(main())


def _index_of_pass(statuses: list[int], number: int) -> int:
    passed = [index for index, status in enumerate(statuses) if status == 200]
    return passed[number]


class Switch:
    """A gateway that is there or not."""

    def __init__(self, how: str) -> None:
        self.away = False
        self._how = how

    async def __call__(self, text: str) -> UpstreamResponse:
        if not self.away:
            return OK
        if self._how == "refused":
            raise unreachable()
        if self._how == "504":
            await asyncio.sleep(60.0)  # the read timeout of a proxy in front
        return UpstreamResponse(int(self._how), (), ())


@pytest.mark.parametrize("how", ["refused", "502", "503", "504"])
def test_ten_minutes_without_a_gateway_cost_no_job(how: str) -> None:
    switch = Switch(how)

    async def scenario(world: World) -> None:
        began = now()
        assert await world.ended(await world.submit(200)) == []
        without_s = now() - began
        switch.away = True
        jobs = await world.submit(200)
        await asyncio.sleep(10 * MINUTE)
        switch.away = False
        back = now()
        assert await world.ended(jobs) == []
        noticed = next(at for at, event in world.told.lines if isinstance(event, UpstreamBack))
        # One wait between two calls that ask, and the read timeout of the one that asks.
        assert noticed - back < world.policy.max_backoff_s + (60 if how == "504" else 0) + 12
        assert now() - noticed < 2 * without_s

    in_world(switch, scenario, call_s=10.0)


@pytest.mark.parametrize("waiting", [1, 10_000])
@pytest.mark.parametrize("how", ["refused", "502"])
def test_an_upstream_that_is_away_gets_a_few_calls_a_minute_however_many_jobs_wait(
    how: str, waiting: int
) -> None:
    switch = Switch(how)
    switch.away = True

    async def scenario(world: World) -> None:
        began = now()
        await world.submit(waiting)
        await asyncio.sleep(5 * MINUTE)
        per_minute = [
            world.calls_between(began + i * MINUTE, began + (i + 1) * MINUTE) for i in range(5)
        ]
        assert per_minute[0] < 64 + 16, "those in flight when it went, and then one by one"
        assert all(1 <= calls <= 8 for calls in per_minute[1:])

    in_world(switch, scenario)


def test_an_outage_is_told_once_a_minute() -> None:
    switch = Switch("refused")

    async def scenario(world: World) -> None:
        switch.away = True
        jobs = await world.submit(100)
        await asyncio.sleep(5 * MINUTE + 30)
        switch.away = False
        assert await world.ended(jobs) == []
        await asyncio.sleep(2)
        kinds = [type(event).__name__ for _, event in world.told.lines]
        assert kinds == ["UpstreamAway"] * 6 + ["UpstreamBack"]
        assert world.told.lines[0][1].waiting == 100

    in_world(switch, scenario, call_s=0.01)


def test_one_model_that_is_away_does_not_slow_the_others() -> None:
    async def outcomes(text: str) -> UpstreamResponse:
        await asyncio.sleep(0.002)
        return UpstreamResponse(503, (), ()) if text == "bad" else OK

    async def scenario(world: World) -> None:
        began = now()
        assert await world.ended(await world.submit(1000, model="good")) == []
        alone_s = now() - began
        began = now()
        await world.submit(100, model="bad")
        assert await world.ended(await world.submit(1000, model="good")) == []
        assert now() - began < 2 * alone_s

    in_world(outcomes, scenario)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("says_when", [False, True])
@pytest.mark.parametrize("jobs", [20, 100])
def test_the_pace_of_a_rate_limit_is_found(*, window: bool, says_when: bool, jobs: int) -> None:
    async def outcomes(_: str) -> UpstreamResponse:
        await asyncio.sleep(0.01)
        wait_s = budget.wait_s(now())
        if not wait_s:
            return OK
        headers = ((b"Retry-After", f"{wait_s:.3f}".encode()),) if says_when else ()
        return UpstreamResponse(429, headers, ())

    async def scenario(world: World) -> None:
        # Another program has used up this minute's calls, but for five.
        for _ in range(25):
            budget.wait_s(now())
        assert await world.ended(await world.submit(jobs)) == []
        late = world.statuses[_index_of_pass(world.statuses, 10) :]
        assert late.count(429) * 4 <= len(late)

    budget = Budget(30, MINUTE, window=window, burst=5)
    in_world(outcomes, scenario, call_s=0.3)


@pytest.mark.parametrize("front", [False, True], ids=["direct", "behind a load balancer"])
def test_a_request_that_kills_its_gateway_takes_nobody_with_it(*, front: bool) -> None:
    dead_until = kills = 0.0
    died: asyncio.Event

    async def outcomes(text: str) -> UpstreamResponse:
        nonlocal dead_until, kills, died
        gone = UpstreamResponse(502, (), ())
        if now() < dead_until:
            if front:
                return gone
            raise unreachable()
        if text == "poison":
            kills += 1
            dead_until = now() + 2.0
            died.set()
            died = asyncio.Event()
        else:
            waiting = died
            try:
                async with asyncio.timeout(0.5):
                    await waiting.wait()
            except TimeoutError:
                return OK
        if front:
            return gone
        raise unreachable(delivered=True)

    async def scenario(world: World) -> None:
        nonlocal died
        died = asyncio.Event()
        good = await world.submit(50)
        poison = await world.submit(1, "poison")
        good += await world.submit(50)
        assert await world.ended(good) == []
        assert await world.ended(poison) == poison
        # Behind a load balancer the first one cannot be told from an outage that the others caused.
        assert kills <= 3 + front

    died = cast("asyncio.Event", None)
    in_world(outcomes, scenario, call_s=0.0)


def test_a_drain_during_an_outage_does_not_wait_for_it() -> None:
    switch = Switch("503")
    switch.away = True

    async def scenario(world: World) -> None:
        names = await world.submit(100)
        await asyncio.sleep(MINUTE)
        began = now()
        await world.dispatcher.drain(30.0)
        assert now() - began < 1
        for name in names:
            job = await world.store.get(name)
            assert job is not None
            assert job.status is JobStatus.PENDING

    in_world(switch, scenario)


def test_another_concurrency_during_an_outage_holds_after_it() -> None:
    switch = Switch("refused")
    switch.away = True

    async def scenario(world: World) -> None:
        names = await world.submit(200)
        await asyncio.sleep(MINUTE)
        policy = CallPolicy(concurrency=5)
        world.dispatcher.reconfigure([(cast("Upstream", world), policy)], deadline_s=86400.0)
        switch.away = False
        assert await world.ended(names) == []
        assert world.most == 5

    in_world(switch, scenario)


def test_credentials_share_an_upstream_while_the_lane_of_one_is_limited() -> None:
    """One has a limit of 30 a minute, and waits with 100 jobs."""
    budget = Budget(30, MINUTE, window=False, burst=1)

    async def outcomes(text: str) -> UpstreamResponse:
        await asyncio.sleep(0.01)
        return UpstreamResponse(429, (), ()) if text == "slow" and budget.wait_s(now()) else OK

    async def scenario(world: World) -> None:
        slow = await world.submit(100, "slow", credential=b"slow")
        began = now()
        assert await world.ended(await world.submit(640, credential=b"quick")) == []
        assert now() - began < 2 * (640 / 64 * 0.51)
        assert await world.ended(slow) == []
        assert now() - began < 2 * (100 / 30 * MINUTE)

    in_world(outcomes, scenario)
