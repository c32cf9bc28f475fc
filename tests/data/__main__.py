"""Writes the data of the schema that is in the working tree: ``python -m tests.data``."""

from __future__ import annotations

import asyncio
import gzip
import tempfile
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis

from asyncproxy.stores.redis.schema import SCHEMA
from asyncproxy.stores.redis.store import RedisStore
from asyncproxy.stores.sqlite import migrations
from asyncproxy.stores.sqlite.store import SqliteStore
from tests.data import FOLDER, KEY, fill
from tests.redis_server import RedisServer
from tests.stores.test_contract import LIMITS, Clock

PREFIX = "data"


async def write_sqlite() -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.db"
        store = SqliteStore(path, LIMITS, clock=clock, monotonic=clock)
        async with store.opened(lambda _: None):
            await fill(store, clock)
        name = f"sqlite-{migrations.SCHEMA}"
        packed = gzip.compress(path.read_bytes(), mtime=0)
        (FOLDER / f"{name}.db.gz").write_bytes(packed)
        (FOLDER / f"{name}.key").write_bytes(path.with_name("jobs.db.key").read_bytes())


async def write_redis() -> None:
    clock = Clock()
    server = RedisServer()
    redis: Redis = Redis(port=server.port)
    try:
        store = RedisStore(
            server.url, LIMITS, keys=[KEY], seal_outcomes=False, prefix=PREFIX, lease_s=15,
            clock=clock, monotonic=clock,
        )  # fmt: skip
        async with store.opened(lambda _: None):
            await fill(store, clock)
        # Which nodes wait for work (idle:…) is of no use to those that come later.
        keys = cast("list[bytes]", sorted(await redis.keys("*")))
        keys = [key for key in keys if b":idle:" not in key]
        lines = [repr(await command_of(redis, key)) for key in keys]
    finally:
        await redis.aclose()
        server.close()
    (FOLDER / f"redis-{SCHEMA}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


async def command_of(redis: Redis, key: bytes) -> tuple[Any, ...]:
    """What puts a key back. It stands in the command without the prefix of its deployment."""
    name = key.removeprefix(f"{{{PREFIX}}}:".encode())
    match await redis.type(key):
        case b"hash":
            fields = await redis.hgetall(key)
            return (b"HSET", name, *(part for pair in fields.items() for part in pair))
        case b"zset":
            scores = cast("list[tuple[bytes, float]]", await redis.zrange(key, 0, -1, withscores=True))
            return (b"ZADD", name, *(part for member, score in scores for part in (score, member)))
        case kind:
            raise AssertionError(f"{name!r} is a {kind!r}")


if __name__ == "__main__":
    asyncio.run(write_sqlite())
    asyncio.run(write_redis())
