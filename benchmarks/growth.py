"""What operations take with ever more jobs in the store: ``python -m benchmarks.growth``.

One process without sockets: requests go into aiohttp's server as bytes, and are timed until the bytes
of their answer come out. Times are the thread's processor time. So what is seen is our own work, and
the collector's, but neither the network's spread nor who else uses the core. Half of the jobs that are
stored wait, half have a result, and the polls go to both, all over.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median, quantiles
from typing import Any, Final

import msgspec

from asyncproxy.app import compose
from asyncproxy.cli.main import loop_factory
from asyncproxy.config.load import load_config
from asyncproxy.core.ids import RandomIds
from asyncproxy.core.jobs import Call, Job, Outcome, UpstreamResponse, head_of
from asyncproxy.stores.base import Store
from asyncproxy.web.connection import Connection, EdgeServer
from asyncproxy.wire import credentials, envelope
from benchmarks.errors import Broken
from benchmarks.servers import UNLIMITED, parked

__all__ = ["OPERATIONS", "SIZES"]

SIZES: Final = (1_000, 100_000, 1_000_000)
OPERATIONS: Final = ("submit", "poll", "expiry")

_TURNS: Final = 20
_TIMES: Final = 250  # in each turn
_BATCHES: Final = 10
_ATTEMPTS: Final = 1_000
_BATCH: Final = 20
_LIVES_S: Final = 0.005

_PATH: Final = "/v1/async/embeddings"
_HEAD: Final = "Host: localhost\r\nAuthorization: Bearer benchmark\r\n"
_BODY: Final = json.dumps({"model": "m", "input": "The quick brown fox. " * 12}).encode()
_SUBMIT: Final = (
    f"POST {_PATH} HTTP/1.1\r\n{_HEAD}Content-Type: application/json\r\n"
    f"Content-Length: {len(_BODY)}\r\n\r\n"
).encode() + _BODY


class _Wire(asyncio.Transport):
    """The client's end of a connection that is no socket: notes when an answer comes."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self._answer: asyncio.Future[tuple[float, bytes]] | None = None

    def expect(self) -> asyncio.Future[tuple[float, bytes]]:
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._answer is None or self._answer.done():
            raise Broken("an answer in more than one piece, or to nothing")
        self._answer.set_result((time.thread_time(), bytes(data)))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """There is nothing to close."""

    def pause_reading(self) -> None:
        """There is nothing to read from."""

    def resume_reading(self) -> None:
        """There is nothing to read from."""


class _Client:
    """Sends requests over one connection to a server in this process, one after the other."""

    def __init__(self, connection: Connection) -> None:
        self._wire = _Wire()
        self._protocol = connection
        self._protocol.connection_made(self._wire)

    async def ask(self, request: bytes, status: bytes) -> tuple[float, bytes]:
        """Seconds until the answer, which must have ``status``, and the answer."""
        answer = self._wire.expect()
        started = time.thread_time()
        self._protocol.data_received(request)
        ended, data = await answer
        if not data.startswith(b"HTTP/1.1 " + status):
            raise Broken(f"not a {status.decode()}: {data[:200]!r}")
        return ended - started, data


class _Filled:
    """The store of an application, filled to a size by what a store offers to all."""

    def __init__(self, store: Store, upstream: str) -> None:
        self._store = store
        self._upstream = upstream
        self._owner = credentials.digest("benchmark", store.credential_keys[0])
        self._new_id = RandomIds()
        self.ids: list[str] = []

    def job(self) -> Job:
        return Job(
            id=self._new_id(),
            endpoint="embeddings",
            credential=self._owner,
            upstream=self._upstream,
            model="m",
            created_at=round(time.time(), 3),
            ttl_s=3600,
        )

    async def fill(self, size: int) -> None:
        """Store jobs until there are ``size``."""
        while len(self.ids) < size:
            await self.finish(self.job(), lives_s=3600)
            job = self.job()
            await self._store.create(job, self._call())
            self.ids.append(job.id)

    async def finish(self, job: Job, *, lives_s: float) -> None:
        """Store a result that lives so long. It is the newest job, and no other one may be claimed."""
        other = msgspec.structs.replace(job, upstream=_ASIDE)
        await self._store.create(other, self._call())
        claim = await self._store.claim(_ASIDE)
        answer = UpstreamResponse(
            200, ((b"Content-Type", b"application/json"),), (b'{"data":[0.123456789]}',)
        )
        outcome = envelope.finished(claim.job, answer, now=round(time.time(), 3))
        outcome = msgspec.structs.replace(outcome, expires_at=time.time() + lives_s)
        if not await self._store.finish(claim.job, outcome):
            raise Broken("a result was not taken")
        if lives_s > _LIVES_S:
            self.ids.append(job.id)

    def _call(self) -> Call:
        head = head_of((f"X-Header-{n}", f"{n:036}") for n in range(7))
        return Call("embeddings", "/v1/embeddings", head, bytes(bytearray(_BODY)))


# No worker claims the jobs of an upstream that is not configured, so the results can be made here.
_ASIDE: Final = "aside"


async def _submits(client: _Client, filled: _Filled, store: Store) -> list[float]:
    """Each job is deleted again, so that the store keeps its size."""
    seconds = []
    for _ in range(_TIMES):
        took_s, answer = await client.ask(_SUBMIT, b"202")
        seconds.append(took_s)
        if not await store.delete(json.loads(answer.partition(b"\r\n\r\n")[2])["id"]):
            raise Broken("a job that was answered 202 is not there")
    return seconds


async def _polls(client: _Client, filled: _Filled, store: Store) -> list[float]:
    seconds = []
    for job_id in random.choices(filled.ids, k=_TIMES):
        job = await store.get(job_id)
        request = f"GET {_PATH}/{job_id} HTTP/1.1\r\n{_HEAD}\r\n".encode()
        took_s, _ = await client.ask(request, b"200" if isinstance(job, Outcome) else b"202")
        seconds.append(took_s)
    return seconds


async def _expiries(client: _Client, filled: _Filled, store: Store) -> list[float]:
    """Per result, in batches that expire together.

    A batch that took longer to store than it lives, or that housekeeping met first, does not count.
    """
    seconds: list[float] = []
    for _ in range(_ATTEMPTS):
        if len(seconds) == _BATCHES:
            return seconds
        for _ in range(_BATCH):
            await filled.finish(filled.job(), lives_s=_LIVES_S)
        before = (await store.usage()).results
        await asyncio.sleep(1.5 * _LIVES_S)
        started = time.thread_time()
        await store.tick()
        took_s = time.thread_time() - started
        if before - (await store.usage()).results == _BATCH:
            seconds.append(took_s / _BATCH)
    raise Broken("results do not expire when they should")


_MEASURES: Final[dict[str, Callable[[_Client, _Filled, Store], Awaitable[list[float]]]]] = {
    "submit": _submits,
    "poll": _polls,
    "expiry": _expiries,
}


async def _measure(upstream_url: str) -> dict[str, dict[str, tuple[float, float]]]:
    """By size and operation: the median and the 99th percentile, in microseconds.

    All sizes are there at once and take turns, so that what else the machine does meets them alike.
    """
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        sized = {size: await stack.enter_async_context(_of_size(size, upstream_url)) for size in SIZES}
        for turn in range(1 + _TURNS):
            for operation, measure in _MEASURES.items():
                for size, parts in sized.items():
                    found = await measure(*parts)
                    if turn:  # the first one is for caches, and the interpreter's specialised code
                        seconds[size, operation] += found
    return {
        str(size): {
            operation: (
                1e6 * median(seconds[size, operation]),
                1e6 * quantiles(seconds[size, operation], n=100)[98],
            )
            for operation in OPERATIONS
        }
        for size in SIZES
    }


@asynccontextmanager
async def _of_size(size: int, upstream_url: str) -> AsyncIterator[tuple[_Client, _Filled, Store]]:
    """A proxy with so many jobs."""
    config = load_config(
        {
            "upstreams": [{"name": "parked", "base_url": upstream_url, "concurrency": 1}],
            "jobs": {"max_pending": UNLIMITED, "max_pending_per_credential": UNLIMITED},
            "store": {"max_bytes": UNLIMITED},
            "shutdown_grace": "10ms",
        },
        environ={},
    )
    proxy = compose(config)
    async with proxy.running():
        server = EdgeServer(proxy.table.dispatch, client_timeout_s=60.0, max_connections=1)
        client, store = _Client(server()), proxy.store
        filled = _Filled(store, "parked")
        await client.ask(_SUBMIT, b"202")  # keeps the only worker busy
        await filled.fill(size)
        yield client, filled, store
        await server.shutdown(0.1)


def main() -> int:
    """Print the URL of the upstream that is parked, then what was measured, as JSON."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)  # as the command line does
    with parked() as upstream_url:
        print(upstream_url, flush=True)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            found = runner.run(_measure(upstream_url))
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
