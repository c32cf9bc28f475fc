"""The store on disk: what is there again after an end, and what can be wrong with a file."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncproxy.core.errors import StartupError, StoreFull, StoreUnavailable
from asyncproxy.core.jobs import Call, Job, JobStatus, Outcome
from asyncproxy.stores.base import Alias, Limits, UnreadableCall
from asyncproxy.stores.sqlite import file as sqlite_file
from asyncproxy.stores.sqlite import queries, space
from asyncproxy.stores.sqlite.migrations import SCHEMA
from asyncproxy.stores.sqlite.store import SqliteStore
from tests.stores.test_contract import (
    CALL,
    UPSTREAM,
    Clock,
    call,
    completed,
    finish_next,
    job,
    large,
)

LIMITS = Limits(max_live=100_000, max_live_per_credential=100_000, max_bytes=1024**3)

PAGE = 4096  # bytes

OLD, NEW = b"o" * 32, b"n" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def opened(
    path: Path, clock: Clock, limits: Limits = LIMITS, **more: Any
) -> AsyncIterator[SqliteStore]:
    more = {"full_durability": False, **more}
    store = SqliteStore(path, limits, clock=clock, monotonic=clock, **more)
    async with store.opened(lambda _: None):
        yield store


async def refused(path: Path, clock: Clock, **more: Any) -> str:
    """What the store says when it does not open."""
    with pytest.raises(StartupError) as caught:
        async with opened(path, clock, **more):
            pass
    return str(caught.value)


async def test_live_jobs_are_taken_up_in_their_order(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        for name in "abc":
            await store.create(job(name, clock=clock), call(name.encode()))
        first = (await store.claim(UPSTREAM)).job
        await store.release(first, attempts=2)
        await store.claim(UPSTREAM)  # it is under way when everything ends
    async with opened(path, clock) as store:
        claims = [await store.claim(UPSTREAM) for _ in range(3)]
        assert [(c.job.id, c.job.attempts, c.call.body) for c in claims] == [
            ("a", 2, b"a"),
            ("b", 0, b"b"),
            ("c", 0, b"c"),
        ]
        assert (await store.usage()).live == 3


async def test_a_job_that_is_not_taken_up_yet_can_be_seen(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
    async with opened(path, clock) as store:
        found = await store.get("a")
        assert isinstance(found, Job)
        assert found.status is JobStatus.PENDING
        assert await store.delete("a")
        assert await store.get("a") is None
        assert (await store.usage()).live == 0


async def test_a_job_that_has_moved_is_found_where_it_went(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        claimed = (await store.claim(UPSTREAM)).job
        moved = msgspec.structs.replace(claimed, upstream="other", model="n", fallback_index=1)
        await store.release(moved, attempts=0, call=call(b"another"))
    async with opened(path, clock) as store:
        again = await store.claim("other")
        assert (again.job.model, again.job.fallback_index, again.call.body) == ("n", 1, b"another")


@pytest.mark.parametrize("sealed", [False, True])
async def test_results_and_their_names_outlive_the_process(
    path: Path,
    clock: Clock,
    sealed: bool,  # noqa: FBT001
) -> None:
    alias = Alias(b"name", b"print")
    async with opened(path, clock, seal_outcomes=sealed) as store:
        await store.create(job("a", clock=clock, ttl_s=10), CALL, alias)
        await finish_next(store, clock, large(30_000))
        outcome = await store.get("a")
        usage = await store.usage()
    async with opened(path, clock) as store:  # whatever the setting is now
        assert await store.get("a") == outcome
        assert await store.usage() == usage
        assert await store.create(job("b", clock=clock), CALL, alias) == outcome
        clock.now += 10
        assert await store.get("a") is None
    async with opened(path, clock) as store:
        assert await store.get("a") is None
        await store.tick()
        assert await store.usage() == (0, 0, 0)


async def test_no_secret_is_in_the_files(path: Path, clock: Clock) -> None:
    async with opened(path, clock, seal_outcomes=True) as store:
        for name in "ab":
            await store.create(job(name, clock=clock), call(b"the text of a client"))
        await finish_next(store, clock, b'"the text of an upstream"')
        await store.check()
        written = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert len(written) > 10_000
    assert b"the text of" not in written
    assert b"Bearer" not in written


async def test_the_files_are_for_their_owner_alone(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes.keys() >= {"jobs.db", "jobs.db-wal", "jobs.db.key"}
    assert set(modes.values()) == {0o600}


async def test_commits_are_shared(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        statements: list[str] = []
        store._writer._connection.set_trace_callback(statements.append)
        await asyncio.gather(
            *(store.create(job(str(number), clock=clock), CALL) for number in range(500))
        )
    assert sum(text.startswith("INSERT INTO jobs") for text in statements) == 500
    assert statements.count("COMMIT") <= 50


async def test_what_comes_in_one_go_shares_a_commit(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncproxy.stores.sqlite.writer._GATHER_S", 60.0)
    statements: list[str] = []

    async def create(store: SqliteStore, number: int) -> None:
        for _ in range(number):  # rounds of the loop
            await asyncio.sleep(0)
        await store.create(job(str(number), clock=clock), CALL)

    async with opened(path, clock) as store:
        await store._loaded.wait()
        store._writer._connection.set_trace_callback(statements.append)
        await asyncio.gather(*(create(store, number) for number in range(20)))
        assert statements.count("COMMIT") == 1


async def test_a_commit_does_not_wait_until_no_more_comes(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncproxy.stores.sqlite.writer._GATHER_S", 0.0)
    async with opened(path, clock) as store, asyncio.timeout(60):
        creating: list[asyncio.Future[Any]] = []
        while not creating or not creating[0].done():
            create = store.create(job(str(len(creating)), clock=clock), CALL)
            creating.append(asyncio.ensure_future(create))
            await asyncio.sleep(0)
        await asyncio.gather(*creating)


async def test_a_client_that_leaves_leaves_its_job(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store._loaded.wait()
        creating = asyncio.ensure_future(store.create(job("a", clock=clock), CALL))
        await asyncio.sleep(0)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        assert (await store.claim(UPSTREAM)).job.id == "a"
        assert (await store.usage()).live == 1


async def test_one_process_at_a_time(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        assert "belongs to another process" in await refused(path, clock)
        await store.create(job("a", clock=clock), CALL)
    async with opened(path, clock) as store:
        assert await store.get("a") is not None


@pytest.mark.parametrize(
    "contents", [b"some text that somebody needs\n" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
async def test_what_is_no_database_is_left_alone(path: Path, clock: Clock, contents: bytes) -> None:
    path.write_bytes(contents)
    assert "no database of asyncproxy" in await refused(path, clock)
    assert path.read_bytes() == contents
    assert list(path.parent.iterdir()) == [path]


async def test_the_database_of_another_application_is_left_alone(path: Path, clock: Clock) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    assert "no database of asyncproxy" in await refused(path, clock)
    assert path.read_bytes() == before


async def test_a_newer_schema_is_left_alone(path: Path, clock: Clock) -> None:
    async with opened(path, clock, keys=[OLD]):
        pass
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version={SCHEMA + 1}")
    before = path.read_bytes()
    assert "newer version of asyncproxy" in await refused(path, clock, keys=[OLD])
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["cut", "scribbled"])
async def test_a_torn_file_is_left_alone(path: Path, clock: Clock, how: str) -> None:
    async with opened(path, clock, keys=[OLD]) as store:
        for number in range(200):
            await store.create(job(str(number), clock=clock), CALL)
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(path.stat().st_size // 2)
        else:
            file.seek(8192)
            file.write(os.urandom(20_000))
    before = path.read_bytes()
    assert str(path) in await refused(path, clock, keys=[OLD])
    assert path.read_bytes() == before


async def test_a_folder_that_is_not_there(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "no" / "jobs.db"
    for keys in ([], [OLD]):
        assert f"the folder {path.parent} of store.url does not exist" in await refused(
            path, clock, keys=keys
        )
    assert "is a folder" in await refused(tmp_path, clock)
    assert list(tmp_path.iterdir()) == []


async def test_another_key_is_refused(path: Path, clock: Clock) -> None:
    async with opened(path, clock, keys=[OLD]) as store:
        await store.create(job("a", clock=clock), CALL)
    assert "another encryption key" in await refused(path, clock, keys=[NEW])
    async with opened(path, clock, keys=[OLD]) as store:
        assert (await store.claim(UPSTREAM)).call == CALL


async def test_a_key_file_that_went_missing_is_not_made_anew(path: Path, clock: Clock) -> None:
    async with opened(path, clock):
        pass
    key = path.with_name("jobs.db.key")
    kept = key.read_bytes()
    key.unlink()
    assert "its key file" in await refused(path, clock)
    key.write_bytes(b"not a key")
    assert "does not hold 32 bytes" in await refused(path, clock)
    key.write_bytes(kept)
    async with opened(path, clock):
        pass


async def test_keys_rotate(path: Path, clock: Clock) -> None:
    async with opened(path, clock, keys=[OLD]) as store:
        for name in "ab":
            await store.create(job(name, clock=clock), CALL)
        keys = store.credential_keys
    async with opened(path, clock, keys=[NEW, OLD]) as store:
        assert store.credential_keys[1:] == keys
        await store.create(job("c", clock=clock), CALL)
        assert (await store.claim(UPSTREAM)).call == CALL
    async with opened(path, clock, keys=[NEW]) as store:  # too early: two jobs are of the old one
        for name in "ab":
            with pytest.raises(UnreadableCall) as caught:
                await store.claim(UPSTREAM)
            lost = caught.value.job
            assert lost.id == name
            assert await store.finish(lost, completed(lost, clock))
        assert (await store.claim(UPSTREAM)).call == CALL


async def test_a_full_disk_refuses_and_loses_nothing(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        await store.create(job("b", clock=clock), CALL)
        claimed = (await store.claim(UPSTREAM)).job
        writing = store._writer._connection
        (pages,) = writing.execute("PRAGMA page_count").fetchone()
        writing.execute(f"PRAGMA max_page_count={pages + 1}").fetchall()
        with pytest.raises(StoreFull):
            await store.create(job("c", clock=clock), call(b"x" * 100_000))
        assert await store.get("c") is None
        outcome = completed(claimed, clock, large(100_000))
        with pytest.raises(StoreFull):
            await store.finish(claimed, outcome)
        assert await store.get("a") == claimed
        assert (await store.usage()).live == 2
        writing.execute("PRAGMA max_page_count=1000000").fetchall()
        assert await store.finish(claimed, outcome)
        await store.create(job("c", clock=clock), call(b"x" * 100_000))
        assert [(await store.claim(UPSTREAM)).job.id for _ in range(2)] == ["b", "c"]
    async with opened(path, clock) as store:
        assert await store.get("a") == outcome


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 2 MiB. Only root can have one."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]
        found = shutil.which("mount")
        if found is None or subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    """Leave not a byte of room, with a file that can be deleted."""
    with (disk / "other").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize("ended", ["stopped", "killed"])
async def test_a_start_on_a_full_disk_answers_polls(small_disk: Path, clock: Clock, ended: str) -> None:
    path = small_disk / "jobs.db"
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        await finish_next(store, clock)
        outcome = await store.get("a")
        await store.create(job("b", clock=clock), CALL)
        if ended == "killed":  # the files as they are now, with the log beside them
            copies = {file: file.read_bytes() for file in small_disk.iterdir()}
    if ended == "killed":
        for file, contents in copies.items():
            file.write_bytes(contents)
    fill(small_disk)
    for _ in range(2):
        async with opened(path, clock) as store:
            assert await store.get("a") == outcome
            assert isinstance(await store.get("b"), Job)
            fill(small_disk)  # what the start has left of its reserve
            with pytest.raises(StoreFull):
                await store.create(job("c", clock=clock), call(b"x" * 100_000))
            with pytest.raises(StoreUnavailable):
                await store.check()
            assert await store.get("a") == outcome
    with pytest.raises(StartupError, match="encryption key"):
        async with opened(path, clock, keys=[OLD]):
            pass
    async with opened(path, clock) as store:
        (small_disk / "other").unlink()
        await store.check()
        await store.create(job("c", clock=clock), CALL)
    async with opened(path, clock) as store:
        assert isinstance(await store.get("c"), Job)


async def test_a_new_database_on_a_full_disk_is_refused(small_disk: Path, clock: Clock) -> None:
    path = small_disk / "jobs.db"
    async with opened(path, clock):
        pass  # makes the key
    for file in small_disk.glob("jobs.db"):
        file.unlink()
    fill(small_disk)
    assert "full" in await refused(path, clock)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
async def test_files_that_are_not_there_any_more_are_noticed(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, how: str, suffix: str
) -> None:
    """What is written to a deleted file is gone at the end, so nothing is accepted any more."""
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        await store.check()
        file = path.with_name(path.name + suffix)
        contents = file.read_bytes()
        if how == "moved":
            file.rename(path.with_name("elsewhere"))
        else:
            file.unlink()
        if how == "replaced":
            file.write_bytes(contents)
        for step in (
            lambda: store.create(job("b", clock=clock), CALL),
            store.check,
            lambda: store.delete("a"),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                await step()
            assert "was deleted, moved or replaced" in caught.value.detail
        assert await store.get("b") is None
        assert isinstance(await store.get("a"), Job)
    (line,) = [r for r in caplog.records if "deleted, moved or replaced" in r.getMessage()]
    assert line.levelname == "ERROR"


async def test_what_the_library_is_told_is_what_it_does(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each setting that the store relies on, as SQLite has it, and not as it was asked for."""
    monkeypatch.setattr(sqlite_file, "_LOG_BYTES", 1024**2)
    async with opened(path, clock, full_durability=True) as store:
        writing = store._writer._connection

        def value(name: str) -> object:
            return writing.execute(f"PRAGMA {name}").fetchone()[0]

        assert value("journal_mode") == "wal"
        assert value("auto_vacuum") == 2  # incremental
        assert value("synchronous") == 2  # full
        assert value("cache_size") == -16 * 1024
        log = path.with_name(path.name + "-wal")
        await store.create(job("a", clock=clock), call(bytes(8 * 1024**2)))
        assert log.stat().st_size > 8 * 1024**2
        for number in range(3):  # the first one after a checkpoint begins the log anew, and cuts it
            await store.create(job(str(number), clock=clock), CALL)
        assert log.stat().st_size <= 1024**2


async def test_one_that_does_not_fit_does_not_hinder_the_others(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        writing = store._writer._connection
        (pages,) = writing.execute("PRAGMA page_count").fetchone()
        writing.execute(f"PRAGMA max_page_count={pages + 10}").fetchall()
        sizes = {"a": 10, "b": 1_000_000, "c": 10}
        creating = [store.create(job(n, clock=clock), call(b"x" * s)) for n, s in sizes.items()]
        outcomes = await asyncio.gather(*creating, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None), StoreFull, type(None)]
        assert (await store.usage()).live == 2


async def test_a_delete_that_cannot_be_written_leaves_the_job(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        writing = store._writer._connection
        writing.execute("PRAGMA query_only=1")
        with pytest.raises(StoreUnavailable):
            await store.delete("a")
        with pytest.raises(StoreUnavailable):
            await store.check()
        writing.execute("PRAGMA query_only=0")
        await store.check()
        assert (await store.claim(UPSTREAM)).job.id == "a"
        assert await store.delete("a")


async def test_expiry_gives_the_space_back(path: Path, clock: Clock) -> None:
    """Under a steady load the file stays as large as what lives at once, and is smaller after it."""
    sizes: list[int] = []
    async with opened(path, clock) as store:
        for number in range(600):
            await store.create(job(str(number), clock=clock, ttl_s=100), CALL)
            await finish_next(store, clock, large(300_000))
            clock.now += 1
            if number % 20 == 0:
                await store.tick()
                sizes.append(path.stat().st_size)
        assert sizes[-1] < 1.5 * sizes[len(sizes) // 3]
        clock.now += 1000
        for _ in range(20):
            await store.tick()
        assert await store.usage() == (0, 0, 0)
    assert path.stat().st_size < sizes[-1]
    async with opened(path, clock) as store:
        assert await store.usage() == (0, 0, 0)


async def test_a_minute_after_everything_has_expired_only_the_spare_pages_are_unused(
    path: Path, clock: Clock
) -> None:
    """Counted in the file itself, while the store is open: what a library says it freed is not enough."""
    async with opened(path, clock) as store:
        for number in range(120):
            await store.create(job(str(number), clock=clock, ttl_s=100), CALL)
            await finish_next(store, clock, large(1_000_000))
        assert path.stat().st_size > 25_000 * PAGE
        clock.now += 1000
        for _ in range(60):
            await store.tick()
        writing = store._writer._connection
        (unused,) = writing.execute("PRAGMA freelist_count").fetchone()
        assert 1000 < unused <= space.SPARE_PAGES
        assert path.stat().st_size < (unused + 50) * PAGE


@pytest.mark.parametrize("pages", [3000, 12_000])
def test_pages_are_given_back_step_by_step_and_counted(tmp_path: Path, pages: int) -> None:
    with closing(sqlite3.connect(tmp_path / "x", isolation_level=None)) as connection:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("CREATE TABLE t (b)")
        connection.execute("INSERT INTO t VALUES (zeroblob(?))", (pages * PAGE,))
        connection.execute("DELETE FROM t")

        def unused() -> int:
            return int(connection.execute("PRAGMA freelist_count").fetchone()[0])

        before = unused()
        assert before >= pages
        connection.execute("BEGIN IMMEDIATE")  # as the writer does: a step is one transaction
        surplus = space.free_pages(connection)
        assert surplus == max(0, before - space.SPARE_PAGES)
        assert before - unused() == min(surplus, space.FREED_PAGES)


async def test_memory_holds_a_bounded_part_of_the_results(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        for number in range(50):
            await store.create(job(str(number), clock=clock), CALL)
            await finish_next(store, clock, large(1_000_000))
        cache = store._results._cache
        for _ in range(2):
            assert cache._outcomes.currsize + cache._parts.currsize <= 32 * 1024**2
            for number in range(50):
                found = await store.get(str(number))
                assert isinstance(found, Outcome)
                assert found.parts == ()
                assert sum([len(part) async for part in store.read(found)]) == 1_000_002
        assert not store._recent_calls._calls


async def test_a_library_that_is_missing_is_named(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.fernet", None)
    assert "pip install 'asyncproxy[sqlite]'" in await refused(path, clock)


async def test_what_was_handed_in_is_written_at_the_end(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store._loaded.wait()
        creating = [
            asyncio.ensure_future(store.create(job(str(number), clock=clock), CALL))
            for number in range(50)
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*creating)
    with pytest.raises(StoreUnavailable):
        await store.create(job("late", clock=clock), CALL)
    async with opened(path, clock) as store:
        assert [(await store.claim(UPSTREAM)).job.id for _ in range(50)] == [str(n) for n in range(50)]


async def test_a_client_that_leaves_and_comes_again_finds_its_job(path: Path, clock: Clock) -> None:
    """While the first commit is under way: its name is held until then."""
    alias = Alias(b"name", b"print")
    go_on = threading.Event()
    async with opened(path, clock) as store:
        await store._loaded.wait()
        holding = store._writer.do(lambda _: go_on.wait(10))
        first = asyncio.ensure_future(store.create(job("a", clock=clock), CALL, alias))
        async with asyncio.timeout(60):
            while not len(store._live):
                await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        again = asyncio.ensure_future(store.create(job("b", clock=clock), CALL, alias))
        await asyncio.sleep(0)
        go_on.set()
        await holding
        found = await again
        assert found is not None
        assert found.id == "a"
        assert (await store.usage()).live == 1


async def test_a_record_that_is_damaged_stops_no_other(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path, clock) as store:
        for name in "abc":
            await store.create(job(f"job-{name}", clock=clock), CALL)
    with closing(sqlite3.connect(path)) as damaging, damaging:
        (record,) = damaging.execute("SELECT record FROM jobs WHERE id = 'job-b'").fetchone()
        broken = record.replace(b"job-b", b"job-\xff")
        damaging.execute("UPDATE jobs SET record = ? WHERE id = 'job-b'", (broken,))
    async with opened(path, clock) as store:
        await store.create(job("d", clock=clock), CALL)
        names = [(await store.claim(UPSTREAM)).job.id for _ in range(3)]
    assert names == ["job-a", "job-c", "d"]
    assert "is damaged, and left there" in caplog.text


async def test_a_poll_that_crosses_a_delete_does_not_bring_the_result_back(
    path: Path, clock: Clock
) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        await finish_next(store, clock)
        store._results._cache.drop("a")
        find, go_on = store._results._find, threading.Event()

        def slow(*args: Any) -> Any:
            found = find(*args)
            go_on.wait(10)
            return found

        store._results._find = slow  # type: ignore[method-assign,assignment]
        polling = asyncio.ensure_future(store.get("a"))
        await asyncio.sleep(0)
        assert await store.delete("a")
        go_on.set()
        await polling
        assert await store.get("a") is None


async def test_a_job_that_ends_unsent_leaves_nothing_in_memory(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
        (late,) = await store.claim_overdue(clock.now + 1)
        assert await store.finish(late, completed(late, clock))
        assert (store._recent_calls._calls, store._recent_calls._bytes) == ({}, 0)


async def test_a_poll_that_the_start_overtakes_sees_its_job(path: Path, clock: Clock) -> None:
    """It looks in memory before the jobs are taken up, and on disk after it: it has to find it all the same."""
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)
    async with opened(path, clock) as store:
        find, go_on = store._results._find, threading.Event()

        def slow(*args: Any) -> Any:
            go_on.wait(10)
            return find(*args)

        store._results._find = slow  # type: ignore[method-assign,assignment]
        polling = asyncio.ensure_future(store.get("a"))
        await asyncio.sleep(0)
        assert not store._loaded.is_set()
        await store._loaded.wait()
        go_on.set()
        found = await polling
        assert isinstance(found, Job)
        assert found.id == "a"


async def test_one_that_cannot_be_written_does_not_undo_those_beside_it(
    path: Path, clock: Clock
) -> None:
    """Nor does one whose call cannot be sealed, nor one whose end cannot be taken note of."""
    async with opened(path, clock) as store:
        await store._loaded.wait()
        seal, accepted = store._codec.seal_call, store._accepted

        def sealing(given: Call) -> bytes:
            if given.body == b"unsealed":
                raise ValueError("it cannot be sealed")
            return seal(given)

        def accepting(given: Job, *rest: Any) -> None:
            accepted(given, *rest)
            if given.id == "unheard":
                raise ValueError("it cannot be heard of")

        store._codec.seal_call = sealing  # type: ignore[method-assign,assignment]
        store._accepted = accepting  # type: ignore[method-assign,assignment]
        creating = [  # in one go, and so in one commit
            store.create(job(name, clock=clock), call(name.encode()))
            for name in ("a", "unsealed", "unheard", "b")
        ]
        outcomes = await asyncio.gather(*creating, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == [
            "None",
            "it cannot be sealed",
            "it cannot be heard of",
            "None",
        ]
        assert await store.get("unsealed") is None
    async with opened(path, clock) as store:
        assert [(await store.claim(UPSTREAM)).job.id for _ in range(3)] == ["a", "unheard", "b"]


def _jobs_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> Any:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(queries, "live_after", broken)


async def test_nobody_waits_for_ever_for_a_disk_that_cannot_be_read(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)

    _jobs_cannot_be_read(monkeypatch)
    monkeypatch.setattr("asyncproxy.stores.sqlite.store._LONGEST_LOAD_S", 0.05)
    async with opened(path, clock) as store:
        for asking in (
            store.get("a"),
            store.delete("a"),
            store.create(job("b", clock=clock), CALL),
        ):
            with pytest.raises(StoreUnavailable):
                await asking


async def test_large_ones_do_not_all_share_a_commit(path: Path, clock: Clock) -> None:
    """What is sealed before it is written is all in memory at once."""
    statements: list[str] = []
    async with opened(path, clock) as store:
        await store._loaded.wait()
        store._writer._connection.set_trace_callback(statements.append)
        large = call(b"x" * 1024**2)
        await asyncio.gather(*(store.create(job(str(n), clock=clock), large) for n in range(12)))
        assert statements.count("BEGIN IMMEDIATE") == 3


async def test_a_store_that_closes_while_it_is_read_does_not_say_that_there_is_no_such_job(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path, clock) as store:
        await store.create(job("a", clock=clock), CALL)

    _jobs_cannot_be_read(monkeypatch)
    async with opened(path, clock) as store:
        asking = asyncio.ensure_future(store.get("a"))
        await asyncio.sleep(0.05)
        assert not asking.done()
    with pytest.raises(StoreUnavailable):
        await asking
