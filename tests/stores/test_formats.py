"""Data that another version wrote: that of the versions before, and fields that only a newer one knows."""

from __future__ import annotations

import ast
import asyncio
import gzip
import logging
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis import Redis as SyncRedis

from asyncproxy.core.errors import StartupError
from asyncproxy.core.jobs import Call, Fallback, Job, JobStatus, Outcome
from asyncproxy.stores.base import Alias, Store
from asyncproxy.stores.codec import Codec, Unreadable
from asyncproxy.stores.redis import schema, scripts
from asyncproxy.stores.redis.store import RedisStore
from asyncproxy.stores.sqlite.migrations import MIGRATIONS, SCHEMA, migrate
from tests import redis_server
from tests.data import FOLDER, KEY, OTHER
from tests.stores.test_contract import CALL, UPSTREAM, Clock, call, completed, job
from tests.stores.test_redis import LEASE_S, Lab, claims, finds_nothing, lab_on
from tests.stores.test_sqlite import opened, refused

DATABASES = sorted(path.name.removesuffix(".db.gz") for path in FOLDER.glob("sqlite-*.db.gz"))
DEPLOYMENTS = sorted(path.name for path in FOLDER.glob("redis-*.txt"))

LATER = schema.SCHEMA + 1

FALLBACKS = (Fallback(OTHER, "n"), Fallback(UPSTREAM, "o"))


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async for lab in lab_on(redis_server.shared()):
        yield lab


def unpacked(tmp_path: Path, name: str) -> Path:
    """A copy of a database in ``tests/data``, with its key file."""
    path = tmp_path / "jobs.db"
    path.write_bytes(gzip.decompress((FOLDER / f"{name}.db.gz").read_bytes()))
    shutil.copyfile(FOLDER / f"{name}.key", tmp_path / "jobs.db.key")
    return path


def schema_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        found: int = connection.execute("PRAGMA user_version").fetchone()[0]
        return found


async def goes_on(store: Store, clock: Clock) -> None:
    """See that all jobs of :func:`tests.data.fill` are there as they were, and bring them to their ends."""
    await polls_as_before(store)
    clock.now += 20  # backoffs and leases are over
    await store.tick()
    for name, attempts in (("tried", 2), ("processed", 0), ("waits", 0)):
        claimed, sent = await store.claim(UPSTREAM)
        assert (claimed.id, claimed.attempts, sent) == (name, attempts, CALL)
        if name == "tried":
            assert (claimed.fallbacks, claimed.fallback_index) == (FALLBACKS, 0)
            assert (claimed.request_id, claimed.traceparent[:3]) == ("request-1", "00-")
        assert await store.finish(claimed, completed(claimed, clock))
    fell, sent = await store.claim(OTHER)
    assert (fell.id, fell.upstream, fell.model, fell.fallbacks) == ("fell", OTHER, "n", FALLBACKS[1:])
    assert (fell.fallback_index, sent) == (1, call(b'{"model":"n"}'))
    following = msgspec.structs.replace(
        fell, upstream=UPSTREAM, model="o", fallbacks=(), fallback_index=2
    )
    await store.release(following, attempts=0, call=CALL)
    last = (await store.claim(UPSTREAM)).job
    assert await store.finish(last, completed(last, clock))
    for name in ("tried", "processed", "waits", "fell"):
        assert isinstance(await store.get(name), Outcome)
    assert (await store.usage())[:2] == (0, 8)


async def polls_as_before(store: Store) -> None:
    """See that polls find each job and each result, by its id and by its other name."""
    for name in ("tried", "processed", "waits", "fell"):
        assert isinstance(await store.get(name), Job)
    results = {name: await store.get(name) for name in ("done", "failed", "audio", "large")}
    done, failed, audio, large = results.values()
    assert isinstance(done, Outcome)
    assert done.envelope[done.start : done.end] == b'{"ok":1}'
    assert isinstance(failed, Outcome)
    assert (failed.status, failed.status_code) == (JobStatus.FAILED, 504)
    assert isinstance(audio, Outcome)
    assert (audio.content, audio.encoded) == (b"\xff\xfb", True)
    assert isinstance(large, Outcome)
    assert b"".join(large.parts) == b'{"ok":1}'
    for name in ("waits", "done"):
        alias = Alias(f"of {name}".encode(), b"print")
        found = await store.create(job("another", clock=Clock()), CALL, alias)
        assert found is not None
        assert found.id == name


def test_the_data_of_the_version_before_are_kept() -> None:
    assert [f"sqlite-{number}" for number in range(1, SCHEMA)] == DATABASES
    assert [f"redis-{number}.txt" for number in range(1, schema.SCHEMA)] == DEPLOYMENTS


# --- SQLite


@pytest.mark.parametrize("name", DATABASES)
async def test_a_database_of_an_earlier_version_goes_on(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path, clock = unpacked(tmp_path, name), Clock()
    assert schema_of(path) == int(name.removeprefix("sqlite-"))
    async with opened(path, clock) as store:
        await goes_on(store, clock)
    assert schema_of(path) == SCHEMA
    assert f"to {SCHEMA}" in caplog.text


@pytest.mark.parametrize("name", DATABASES)
async def test_a_database_of_an_earlier_version_becomes_what_a_new_one_is(
    tmp_path: Path, name: str
) -> None:
    made = []
    for path in (unpacked(tmp_path, name), tmp_path / "new.db"):
        async with opened(path, Clock()):
            pass
        with closing(sqlite3.connect(path)) as connection:
            tables = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name")
            made.append(tables.fetchall())
    assert made[0] == made[1]


async def test_a_database_of_an_earlier_version_stays_as_it_was_without_its_key(tmp_path: Path) -> None:
    path = unpacked(tmp_path, DATABASES[0])
    before = path.read_bytes()
    assert "another encryption key" in await refused(path, Clock(), keys=[b"x" * 32])
    assert path.read_bytes() == before


def test_only_the_steps_that_are_missing_are_taken(tmp_path: Path) -> None:
    path = unpacked(tmp_path, DATABASES[0])
    steps = (*MIGRATIONS[:1], "CREATE TABLE second (a);", "ALTER TABLE second ADD COLUMN b;")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        migrate(connection, 1, steps)
        connection.execute("COMMIT")
        connection.execute("INSERT INTO second (a, b) VALUES (1, 2)")
    assert schema_of(path) == 3


def test_steps_that_fail_change_nothing(tmp_path: Path) -> None:
    path = unpacked(tmp_path, DATABASES[0])
    before = path.read_bytes()
    steps = (*MIGRATIONS[:1], "CREATE TABLE second (a);", "ALTER TABLE missing ADD COLUMN b;")
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as connection,
        pytest.raises(sqlite3.OperationalError),
    ):
        migrate(connection, 1, steps)
    assert path.read_bytes() == before


async def test_a_field_of_a_newer_version_survives_in_a_database(tmp_path: Path) -> None:
    path, clock = tmp_path / "jobs.db", Clock()
    async with opened(path, clock) as store:
        await store.create(submitted(clock), CALL)
    with closing(sqlite3.connect(path)) as newer, newer:
        (record,) = newer.execute("SELECT record FROM jobs").fetchone()
        newer.execute("UPDATE jobs SET record = ?", (of_a_newer_version(record),))
    async with opened(path, clock) as store:
        await store.release((await store.claim(UPSTREAM)).job, attempts=1)
    async with opened(path, clock) as store:
        await falls_back(store)
    with closing(sqlite3.connect(path)) as found:
        (record,) = found.execute("SELECT record FROM jobs").fetchone()
    has_fallen_back_with_all_its_fields(record)


# --- Redis


async def put_back(lab: Lab, name: str) -> None:
    """Put the data of an earlier version into Redis."""
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        command, key, *arguments = ast.literal_eval(line)
        if command == b"HSET":
            await lab.redis.hset(lab.key(key.decode()), items=arguments)
        else:
            scores = dict(zip(arguments[1::2], arguments[::2], strict=True))
            await lab.redis.zadd(lab.key(key.decode()), scores)


@pytest.mark.parametrize("name", DEPLOYMENTS)
async def test_a_deployment_of_an_earlier_version_goes_on(lab: Lab, name: str) -> None:
    await put_back(lab, name)
    node = await lab.node(keys=[KEY])
    assert await lab.redis.hget(lab.key("meta"), "schema") == str(schema.SCHEMA).encode()
    await goes_on(node, lab.clock)


async def test_a_field_of_a_newer_version_survives_in_redis(lab: Lab) -> None:
    node = await lab.node()
    await node.create(submitted(lab.clock), CALL)
    key = lab.key("job:a")
    newer = of_a_newer_version(await record_of_a(lab))
    await lab.redis.hset(key, mapping={"j": newer, "newer": "hash field"})
    await node.release((await claims(node)).job, attempts=1)
    assert await record_of_a(lab) == newer, "a release writes what it changes, and no more"
    await falls_back(node)
    has_fallen_back_with_all_its_fields(await record_of_a(lab))
    assert await lab.redis.hget(key, "newer") == b"hash field"
    lab.clock.now += 1000
    (orphan,) = await node.claim_orphans({"another"})
    await node.release(msgspec.structs.replace(orphan, upstream="another"), attempts=0)
    record = msgspec.msgpack.decode(await record_of_a(lab))
    assert (record["upstream"], record["newer"]) == ("another", [1, 2])


async def test_a_job_that_moved_reads_the_same_for_a_node_of_the_version_before(lab: Lab) -> None:
    """It reads upstream, model and fallbacks from the record, and from nowhere else."""
    node = await lab.node()
    await node.create(submitted(lab.clock), CALL)
    await falls_back(node)
    assert msgspec.msgpack.decode(await record_of_a(lab), type=Job) == (
        msgspec.structs.replace(
            submitted(lab.clock), upstream=OTHER, model="n", fallbacks=FALLBACKS[1:], fallback_index=1,
            status=JobStatus.PROCESSING, claims=1,
        )
    )  # fmt: skip


async def test_a_node_claims_nothing_beside_a_newer_one_and_ends_what_it_has(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = await lab.node()
    await lab.submit(old, "a", "b")
    claim = await claims(old)
    newer = await newer_node(lab, monkeypatch)
    await finds_nothing(old)
    await finds_nothing(old)
    assert caplog.text.count("a newer version of asyncproxy uses this Redis") == 1
    lab.clock.now += LEASE_S - 1
    await old.renew()
    assert await old.claim_overdue(lab.clock.now + 1) == []
    lab.clock.now += 4 * LEASE_S
    assert await old.claim_orphans({"another"}) == []
    await old.renew()
    await lab.submit(old, "c")
    assert await lab.finish(old, claim)
    assert isinstance(await old.get("a"), Outcome)
    for name in "bc":
        claim = await claims(newer)
        assert claim.job.id == name
        assert await lab.finish(newer, claim)
        assert isinstance(await old.get(name), Outcome)


async def test_a_node_beside_a_newer_one_takes_no_turn_from_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await lab.node()
    asked = asyncio.ensure_future(old.claim(UPSTREAM))
    newer = await newer_node(lab, monkeypatch)
    claimed = asyncio.ensure_future(newer.claim(UPSTREAM))
    idle = lab.key(f"idle:{UPSTREAM}")
    async with asyncio.timeout(60):
        while await lab.redis.scard(idle) < 2:
            await asyncio.sleep(0)
        await lab.submit(old, "a")
        assert (await claimed).job.id == "a"
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


async def test_a_node_refuses_to_start_where_a_newer_one_has(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        await newer_node(lab, patch)
    with pytest.raises(StartupError, match="schema"):
        await lab.node()


async def test_a_newer_node_that_starts_in_the_same_moment_is_not_overruled(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object) -> None:
        """Between the look at the schema and its change."""
        with SyncRedis(port=lab.server.port) as redis:
            redis.hset(lab.key("meta"), "schema", LATER)

    monkeypatch.setattr(Codec, "check", check)
    with pytest.raises(StartupError, match="schema"):
        await lab.node()
    assert await lab.redis.hget(lab.key("meta"), "schema") == str(LATER).encode()


async def record_of_a(lab: Lab) -> bytes:
    record = await lab.redis.hget(lab.key("job:a"), "j")
    assert isinstance(record, bytes)
    return record


async def newer_node(lab: Lab, patch: pytest.MonkeyPatch) -> RedisStore:
    """A node of the next schema."""
    patch.setattr(schema, "SCHEMA", LATER)
    patch.setattr(scripts, "SCHEMA", LATER)
    return await lab.node()


# --- Records


def submitted(clock: Clock) -> Job:
    return msgspec.structs.replace(job("a", clock=clock), fallbacks=FALLBACKS, fallback_index=0)


def of_a_newer_version(record: bytes) -> bytes:
    """A packed job with fields that this version does not know."""
    fields: dict[str, Any] = msgspec.msgpack.decode(record)
    fields["newer"] = [1, 2]
    for number, fallback in enumerate(fields["fallbacks"]):
        fallback["newer"] = number
    return msgspec.msgpack.encode(fields)


async def falls_back(store: Store) -> None:
    """Make the job one for the first of its fallbacks, as the dispatcher does."""
    claimed = (await store.claim(UPSTREAM)).job
    following = msgspec.structs.replace(
        claimed, upstream=OTHER, model="n", fallbacks=FALLBACKS[1:], fallback_index=1
    )
    await store.release(following, attempts=0, call=call(b"{}"))


def has_fallen_back_with_all_its_fields(record: bytes) -> None:
    found = msgspec.msgpack.decode(record)
    assert found["newer"] == [1, 2]
    assert (found["upstream"], found["model"], found["fallback_index"]) == (OTHER, "n", 1)
    assert found["fallbacks"] == [{"upstream": UPSTREAM, "model": "o", "newer": 1}]


def test_a_record_takes_no_fallbacks_that_it_did_not_have() -> None:
    codec = Codec([KEY], seal_outcomes=False, extra="redis")
    before = submitted(Clock())
    more = msgspec.structs.replace(before, fallbacks=(*FALLBACKS, *FALLBACKS))
    with pytest.raises(Unreadable):
        codec.update_job(codec.pack_job(before), more)


def test_a_call_has_the_fields_that_its_schema_says() -> None:
    """A fallback writes a call anew: a field more is lost there by an earlier version.

    So it needs another schema, in ``stores/redis/schema.py`` and ``stores/sqlite/migrations.py``.
    """
    assert (schema.SCHEMA, SCHEMA, Call.__struct_fields__) == (
        2,
        2,
        ("endpoint", "target", "head", "body"),
    )
