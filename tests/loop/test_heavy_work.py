"""Heavy work takes turns on the event loop."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.wire.steps import Steps


async def rounds() -> None:
    """As many rounds of the loop as pass while a request is read, run and answered."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_free_turn_is_taken_at_once() -> None:
    heavy_work = HeavyWork()
    step = heavy_work.next()
    try:
        step.send(None)
    except StopIteration:
        return
    raise AssertionError("it had to wait")


async def test_turns_are_given_in_order_with_rounds_of_the_loop_between() -> None:
    heavy_work = HeavyWork()
    ended: list[str] = []

    async def heavy(name: str) -> None:
        await heavy_work.next()
        ended.append(name)

    async def light() -> None:
        await rounds()
        ended.append("light")

    async with asyncio.TaskGroup() as tasks:
        for name in "abc":
            tasks.create_task(heavy(name))
        tasks.create_task(light())
    assert (
        ended.index("light") <= ended.index("b") + 1
    )  # beside three pieces it has waited for one or two
    assert [name for name in ended if name != "light"] == ["a", "b", "c"]


async def test_rounds_that_are_long_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or whoever keeps the loop busy with small things would stop the large ones."""
    now = 100.0
    monkeypatch.setattr("asyncproxy.loop.heavy_work.monotonic", lambda: now)

    async def rounds_between(round_s: float) -> int:
        nonlocal now
        heavy_work = HeavyWork()
        await heavy_work.next()
        second = asyncio.create_task(heavy_work.next())
        for number in range(20):
            if second.done():
                return number
            await asyncio.sleep(0)
            now += round_s
        raise AssertionError("it never came")

    assert await rounds_between(0.0005) >= 3
    assert await rounds_between(0.003) < await rounds_between(0)


async def test_steps_give_way_to_others_and_return_their_result() -> None:
    heavy_work = HeavyWork()
    seen: list[str] = []

    def steps() -> Steps[str]:
        for number in range(3):
            seen.append(f"step {number}")
            yield
        return "done"

    async def light() -> None:
        for _ in range(30):
            await asyncio.sleep(0)
            seen.append("light")

    async with asyncio.TaskGroup() as tasks:
        heavy = tasks.create_task(heavy_work.run(steps()))
        tasks.create_task(light())
    assert heavy.result() == "done"
    places = [seen.index(f"step {number}") for number in range(3)]
    assert all("light" in seen[a:b] for a, b in itertools.pairwise(places[1:]))


async def test_what_takes_one_step_needs_no_turn() -> None:
    """Small requests do not stand in line behind large ones."""
    heavy_work = HeavyWork()
    await heavy_work.next()

    def steps() -> Steps[int]:
        yield from ()
        return 1

    step = heavy_work.run(steps())
    with pytest.raises(StopIteration) as end:
        step.send(None)
    assert end.value.value == 1


async def test_an_error_of_a_step_is_raised() -> None:
    def steps() -> Steps[int]:
        yield
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await HeavyWork().run(steps())


async def test_who_leaves_the_line_holds_nobody_up() -> None:
    heavy_work = HeavyWork()
    await heavy_work.next()
    waiting = [asyncio.create_task(heavy_work.next()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[2].cancel()
    async with asyncio.timeout(60):
        await waiting[1]
        await heavy_work.next()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, False, True]
