"""Those who wait: woken once, forgotten at once, and let go when there is no more to wait for."""

from __future__ import annotations

import asyncio

import pytest

from asyncproxy.core.jobs import JobStatus, Outcome
from asyncproxy.stores.waiters import Waiters

OUTCOME = Outcome("a", "embeddings", b"", JobStatus.COMPLETED, 200, 1.0, b"{}", b"")


async def waiting(waiters: Waiters, job_id: str, count: int = 1) -> list[asyncio.Task[Outcome | None]]:
    futures = [asyncio.create_task(waiters.wait(job_id, 60)) for _ in range(count)]
    await asyncio.sleep(0)
    return futures


async def test_all_who_wait_for_a_job_get_its_outcome_and_no_others() -> None:
    waiters = Waiters()
    ours = await waiting(waiters, "a", 3)
    (theirs,) = await waiting(waiters, "b")
    waiters.wake("a", OUTCOME)
    assert [await future for future in ours] == [OUTCOME] * 3
    assert not theirs.done()
    assert len(waiters) == 1
    theirs.cancel()


async def test_a_deleted_job_has_none() -> None:
    waiters = Waiters()
    (future,) = await waiting(waiters, "a")
    waiters.wake("a", None)
    assert await future is None


async def test_the_time_is_up() -> None:
    waiters = Waiters()
    with pytest.raises(TimeoutError):
        await waiters.wait("a", 0)
    assert len(waiters) == 0


async def test_one_who_leaves_is_forgotten_and_the_others_stay() -> None:
    waiters = Waiters()
    leaving, staying = await waiting(waiters, "a", 2)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert len(waiters) == 1
    waiters.wake("a", OUTCOME)
    assert await staying == OUTCOME
    assert waiters._waiting == {}


async def test_one_who_comes_while_the_others_are_woken_waits_for_the_next() -> None:
    waiters = Waiters()
    (first,) = await waiting(waiters, "a")
    waiters.wake("a", OUTCOME)
    (second,) = await waiting(waiters, "a")
    assert await first == OUTCOME
    assert not second.done()
    waiters.wake("a", None)
    assert await second is None


async def test_a_release_lets_all_go_now_and_from_now_on() -> None:
    waiters = Waiters()
    futures = [*await waiting(waiters, "a", 2), *await waiting(waiters, "b")]
    waiters.release()
    for future in futures:
        with pytest.raises(TimeoutError):
            await future
    with pytest.raises(TimeoutError):
        await waiters.wait("a", 60)
    waiters.wake("a", OUTCOME)  # nobody is there any more, and nothing happens


async def test_a_wait_counts_from_the_moment_it_begins() -> None:
    """For who asks elsewhere first: what ends meanwhile is not missed."""
    waiters = Waiters()
    with waiters.waiting("a") as woken:
        assert "a" in waiters
        assert list(waiters) == ["a"]
        waiters.wake("a", OUTCOME)
        assert await woken is OUTCOME
    assert "a" not in waiters
    assert len(waiters) == 0


async def test_a_wait_that_was_let_go_and_is_not_awaited_complains_to_nobody() -> None:
    waiters = Waiters()
    with waiters.waiting("a"):
        waiters.release()
    with waiters.waiting("b") as woken, pytest.raises(TimeoutError):
        await woken
