"""The store on disk, for one process: what was accepted is there again after ``kill -9``.

Which jobs are live, and whose turn it is, is in memory (the ledger), and read again at the start.
Requests, results and aliases are on disk: memory does not grow with them. What is answered is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from cachetools import LRUCache

from asyncproxy.core.errors import IdempotencyKeyReused, StartupError, StoreFull, StoreUnavailable
from asyncproxy.core.jobs import Call, Job, JobStatus, Lane, Outcome, advance
from asyncproxy.stores import codec
from asyncproxy.stores.base import Alias, Claim, Limits, Lost, States, UnreadableCall, Usage
from asyncproxy.stores.codec import Codec, Unreadable
from asyncproxy.stores.fair_queue import QueuePosition
from asyncproxy.stores.live_jobs import LiveJobs
from asyncproxy.stores.sqlite import file, space
from asyncproxy.stores.sqlite.key_file import key_of
from asyncproxy.stores.sqlite.writer import Writer
from asyncproxy.stores.waiters import Waiters

__all__ = ["SqliteStore"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Outcomes kept in memory for the polls that come again, and calls for the worker that takes them soon.
_HOT_BYTES: Final = 32 * 1024 * 1024
_FRESH_BYTES: Final = 16 * 1024 * 1024

_READERS: Final = 2

# Rows per step of work that must not keep others waiting.
_ROWS: Final = 1000

# How long a request waits while the jobs of the process before us are taken up.
_LONGEST_LOAD_S: Final = 30.0

# Until the disk is asked again for what it could not read.
_RETRY_LOAD_S: Final = 5.0
_RETRY_READ_S: Final = 1.0


class SqliteStore:
    """See :class:`~asyncproxy.stores.base.Store`.

    ``keys`` are 32 bytes each; none: that of the file ``<path>.key``, which is made when the database
    is new. ``full_durability``: an accepted job survives a power loss, and not only the end of the
    process.
    """

    survives = True

    def __init__(
        self,
        path: Path,
        limits: Limits,
        *,
        keys: Sequence[bytes] = (),
        seal_outcomes: bool = False,
        full_durability: bool = True,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._full_durability = full_durability
        self._clock = clock
        codec.require(extra="sqlite")
        file.check_place(path)  # before a key is made for it
        # The key is needed before the store is opened: it is that of the credential hashes too.
        keys = keys or (key_of(path),)
        self._codec = Codec(keys, seal_outcomes=seal_outcomes, extra="sqlite")
        self.credential_keys = self._codec.credential_keys
        self._live = LiveJobs(limits, monotonic=monotonic, has_room=self._has_room)
        self._loaded = asyncio.Event()
        self._waiters = Waiters()
        self._names: dict[bytes, asyncio.Future[None]] = {}
        self._fresh: dict[str, Call] = {}
        self._fresh_bytes = 0
        self._hot: LRUCache[str, Outcome] = LRUCache(_HOT_BYTES, getsizeof=lambda o: o.size)
        self._forgotten = 0  # how often results were deleted or changed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._results = 0
        self._result_bytes = 0
        # The number of the last job: its row's. None is used twice while we run, and nothing on disk
        # refers to one, so those of jobs that are gone may come again after a start.
        self._last_seq = 0
        self._complete = False  # all jobs on disk are known
        self._refused = False  # the disk had no room for the last job
        self._writer: Writer
        self._readers: ThreadPoolExecutor
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()

    @property
    def limits(self) -> Limits:
        return self._live.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._live.limits = limits
        self._live.wake_all()  # there may be room now

    @asynccontextmanager
    async def opened(self, lost: Lost) -> AsyncIterator[None]:
        with ExitStack() as stack:
            stack.enter_context(file.locked(self._path))
            await asyncio.to_thread(file.prepared, self._path, self._codec)
            for _ in range(_READERS):
                self._idle.put(stack.enter_context(self._connected()))
            self._readers = stack.enter_context(
                ThreadPoolExecutor(_READERS, thread_name_prefix="asyncproxy-sqlite-read")
            )
            self._writer = Writer(stack.enter_context(self._connected()), file.guard(self._path))
            async with self._writer.running():
                await self._count()
                loading = asyncio.create_task(self._load(), name="asyncproxy-sqlite-load")
                try:
                    yield
                finally:
                    loading.cancel()
                    await asyncio.gather(loading, return_exceptions=True)
                    self._loaded.set()  # who still waits for it hears that the store is closed

    def _connected(self) -> closing[sqlite3.Connection]:
        return closing(file.connect(self._path, full_durability=self._full_durability))

    async def _count(self) -> None:
        try:
            self._results, self._result_bytes, self._last_seq = await self._read(_counted)
        except StoreUnavailable as error:
            raise StartupError(f"{self._path} cannot be used: {error.detail}") from error

    async def _load(self) -> None:
        """Take up the jobs that the process before us left, in their order."""
        after, taken = 0, 0
        while True:
            try:
                rows = await self._read(partial(_live_after, after))
            except StoreUnavailable as error:
                logger.warning("the jobs in %s cannot be taken up: %s", self._path, error.detail)
                await asyncio.sleep(_RETRY_LOAD_S)
                continue
            if not rows:
                break
            for seq, size, record in rows:
                after = seq
                try:
                    job = self._codec.unpack_job(record)
                except Unreadable as error:
                    logger.warning(
                        "job %d of %s is damaged, and left there: %s", seq, self._path, error
                    )
                    continue
                self._live.add(job, size, seq=seq)
                self._live.enqueue(job)
                taken += 1
            await asyncio.sleep(0)  # others have their turn
        self._complete = True
        self._loaded.set()
        if taken:
            logger.info("took up %d unfinished jobs from %s", taken, self._path)

    async def _taken_up(self) -> None:
        """Wait until all jobs on disk are known. Raises :class:`StoreUnavailable` if it takes long."""
        if not self._loaded.is_set():
            try:
                async with asyncio.timeout(_LONGEST_LOAD_S):
                    await self._loaded.wait()
            except TimeoutError:
                raise StoreUnavailable("The store is still being read. Try again later.") from None
        if not self._complete:
            raise StoreUnavailable("The store is closed.")

    async def create(self, job: Job, call: Call, alias: Alias | None = None) -> Job | Outcome | None:
        if not self._complete:
            await self._taken_up()
        if alias is None:
            await self._accept(job, call, None)
            return None
        # A task of its own: should the client go away, the name is held until the job is written, for
        # the client's next try is on its way.
        naming = asyncio.create_task(self._create_named(job, call, alias))
        self._tasks.add(naming)
        naming.add_done_callback(self._tasks.discard)
        naming.add_done_callback(_heard)
        return await asyncio.shield(naming)

    async def _create_named(self, job: Job, call: Call, alias: Alias) -> Job | Outcome | None:
        async with self._naming(alias.key):
            found = await self._named(alias) if alias.attach else None
            if found is None:
                await self._accept(job, call, alias)
            return found

    async def _accept(self, job: Job, call: Call, alias: Alias | None) -> None:
        self._live.check(job)
        size = job.size + call.size
        if not self._live.fits(size, self._result_bytes):
            await self._expire()
            self._live.check(job)
            if not self._live.fits(size, self._result_bytes):
                raise StoreFull("The store is full. Try again later.", retry_after_s=5)
        self._last_seq += 1
        self._live.add(job, size, seq=self._last_seq)
        await self._writer.do(
            partial(_insert, alias),
            partial(self._accepted, job, call),
            prepare=partial(self._row, self._last_seq, job, size, call),
            size=size,
        )

    def _row(self, seq: int, job: Job, size: int, call: Call) -> tuple[Any, ...]:
        return seq, job.id, size, *self._packed(job, call)

    def _accepted(self, job: Job, call: Call, error: Exception | None) -> None:
        self._refused = isinstance(error, StoreFull)
        if error is not None:
            self._live.drop(job.id)
            return
        size = call.size
        if self._fresh_bytes + size <= _FRESH_BYTES:
            self._fresh[job.id] = call
            self._fresh_bytes += size
        self._live.enqueue(job)

    async def get(self, job_id: str) -> Job | Outcome | None:
        job = self._live.get(job_id)
        if job is not None:
            return job
        complete = self._complete
        outcome = self._hot.get(job_id) or await self._kept(job_id)
        if outcome is None and not complete:  # it may be one that is still to be taken up
            await self._taken_up()
            if (job := self._live.get(job_id)) is not None:
                return job
            outcome = await self._kept(job_id)  # it may have ended between the two looks
        return outcome if outcome and outcome.expires_at > self._clock() else None

    async def _kept(self, job_id: str) -> Outcome | None:
        """An outcome on disk."""
        forgotten = self._forgotten
        outcome = await self._read(partial(self._find, job_id))
        if outcome is not None and self._forgotten == forgotten:
            self._keep_hot(outcome)  # else it may be among what was deleted meanwhile
        return outcome

    def _find(self, job_id: str, on: sqlite3.Connection) -> Outcome | None:
        select = "SELECT outcome, expires_at FROM results WHERE id = ?"
        if (found := on.execute(select, (job_id,)).fetchone()) is None:
            return None
        outcome = self._codec.unpack_outcome(found[0])
        return msgspec.structs.replace(outcome, expires_at=found[1])

    async def claim(self, upstream: str) -> Claim:
        while True:
            job = await self._live.claim(upstream)
            call = self._take_fresh(job.id)
            if call is not None:
                return Claim(job, call)
            try:
                seq = self._live.seq_of(job.id)
                return Claim(job, await self._read(partial(self._call_of, seq)))
            except Unreadable as error:
                raise UnreadableCall(job) from error
            except asyncio.CancelledError:
                self._live.release(job, attempts=job.attempts)
                raise
            except StoreUnavailable as error:
                logger.warning("job %s cannot be read: %s", job.id, error.detail)
                self._live.release(job, attempts=job.attempts, delay_s=_RETRY_READ_S)

    def _call_of(self, seq: int | None, on: sqlite3.Connection) -> Call:
        found = on.execute("SELECT call FROM jobs WHERE seq = ?", (seq,)).fetchone()
        if found is None:
            raise Unreadable("it is not there")
        return self._codec.open_call(found[0])

    async def release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        call: Call | None = None,
    ) -> None:
        if not self._live.holds(job):
            return
        size = None if call is None else job.size + call.size
        kept = advance(job, JobStatus.PENDING, attempts=attempts)
        before = self._live.get(job.id)
        assert before is not None
        if call is not None or (attempts, job.upstream) != (before.attempts, before.upstream):
            # On disk first: an attempt that was made counts, whatever happens to this process.
            seq = self._live.seq_of(job.id)
            await self._writer.do(
                partial(_update, seq, size), prepare=partial(self._packed, kept, call), size=size or 0
            )
        self._live.release(job, attempts=attempts, delay_s=delay_s, whole_lane=whole_lane, size=size)

    def _packed(self, job: Job, call: Call | None) -> tuple[bytes, bytes | None]:
        return self._codec.pack_job(job), None if call is None else self._codec.seal_call(call)

    async def pause(self, lane: Lane, delay_s: float) -> None:
        self._live.pause(lane, delay_s)

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        if not self._live.holds(job):
            return False
        return await self._writer.do(
            partial(_replace, self._live.seq_of(job.id), outcome),
            partial(self._finished, outcome),
            prepare=partial(self._codec.pack_outcome, outcome),
            size=outcome.size,
        )

    def _finished(self, outcome: Outcome, replaced: bool | Exception) -> None:  # noqa: FBT001  a step's result
        if replaced is not True:
            return
        self._live.drop(outcome.id)
        self._take_fresh(outcome.id)  # of one that ended without having been sent
        self._results += 1
        self._result_bytes += outcome.size
        self._keep_hot(outcome)
        self._waiters.wake(outcome.id, outcome)

    async def delete(self, job_id: str) -> bool:
        await self._taken_up()
        waited = self._live.withdraw(job_id)  # not to be sent while it is being deleted
        return (
            await self._writer.do(
                partial(_remove, self._live.seq_of(job_id), job_id, self._clock()),
                partial(self._removed, job_id, waited),
            )
            is not None
        )

    def _removed(self, job_id: str, waited: bool, size: int | Exception | None) -> None:  # noqa: FBT001
        if isinstance(size, Exception):
            if waited and (job := self._live.get(job_id)) is not None:
                self._live.enqueue(job)
            return
        if self._live.drop(job_id) is not None:
            self._take_fresh(job_id)
            self._waiters.wake(job_id, None)
        elif size is not None:
            self._forget([(job_id, size)])

    async def claim_overdue(self, created_before: float) -> list[Job]:
        return self._live.claim_overdue(created_before)

    async def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        return self._live.claim_orphans(upstreams)

    async def wait(self, job_id: str, timeout_s: float) -> Job | Outcome | None:
        return await self._waiters.follow(self.get, job_id, timeout_s)

    def release_waiters(self) -> None:
        self._waiters.release()

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        until = min(outcome.expires_at, self._clock() + within_s) if within_s else None
        await self._writer.do(
            partial(_retire, outcome.id, until), partial(self._retired, outcome, until)
        )

    def _retired(self, outcome: Outcome, until: float | None, retired: bool | Exception) -> None:  # noqa: FBT001
        if retired is not True:
            return
        if until is None:
            self._forget([(outcome.id, outcome.size)])
        else:
            self._forgotten += 1
            self._keep_hot(msgspec.structs.replace(outcome, expires_at=until))

    def place(self, job: Job) -> QueuePosition | None:
        return self._live.place(job)

    async def usage(self) -> Usage:
        return Usage(len(self._live), self._results, self._live.bytes + self._result_bytes)

    async def states(self) -> States:
        return self._live.states()

    async def check(self) -> None:
        """A write that changes nothing, for a disk that is full or gone shows in no other way.

        It is small, and so may succeed where a job had no room.
        """
        if self._refused and file.is_full(self._path):
            raise StoreUnavailable("The disk is full.")
        try:
            await self._writer.do(
                lambda on: on.execute("UPDATE meta SET value = value WHERE name = 'probe'")
            )
        except StoreFull as error:
            raise StoreUnavailable("The disk is full.") from error

    async def tick(self) -> None:
        await self._expire()
        self._live.wake_all()
        await space.give_back(self._writer.do, self._read)

    async def _expire(self) -> None:
        gone = _ROWS
        while gone == _ROWS:
            expired = await self._writer.do(partial(_expired, self._clock()), self._on_expired)
            gone = len(expired)

    def _on_expired(self, expired: list[tuple[str, int]] | Exception) -> None:
        if not isinstance(expired, Exception):
            self._forget(expired)

    def _forget(self, gone: Iterable[tuple[str, int]]) -> None:
        """Results that are not on disk any more."""
        self._forgotten += 1
        for job_id, size in gone:
            self._hot.pop(job_id, None)
            self._results -= 1
            self._result_bytes -= size

    async def _named(self, alias: Alias) -> Job | Outcome | None:
        """The job that an alias names, if there is one."""
        select = "SELECT fingerprint, job_id FROM aliases WHERE key = ?"
        row = await self._read(lambda on: on.execute(select, (alias.key,)).fetchone())
        found = None if row is None else await self.get(row[1])
        if found is not None and row[0] != alias.fingerprint:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was used with another request. Use a new key for a new request."
            )
        return found

    @asynccontextmanager
    async def _naming(self, key: bytes) -> AsyncIterator[None]:
        """One at a time for each name: two equal requests at once must find the same job."""
        while (busy := self._names.get(key)) is not None:
            await asyncio.shield(busy)
        done = self._names[key] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._names[key]
            done.set_result(None)

    def _has_room(self) -> bool:
        return self._live.bytes + self._result_bytes < self._live.limits.max_bytes

    def _keep_hot(self, outcome: Outcome) -> None:
        if outcome.size <= _HOT_BYTES // 4:  # one large one must not push out all others
            self._hot[outcome.id] = outcome

    def _take_fresh(self, job_id: str) -> Call | None:
        call = self._fresh.pop(job_id, None)
        if call is not None:
            self._fresh_bytes -= call.size
        return call

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Read, off the loop: the disk may be slow."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._reading, read)

    def _reading(self, read: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._idle.get()
        try:
            return read(connection)
        except sqlite3.Error as error:
            raise file.translate(error) from error
        finally:
            self._idle.put(connection)


def _heard(done: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody waits for any more."""
    done.exception()


def _live_after(seq: int, on: sqlite3.Connection) -> list[tuple[int, int, bytes]]:
    select = "SELECT seq, size, record FROM jobs WHERE seq > ? ORDER BY seq LIMIT ?"
    return on.execute(select, (seq, _ROWS)).fetchall()


def _insert(alias: Alias | None, row: tuple[Any, ...], on: sqlite3.Connection) -> None:
    on.execute("INSERT INTO jobs (seq, id, size, record, call) VALUES (?, ?, ?, ?, ?)", row)
    if alias is not None:
        on.execute(
            "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)",
            (alias.key, alias.fingerprint, row[1], alias.once),
        )


def _update(
    seq: int | None, size: int | None, packed: tuple[bytes, bytes | None], on: sqlite3.Connection
) -> None:
    """Write down how a job stands; with its ``size``, if its call is another one."""
    record, call = packed
    on.execute("UPDATE jobs SET record = ? WHERE seq = ?", (record, seq))
    if call is not None:
        on.execute("UPDATE jobs SET call = ?, size = ? WHERE seq = ?", (call, size, seq))


def _replace(seq: int | None, outcome: Outcome, packed: bytes, on: sqlite3.Connection) -> bool:
    if not on.execute("DELETE FROM jobs WHERE seq = ?", (seq,)).rowcount:
        return False  # it was deleted by a step before this one
    on.execute(
        "INSERT INTO results (id, expires_at, size, outcome) VALUES (?, ?, ?, ?)",
        (outcome.id, outcome.expires_at, outcome.size, packed),
    )
    return True


def _counted(on: sqlite3.Connection) -> tuple[int, int, int]:
    """How many results there are, their bytes, and the number of the last job."""
    results: tuple[int, int] = on.execute(
        "SELECT count(*), coalesce(sum(size), 0) FROM results"
    ).fetchone()
    (last,) = on.execute("SELECT coalesce(max(seq), 0) FROM jobs").fetchone()
    return *results, last


def _remove(seq: int | None, job_id: str, now: float, on: sqlite3.Connection) -> int | None:
    """The size of the result that is gone, 0 for a live job. None: there was neither.

    Without a ``seq`` it was no live job.
    """
    on.execute("DELETE FROM aliases WHERE job_id = ?", (job_id,))
    if on.execute("DELETE FROM jobs WHERE seq = ?", (seq,)).rowcount:
        return 0
    delete = "DELETE FROM results WHERE id = ? AND expires_at > ? RETURNING size"
    gone: list[tuple[int]] = on.execute(delete, (job_id, now)).fetchall()
    return gone[0][0] if gone else None


def _expired(now: float, on: sqlite3.Connection) -> list[tuple[str, int]]:
    """Delete results whose time has come, ``_ROWS`` at the most; their ids and sizes."""
    gone: list[tuple[str, int]] = on.execute(
        "DELETE FROM results WHERE seq IN"
        " (SELECT seq FROM results WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)"
        " RETURNING id, size",
        (now, _ROWS),
    ).fetchall()
    on.executemany("DELETE FROM aliases WHERE job_id = ?", [(job_id,) for job_id, _ in gone])
    return gone


def _retire(job_id: str, until: float | None, on: sqlite3.Connection) -> bool:
    """Whether the result had a name for once. That is gone, and the result at once or ``until``."""
    if not on.execute("DELETE FROM aliases WHERE job_id = ? AND once", (job_id,)).rowcount:
        return False
    if until is None:
        return bool(on.execute("DELETE FROM results WHERE id = ?", (job_id,)).rowcount)
    update = "UPDATE results SET expires_at = ? WHERE id = ?"
    return bool(on.execute(update, (until, job_id)).rowcount)
