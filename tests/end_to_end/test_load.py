"""Many at once: jobs, connections, large bodies. Nothing lost, nothing kept, nobody shut out."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter

import aiohttp
import pytest

from asyncproxy.loop.heavy_work import HeavyWork
from tests.conftest import EMBED, JSON, Client, Start
from tests.gateway import Gateway, Received, answer, hang


async def test_thousands_of_jobs_by_two_hundred_connections(start: Start, gateway: Gateway) -> None:
    """All end, none is sent twice, and what they took is given back after their expiry."""
    seen: Counter[str] = Counter()

    async def count(request: Received, writer: asyncio.StreamWriter) -> None:
        seen[request.json()["input"]] += 1
        await answer({"data": "x" * 500})(request, writer)

    gateway.behaviour = count
    proxy = await start(jobs={"result_ttl": "1s"})
    store = proxy.parts.store

    async def submit_until_expired(amount: int) -> int:
        """Submit jobs, wait until all have ended and expired. The objects that there are then."""
        numbers = iter(range(amount))
        paths: list[str] = []

        async def connection(session: aiohttp.ClientSession) -> None:
            for number in numbers:
                body = json.dumps({"model": "m", "input": str(number)}).encode()
                url = proxy.url + "/v1/async/embeddings"
                async with session.post(url, data=body, headers=JSON) as response:
                    assert response.status == 202
                    paths.append(response.headers["Location"])

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=200)) as session:
            await asyncio.gather(*(connection(session) for _ in range(200)))
        async with asyncio.timeout(60):
            while (await store.usage()).live:
                await asyncio.sleep(0.01)
        assert len(set(paths)) == len(seen) == amount
        assert set(seen.values()) == {1}
        async with asyncio.timeout(60):
            while (await store.usage()).results:
                await asyncio.sleep(0.05)
        assert await store.usage() == (0, 0, 0)
        gateway.received.clear()
        seen.clear()
        gc.collect()
        return len(gc.get_objects())

    before = await submit_until_expired(500)
    after = await submit_until_expired(3_000)
    assert gateway.busiest <= 64
    assert after - before < 1_000
    assert (await proxy.outcome(await proxy.submit()))["status"] == "completed"


async def test_fifteen_hundred_silent_clients_do_not_stop_the_next(start: Start) -> None:
    from asyncproxy.cli.serve import _allow_many_connections

    _allow_many_connections()
    proxy = await start()
    port = int(proxy.url.rpartition(":")[2])
    silent = []
    try:
        for _ in range(15):
            opened = [asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
            silent += [writer for _, writer in await asyncio.gather(*opened)]
        assert len(silent) == 1_500
        assert (await proxy.outcome(await proxy.submit()))["status"] == "completed"
    finally:
        for writer in silent:
            writer.transport.abort()


async def test_what_is_being_read_is_bounded_over_all_clients(start: Start, gateway: Gateway) -> None:
    """A hundred clients with half a large body each: the store's bytes bound them too."""
    gateway.behaviour = hang
    proxy = await start(store={"max_bytes": "16MiB"}, jobs={"max_request_bytes": "1MiB"})
    port = int(proxy.url.rpartition(":")[2])
    head = b"POST /v1/async/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    statuses: Counter[bytes] = Counter()
    waiting = []

    async def half() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        waiting.append(writer)
        writer.write(head + b'{"model":"m","input":"' + b"x" * 900_000)
        line = await reader.readline()
        statuses[line] += 1

    clients = [asyncio.ensure_future(half()) for _ in range(40)]
    async with asyncio.timeout(60):
        while statuses[b"HTTP/1.1 503 Service Unavailable\r\n"] < 30:
            await asyncio.sleep(0.01)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    for writer in waiting:
        writer.transport.abort()
    async with asyncio.timeout(60):  # room again, as soon as they are gone
        while (
            await proxy.post("/v1/async/embeddings", {"model": "m", "input": "x" * 500_000})
        ).status != 202:
            await asyncio.sleep(0.01)


async def test_limits_of_jobs_are_answered_and_lifted(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(jobs={"max_pending": 3, "max_pending_per_credential": 2})
    alice, bob = {"x-api-key": "sk-alice"}, {"x-api-key": "sk-bob"}
    paths = [await proxy.submit(headers=alice) for _ in range(2)]
    refused = await proxy.post("/v1/async/embeddings", headers=alice)
    assert (refused.status, refused.code) == (429, "too_many_jobs")
    assert int(refused.headers["Retry-After"]) >= 1
    await proxy.submit(headers=bob)
    refused = await proxy.post("/v1/async/embeddings", headers=bob)
    assert (refused.status, refused.code) == (503, "overloaded")
    assert int(refused.headers["Retry-After"]) >= 1
    await proxy.request("DELETE", paths[0], headers=alice)
    await proxy.submit(headers=bob)
    assert (await proxy.get(paths[1], headers=alice)).status == 202


async def test_a_full_store_is_answered_and_lifted(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = answer(b'"' + b"x" * 40_000 + b'"')
    proxy = await start(store={"max_bytes": "64KiB"})
    first = await proxy.submit()
    done = await proxy.outcome(first)
    large = {"model": "m", "input": "x" * 30_000}
    refused = await proxy.post("/v1/async/embeddings", large)
    assert (refused.status, refused.code) == (503, "store_full")
    assert (await proxy.outcome(first)) == done  # and nothing was evicted for it
    too_large = await proxy.post("/v1/async/embeddings", {"model": "m", "input": "x" * 33_000})
    assert (too_large.status, too_large.code) == (413, "request_too_large")
    await proxy.request("DELETE", first)
    await proxy.submit(large)


async def test_each_keeps_its_own(proxy: Client) -> None:
    """Fifty clients at once: none reads another's result."""

    async def client(number: int) -> None:
        mine = {"Authorization": f"Bearer sk-of-{number}"}
        text = "x" * number
        for _ in range(5):
            path = await proxy.submit({"model": "m", "input": text}, headers=mine)
            done = await proxy.outcome(path, headers=mine)
            assert done["result"]["data"][0]["embedding"][0] == number / 7

    await asyncio.gather(*(client(number) for number in range(1, 51)))


@pytest.mark.parametrize(
    ("size", "least", "most"), [(1000, 0, 0), (200_000, 0, 0), (300_000, 2, 10), (3_000_000, 20, 100)]
)
async def test_large_requests_are_checked_one_at_a_time(
    start: Start, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, size: int, least: int, most: int
) -> None:
    proxy = await start()
    gateway.behaviour = hang
    taken = 0
    take = HeavyWork.next

    async def counting(self: HeavyWork) -> None:
        nonlocal taken
        taken += 1
        await take(self)

    monkeypatch.setattr(HeavyWork, "next", counting)
    await proxy.submit({**EMBED, "input": "x" * size})
    assert least <= taken <= most
