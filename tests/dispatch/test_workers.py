"""The workers of an upstream: which of them a drain leaves alone."""

from __future__ import annotations

import asyncio
import random
from typing import cast

from asyncproxy.core.events import Observer
from asyncproxy.core.jobs import Call, Job, JobStatus
from asyncproxy.dispatch.dispatcher import Dispatcher
from asyncproxy.dispatch.verdict import CallPolicy
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.stores.base import Limits
from asyncproxy.stores.memory import MemoryStore
from asyncproxy.upstream.client import Upstream
from tests.dispatch.test_dispatcher import OK, FakeUpstream, Now, route


async def test_a_worker_without_a_job_takes_none_during_the_grace_of_the_others() -> None:
    """Another node, or a retry that is due, may put a job there: it is for who does not stop."""
    now, upstream = Now(), FakeUpstream()
    store = MemoryStore(Limits(100, 100, 10**6), clock=now, monotonic=now)
    dispatcher = Dispatcher(
        store,
        [(cast("Upstream", upstream), CallPolicy(concurrency=2))],
        deadline_s=100,
        observer=Observer(),
        route=route,
        heavy_work=HeavyWork(),
        clock=now,
        monotonic=now,
        rng=random.Random(1),
    )

    async def submit(name: str) -> None:
        job = Job(name, "embeddings", b"a", "gateway", "m", now(), 60)
        await store.create(job, Call("embeddings", "/v1/embeddings", "", b"{}"))

    async with dispatcher.running(grace_s=0):
        await submit("under way")
        await upstream.called.wait()
        draining = asyncio.ensure_future(dispatcher.drain(3600))
        await asyncio.sleep(0)
        assert dispatcher.draining
        await submit("late")
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(upstream.calls) == 1
        upstream.answers.put_nowait(OK)
        await draining
        late = await store.get("late")
        assert isinstance(late, Job)
        assert late.status is JobStatus.PENDING
