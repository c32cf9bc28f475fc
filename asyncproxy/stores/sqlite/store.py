"""The store on disk, for one process: what was accepted is there again after ``kill -9``.

Which jobs are live, and whose turn it is, is in memory (``LiveJobs``), and read again at the start.
Requests, results and aliases are on disk: memory does not grow with them. What is answered is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, Final

from asyncproxy.core.errors import IdempotencyKeyReused, StartupError, StoreFull, StoreUnavailable
from asyncproxy.core.jobs import Call, Job, JobStatus, Outcome, advance
from asyncproxy.stores import codec
from asyncproxy.stores.base import Alias, Claim, Limits, Lost, UnreadableCall
from asyncproxy.stores.codec import Codec, Unreadable
from asyncproxy.stores.local import LocalStore
from asyncproxy.stores.sqlite import file, queries, space
from asyncproxy.stores.sqlite.caches import RecentCalls
from asyncproxy.stores.sqlite.key_file import key_of
from asyncproxy.stores.sqlite.queries import Gone
from asyncproxy.stores.sqlite.readers import Readers
from asyncproxy.stores.sqlite.results import Results
from asyncproxy.stores.sqlite.writer import Writer

__all__ = ["SqliteStore"]

logger = logging.getLogger(__name__)

# How long a request waits while the jobs of the process before us are taken up.
_LONGEST_LOAD_S: Final = 30.0

# Until the disk is asked again for what it could not read.
_RETRY_LOAD_S: Final = 5.0
_RETRY_READ_S: Final = 1.0


class SqliteStore(LocalStore):
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
        super().__init__(limits, clock=clock, monotonic=monotonic)
        self._path = path
        self._full_durability = full_durability
        codec.require(extra="sqlite")
        file.check_place(path)  # before a key is made for it
        # The key is needed before the store is opened: it is that of the credential hashes too.
        keys = keys or (key_of(path),)
        self._codec = Codec(keys, seal_outcomes=seal_outcomes, extra="sqlite")
        self.credential_keys = self._codec.credential_keys
        self._loaded = asyncio.Event()
        self._names: dict[bytes, asyncio.Future[None]] = {}
        self._recent_calls = RecentCalls()
        self._tasks: set[asyncio.Task[Any]] = set()
        # Row numbers are unique within a run. After a restart numbers of deleted jobs may be reused:
        # nothing on disk refers to them.
        self._last_seq = 0
        self._complete = False  # all jobs on disk are known
        self._refused = False  # the disk had no room for the last job
        self._writer: Writer
        self._readers = Readers(self._connected)
        self._results = Results(self._readers, self._codec)
        self.read = self._results.read

    @property
    def _result_count(self) -> int:
        return self._results.count

    @property
    def _result_bytes(self) -> int:
        return self._results.bytes

    @asynccontextmanager
    async def opened(self, lost: Lost) -> AsyncIterator[None]:
        with ExitStack() as stack:
            stack.enter_context(file.locked(self._path))
            await asyncio.to_thread(file.prepared, self._path, self._codec)
            stack.enter_context(self._readers.running())
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
            self._results.count, self._results.bytes, self._last_seq = await self._readers.do(
                queries.count
            )
        except StoreUnavailable as error:
            raise StartupError(f"{self._path} cannot be used: {error.detail}") from error

    async def _load(self) -> None:
        """Take up the jobs that the process before us left, in their order."""
        after, taken = 0, 0
        while True:
            try:
                rows = await self._readers.do(partial(queries.live_after, after))
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
            found = await self._named(alias) if alias.reuse_existing else None
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
                raise StoreFull
        self._last_seq += 1
        self._live.add(job, size, seq=self._last_seq)
        await self._writer.do(
            partial(queries.insert, alias),
            partial(self._accepted, job, call),
            prepare=partial(self._row, self._last_seq, job, size, call),
            size=size,
        )

    def _row(self, seq: int, job: Job, size: int, call: Call) -> tuple[Any, ...]:
        return seq, job.id, size, self._codec.pack_job(job), self._codec.seal_call(call)

    def _accepted(self, job: Job, call: Call, error: Exception | None) -> None:
        self._refused = isinstance(error, StoreFull)
        if error is not None:
            self._live.drop(job.id)
            return
        self._recent_calls.add(job.id, call)
        self._live.enqueue(job)

    async def get(self, job_id: str) -> Job | Outcome | None:
        job = self._live.get(job_id)
        if job is not None:
            return job
        complete = self._complete
        outcome = await self._results.get(job_id)
        if outcome is None and not complete:  # it may be one that is still to be taken up
            await self._taken_up()
            if (job := self._live.get(job_id)) is not None:
                return job
            outcome = await self._results.get(job_id)  # it may have ended between the two looks
        return outcome if outcome and outcome.expires_at > self._clock() else None

    async def claim(self, upstream: str) -> Claim:
        while True:
            job = await self._live.claim(upstream)
            call = self._recent_calls.take(job.id)
            if call is not None:
                return Claim(job, call)
            try:
                seq = self._live.seq_of(job.id)
                return Claim(job, await self._readers.do(partial(self._call_of, seq)))
            except Unreadable as error:
                raise UnreadableCall(job) from error
            except asyncio.CancelledError:
                self._live.release(job, attempts=job.attempts)
                raise
            except StoreUnavailable as error:
                logger.warning("job %s cannot be read: %s", job.id, error.detail)
                self._live.release(job, attempts=job.attempts, delay_s=_RETRY_READ_S)

    def _call_of(self, seq: int | None, on: sqlite3.Connection) -> Call:
        sealed = queries.call_of(seq, on)
        if sealed is None:
            raise Unreadable("it is not there")
        return self._codec.open_call(sealed)

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
        was = before.attempts, before.calls, before.upstream
        if call is not None or (attempts, job.calls, job.upstream) != was:
            # On disk first: an attempt that was made counts, whatever happens to this process.
            seq = self._live.seq_of(job.id)
            update = partial(self._update, seq, kept, size)
            await self._writer.do(update, prepare=partial(self._sealed, call), size=size or 0)
        self._live.release(job, attempts=attempts, delay_s=delay_s, whole_lane=whole_lane, size=size)

    def _sealed(self, call: Call | None) -> bytes | None:
        return None if call is None else self._codec.seal_call(call)

    def _update(
        self, seq: int | None, job: Job, size: int | None, call: bytes | None, on: sqlite3.Connection
    ) -> None:
        """Write down how a job stands; with its ``size``, if its call is another one."""
        for (record,) in on.execute("SELECT record FROM jobs WHERE seq = ?", (seq,)).fetchall():
            updated = self._codec.update_job(record, job)
            on.execute("UPDATE jobs SET record = ? WHERE seq = ?", (updated, seq))
        if call is not None:
            on.execute("UPDATE jobs SET call = ?, size = ? WHERE seq = ?", (call, size, seq))

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        if not self._live.holds(job):
            return False
        return await self._writer.do(
            partial(
                queries.replace,
                self._live.seq_of(job.id),
                (outcome.id, outcome.expires_at, outcome.size),
            ),
            partial(self._finished, outcome),
            prepare=lambda: (self._codec.pack_outcome(outcome), self._codec.pack_parts(outcome)),
            size=outcome.size,
        )

    def _finished(self, outcome: Outcome, replaced: bool | Exception) -> None:  # noqa: FBT001  a step's result
        if replaced is not True:
            return
        self._live.drop(outcome.id)
        self._recent_calls.take(outcome.id)  # of one that ended without having been sent
        self._waiters.wake(outcome.id, self._results.added(outcome))

    async def delete(self, job_id: str) -> bool:
        await self._taken_up()
        waited = self._live.withdraw(job_id)  # not to be sent while it is being deleted
        return (
            await self._writer.do(
                partial(queries.remove, self._live.seq_of(job_id), job_id, self._clock()),
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
            self._recent_calls.take(job_id)
            self._waiters.wake(job_id, None)
        elif size is not None:
            self._results.removed([Gone(job_id, size)])

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        until = min(outcome.expires_at, self._clock() + within_s) if within_s else None
        await self._writer.do(
            partial(queries.retire, outcome.id, until), partial(self._retired, outcome, until)
        )

    def _retired(self, outcome: Outcome, until: float | None, retired: bool | Exception) -> None:  # noqa: FBT001
        if retired is not True:
            return
        if until is None:
            self._results.removed([Gone(outcome.id, outcome.size)])
        else:
            self._results.shortened(outcome, until)

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
        await space.give_back(self._writer.do, self._readers.do)

    async def _expire(self) -> None:
        gone = queries.ROWS
        while gone == queries.ROWS:
            expired = await self._writer.do(partial(queries.expire, self._clock()), self._on_expired)
            gone = len(expired)

    def _on_expired(self, expired: list[Gone] | Exception) -> None:
        if not isinstance(expired, Exception):
            self._results.removed(expired)

    async def _named(self, alias: Alias) -> Job | Outcome | None:
        """The job that an alias names, if there is one."""
        row = await self._readers.do(partial(queries.alias_of, alias.key))
        if row is None:
            return None
        fingerprint, job_id = row
        found = await self.get(job_id)
        if found is not None and fingerprint != alias.fingerprint:
            raise IdempotencyKeyReused
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


def _heard(done: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody waits for any more."""
    done.exception()
