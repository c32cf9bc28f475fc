"""The experiments: what is broken, and when."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.chaos.books import Books
from tests.chaos.clients import Client
from tests.chaos.lab import Proxy, gateway
from tests.redis_server import RedisServer

__all__ = ["run_redis", "run_sqlite"]

_KEY = "Y2hhb3MgY2hhb3MgY2hhb3MgY2hhb3MgY2hhb3MgISE="

# Of a node that is silent; short, so that a run of a minute sees many of them run out.
_LEASE_S = 1.0

_SETTLE_S = 120.0


async def run_sqlite(folder: Path, *, kills: int, clients: int) -> Books:
    """One proxy with a database, killed again and again, in front of a gateway that comes and goes."""
    books = Books()
    async with gateway(books, delay_s=0.05) as upstream:
        config = _config(folder, upstream.url, {"url": f"sqlite://{folder}/jobs.db"})
        async with _running([Proxy(config, folder / "proxy.log")]) as proxies:

            async def breaking() -> None:
                for _ in range(kills):
                    await asyncio.sleep(random.uniform(0.05, 0.8))
                    await proxies[0].kill()
                    books.events["proxies killed"] += 1
                    await proxies[0].start()
                    await upstream.misbehave()

            await _watch(books, proxies, clients, breaking)
    return books


async def run_redis(folder: Path, *, kills: int, clients: int) -> Books:
    """Three proxies on one Redis: they are killed and suspended, it is killed, the gateway goes."""
    books = Books()
    async with gateway(books, delay_s=0.05) as upstream, _redis() as redis:
        store = {"url": redis.url, "encryption_key": _KEY, "lease": f"{_LEASE_S:g}s"}
        config = _config(folder, upstream.url, store)
        logs = [folder / f"proxy{number}.log" for number in range(3)]
        async with _running([Proxy(config, log) for log in logs]) as proxies:

            async def breaking() -> None:
                for number in range(kills):
                    await asyncio.sleep(random.uniform(0.05, 0.8))
                    proxy = random.choice(proxies)
                    await proxy.kill()
                    books.events["proxies killed"] += 1
                    await proxy.start()
                    await upstream.misbehave()
                    if number % 5 == 4:
                        books.events["proxies suspended for two leases"] += 1
                        await random.choice(proxies).pause(2 * _LEASE_S)
                    if number % 10 == 9:
                        redis.kill()
                        books.events["Redis killed"] += 1
                        await asyncio.sleep(random.uniform(0, 1))
                        await asyncio.to_thread(redis.start)

            await _watch(books, proxies, clients, breaking)
    return books


@asynccontextmanager
async def _redis() -> AsyncIterator[RedisServer]:
    """A server whose file has what it has answered: a process that is killed loses nothing."""
    server = await asyncio.to_thread(RedisServer, appendonly="yes")
    try:
        yield server
    finally:
        server.close()


def _config(folder: Path, upstream: str, store: dict[str, str]) -> Path:
    path = folder / "config.yaml"
    path.write_text(
        json.dumps(  # which is YAML too
            {
                "upstreams": [
                    {
                        "base_url": f"{upstream}/v1",
                        "concurrency": 16,
                        # A call may break several times in such a minute, as the gateway is stopped.
                        "retry": {"attempts": 10, "backoff": "10ms", "max_backoff": "100ms"},
                    }
                ],
                "store": store,
                "shutdown_grace": "5s",
                "log": {"level": "warning"},
            }
        ),
        encoding="utf-8",
    )
    return path


@asynccontextmanager
async def _running(proxies: Sequence[Proxy]) -> AsyncIterator[Sequence[Proxy]]:
    for proxy in proxies:
        await proxy.start()
    try:
        yield proxies
    finally:
        for proxy in proxies:
            await proxy.kill()


async def _watch(
    books: Books, proxies: Sequence[Proxy], clients: int, breaking: Callable[[], Awaitable[None]]
) -> None:
    """Have clients at work while things break, and then see to the end of every job."""
    stop = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        urls = [proxy.url for proxy in proxies]
        working = [Client(books, urls, session) for _ in range(clients)]
        async with asyncio.TaskGroup() as group:
            for client in working:
                group.create_task(client.work(stop))
            await breaking()
            stop.set()
        try:
            async with asyncio.timeout(_SETTLE_S), asyncio.TaskGroup() as group:
                for client in working:
                    group.create_task(client.settle())
        except TimeoutError:
            return  # what has not ended is stuck: the books show it
