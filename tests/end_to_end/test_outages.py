"""A gateway that is away, or that limits the rate, costs no job."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from tests import gateway as gateways
from tests.conftest import Client, Start
from tests.gateway import Gateway, Received, answer, embeddings

PATIENT = {"attempts": 3, "backoff": "5ms", "max_backoff": "50ms", "outage": "1m"}


async def upstream_of(proxy: Client) -> Any:
    return (await proxy.get("/-/ready")).json()["upstreams"]["gateway"]


async def until_away(proxy: Client) -> None:
    async with asyncio.timeout(60):
        while (await upstream_of(proxy))["status"] != "away":
            await asyncio.sleep(0.005)


async def test_a_gateway_that_restarts_costs_no_job(start: Start, unused_tcp_port: int) -> None:
    port = unused_tcp_port
    url = f"http://127.0.0.1:{port}/v1"
    proxy = await start(upstream={"base_url": url, "retry": PATIENT, "concurrency": 8})
    paths = [await proxy.submit() for _ in range(30)]
    await until_away(proxy)
    assert {(await proxy.get(path)).json()["status"] for path in paths} <= {"pending", "processing"}
    async with gateways.running(port=port) as gateway:
        for path in paths:
            assert (await proxy.outcome(path))["status"] == "completed"
        assert len(gateway.received) == 30
    assert (await upstream_of(proxy)) == {"status": "ok"}


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_load_balancer_without_a_gateway_costs_no_job(
    start: Start, gateway: Gateway, status: int
) -> None:
    gateway.behaviour = answer(b"<html>", status=status, content_type="text/html")
    proxy = await start(upstream={"retry": PATIENT, "concurrency": 8})
    paths = [await proxy.submit() for _ in range(30)]
    await until_away(proxy)
    gateway.behaviour = embeddings
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"


async def test_one_call_at_a_time_asks_however_many_wait(start: Start, gateway: Gateway) -> None:
    in_flight = most = 0
    jobs: list[str | None] = []

    async def away(request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        jobs.append(request.header("Idempotency-Key"))
        await answer(b"", status=503)(request, writer)
        in_flight -= 1

    gateway.behaviour = away
    # A job that has asked comes back half a second later than the next one asks.
    patient = {**PATIENT, "max_backoff": "500ms"}
    proxy = await start(upstream={"retry": patient, "concurrency": 64})
    await proxy.submit()
    await until_away(proxy)
    jobs.clear()
    most = 0
    paths = [await proxy.submit() for _ in range(100)]
    await gateway.until(lambda: len(jobs) >= 6)
    assert most == 1
    assert all(one != other for one, other in pairwise(jobs)), "a different job's each time"
    gateway.behaviour = embeddings
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"


async def test_a_request_that_breaks_its_gateway_ends_after_its_attempts(
    start: Start, gateway: Gateway
) -> None:
    kills = 0

    async def fragile(request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal kills
        if b"poison" in request.body:
            kills += 1
            writer.transport.abort()
            return
        await embeddings(request, writer)

    gateway.behaviour = fragile
    proxy = await start(upstream={"retry": PATIENT, "concurrency": 4})
    good = [await proxy.submit() for _ in range(20)]
    poison = await proxy.submit({"model": "m", "input": "poison"})
    good += [await proxy.submit() for _ in range(20)]
    done = await proxy.outcome(poison)
    assert (done["status"], done["error"]["error"]["code"]) == ("failed", "upstream_unreachable")
    assert kills == 3
    for path in good:
        assert (await proxy.outcome(path))["status"] == "completed"


async def test_a_rate_limit_costs_no_job(start: Start, gateway: Gateway) -> None:
    """Three calls at once, and 429 without a word about when: never an attempt."""
    in_flight = passed = late_refusals = 0

    async def three_at_once(request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal in_flight, passed, late_refusals
        if in_flight == 3:
            late_refusals += passed > 100
            await answer(b"", status=429)(request, writer)
            return
        in_flight += 1
        await asyncio.sleep(0.002)
        in_flight -= 1
        passed += 1
        await embeddings(request, writer)

    gateway.behaviour = three_at_once
    proxy = await start(upstream={"retry": PATIENT, "concurrency": 64})
    paths = await asyncio.gather(*(proxy.submit() for _ in range(200)))
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"
    assert late_refusals < 50, "the pace is found by then"


@pytest.mark.one_store
async def test_a_quota_that_is_used_up_fails_after_one_call(proxy: Client, gateway: Gateway) -> None:
    body = {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}
    gateway.behaviour = answer(body, status=429)
    done = await proxy.outcome(await proxy.submit())
    assert done["status_code"] == 429
    assert len(gateway.received) == 1


@pytest.mark.one_store
async def test_a_submit_that_is_refused_during_an_outage_is_told_to_wait_for_its_end(
    start: Start, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.behaviour = answer(b"", status=503)
    jobs = {"max_pending": 1}
    proxy = await start(upstream={"retry": PATIENT}, jobs=jobs)
    path = await proxy.submit()
    refused = await proxy.post("/v1/async/embeddings")
    assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
    await until_away(proxy)
    gate = proxy.parts.dispatcher.gates["gateway"]
    monkeypatch.setattr(gate.outage, "since", gate.outage.since - 50.0)
    refused = await proxy.post("/v1/async/embeddings")
    assert 50 <= int(refused.headers["Retry-After"]) < 120
    assert 50 <= int((await proxy.get(path)).headers["Retry-After"]) < 120
