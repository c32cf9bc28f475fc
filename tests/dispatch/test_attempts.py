"""The calls of jobs: which worker a stop reaches."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from asyncproxy.core.events import Observer
from asyncproxy.core.jobs import Call, Job
from asyncproxy.dispatch.attempts import Attempts
from asyncproxy.observe.tracing import Tracer
from asyncproxy.stores.base import Claim
from asyncproxy.upstream.client import Upstream
from tests.dispatch.test_dispatcher import OK, FakeUpstream, Now


async def test_the_end_of_a_call_whose_claim_was_lost_leaves_the_next_call_to_be_stopped() -> None:
    """A node may lose a claim, and take the job again while its first call is still in flight."""
    now, upstream = Now(), FakeUpstream()
    attempts = Attempts(observer=Observer(), tracer=Tracer(), clock=now, monotonic=now)
    job = Job("a", "embeddings", b"a", "gateway", "m", now(), 60)
    claim = Claim(job, Call("embeddings", "/v1/embeddings", "", b"{}"))

    async def work() -> None:
        worker = asyncio.current_task()
        assert worker is not None
        await attempts.make(claim, cast("Upstream", upstream), worker, deadline_s=100)

    async def call() -> asyncio.Task[None]:
        upstream.called.clear()
        worker = asyncio.create_task(work())
        await upstream.called.wait()
        return worker

    first, second = await call(), await call()
    upstream.answers.put_nowait(OK)  # for the one that has waited for longer
    await first
    assert attempts.stop(job.id)
    with pytest.raises(asyncio.CancelledError):
        await second
    assert attempts.was_stopped(job, second)
    assert not attempts.stop(job.id)
