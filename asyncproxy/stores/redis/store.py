"""The store in Redis: many proxies serve as one, and none of them is missed.

Each operation is one round trip, and one script where it changes anything (``scripts/``). What a node
keeps in memory are hints: who waits here for which job, which claims are to be renewed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

from asyncproxy.core.errors import (
    IdempotencyKeyReused,
    IllegalTransition,
    Overloaded,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
)
from asyncproxy.core.jobs import Call, Job, JobStatus, Lane, Outcome
from asyncproxy.stores.base import Alias, Claim, Limits, Lost, States, UnreadableCall, Usage
from asyncproxy.stores.codec import Codec, Unreadable
from asyncproxy.stores.fair_queue import QueuePosition
from asyncproxy.stores.parts import read_parts
from asyncproxy.stores.redis.address import Address
from asyncproxy.stores.redis.claims import Claimed, Claimer
from asyncproxy.stores.redis.connection import LARGE, ConnectionManager
from asyncproxy.stores.redis.leases import Leases
from asyncproxy.stores.redis.positions import QueuePositions
from asyncproxy.stores.redis.records import (
    FIELDS,
    LARGE_OUTCOME,
    OUTCOME,
    Records,
    is_large,
    lane_name,
    with_outcome,
)
from asyncproxy.stores.redis.schema import look_after, prepare_schema
from asyncproxy.stores.redis.scripts import Scripts
from asyncproxy.stores.waiters import Waiters

__all__ = ["RedisStore"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S: Final = 5.0
_CLOSE_S: Final = 2.0

# One answer to a claim holds no more of calls than this and one: what a node has in memory at once.
_MOST_CALL_BYTES: Final = 8 * 1024**2

# A job that a node has no key for is left to the others for so long, and fails after so many claims.
_WITHOUT_KEY_S: Final = 10.0
_CLAIMS_WITHOUT_KEY: Final = 30

# An upstream is nobody's when no node has served it for so many leases: a node with a newer
# configuration may have submitted jobs for it, and be about to come back. It is one lease if the last
# node to serve it was told to give it up: see orphans.lua.
_LEASES_TO_ORPHANS: Final = 4

# What claim.lua says to a node of an earlier schema.
_ONLY_NEWER_CLAIM: Final = -2

_RECHECK_AT_ONCE: Final = 100


class RedisStore:
    """See :class:`~asyncproxy.stores.base.Store`.

    ``keys`` and ``seal_outcomes`` are those of the :class:`Codec`. All keys in Redis begin with
    ``{prefix}:``. ``lease_s``: the jobs of a node that is silent for so long go to the others.
    ``clock`` gives seconds since the epoch; without one the time is that of Redis, so that the clocks
    of the nodes do not matter. ``monotonic`` paces, ``rng`` jitters.
    """

    survives = True

    def __init__(
        self,
        url: str,
        limits: Limits,
        *,
        keys: Sequence[bytes],
        seal_outcomes: bool,
        prefix: str,
        lease_s: float,
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._codec = Codec(keys, seal_outcomes=seal_outcomes, extra="redis")
        self.credential_keys = self._codec.credential_keys
        self.limits = limits
        self._prefix = f"{{{prefix}}}:"
        self._lease_s = lease_s
        self._lease_ms = math.ceil(lease_s * 1000)
        self._clock = clock
        self._monotonic = monotonic
        self._node = secrets.token_hex(8)
        self._scripts = Scripts()
        self._link = ConnectionManager(
            Address(url, connect_s=_CONNECT_S),
            key=self._prefix,
            channel=f"{self._prefix}node:{self._node}".encode(),
            prepare=self._scripts.load,
            hear=self._hear,
            restored=self._restored,
            rng=rng or random.Random(),  # noqa: S311  jitter
        )
        self._claimers: dict[str, Claimer] = {}
        self._served: set[str] = set()
        self._rooms: dict[Lane, int] = {}  # how many more jobs of a lane this node may claim
        self._unsure: dict[str, tuple[Outcome, str]] = {}  # outcomes whose finish got no reply
        self._waiters = Waiters()
        self._places = QueuePositions(monotonic)
        self._records = Records(self._codec, self._places, clock)
        self._leases = Leases(self._run, self._lease_ms)
        self._reconnected_at = -math.inf
        self._superseded = False
        self._loops: list[asyncio.Task[Any]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def opened(self, lost: Lost) -> AsyncIterator[None]:
        self._leases.lost = lost
        async with self._link.opened():
            await prepare_schema(self._link, self._run, self._prefix, self._codec)
            await look_after(self._link)
            loops = self._loops
            loops.append(asyncio.create_task(self._keep_leases(), name="asyncproxy-redis-leases"))
            try:
                yield
            finally:
                try:
                    async with asyncio.timeout(_CLOSE_S):
                        await self._leave()
                except TimeoutError:
                    logger.warning("jobs claimed last cannot be given back now: their leases run out")
                for task in [*loops, *self._tasks]:
                    task.cancel()
                await asyncio.gather(*loops, *self._tasks, return_exceptions=True)

    async def create(self, job: Job, call: Call, alias: Alias | None = None) -> Job | Outcome | None:
        sealed = await self._apart(self._codec.seal_call, call, call.size)
        claimer = self._claimers.get(job.upstream)
        # Whoever waits for a job here asks for it right behind, on the same connection. What is large
        # goes another way: the question would be there first.
        claims_next = claimer is not None and len(sealed) <= LARGE and claimer.poke()
        limits = self.limits
        reply = await self._run(
            "create", job.id, self._codec.pack_job(job), sealed, job.upstream, lane_name(job.lane),
            job.size + call.size, repr(job.created_at * 1000), limits.max_live,
            limits.max_live_per_credential, limits.max_bytes, int(claims_next),
            *_alias_arguments(alias),
            size=len(sealed),
        )  # fmt: skip
        match reply[0]:
            case 0:
                self._places.note_turn(job.id, reply[1])
                self._places.note_gone(job.upstream, reply[2])
                return None
            case 1:
                return await self._found(reply[1].decode(), reply[2:])
            case 2:
                raise IdempotencyKeyReused
            case 3:
                raise TooManyJobs(limits.max_live_per_credential)
            case 4:
                raise Overloaded
            case _:
                raise StoreFull

    async def get(self, job_id: str) -> Job | Outcome | None:
        return await self._found(job_id, await self._link.call("HMGET", self._key(job_id), *FIELDS))

    async def claim(self, upstream: str) -> Claim:
        return await self._claimer(upstream).next()

    async def release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        call: Call | None = None,
    ) -> None:
        sealed = b"" if call is None else await self._apart(self._codec.seal_call, call, call.size)
        claimer = self._claimers.get(job.upstream)
        claims_next = claimer is not None and len(sealed) <= LARGE and claimer.poke()
        held = self._leases.held(job)
        if held is None:  # the claim was lost, and nothing will be written
            record = self._codec.pack_job(job)
        else:
            record = b"" if job == held.job else self._codec.update_job(held.record, job)
        released = await self._run(
            "release", job.id, job.claims, attempts, math.ceil(delay_s * 1000), int(whole_lane),
            int(claims_next), job.upstream, lane_name(job.lane), record, sealed,
            0 if call is None else job.size + call.size,
            size=len(sealed),
        )  # fmt: skip
        self._leases.forget(job)
        if released and delay_s:
            self._places.hold_back(job.lane if whole_lane else job.id, delay_s)

    async def pause(self, lane: Lane, delay_s: float) -> None:
        await self._run("pause", lane.upstream, lane_name(lane), math.ceil(delay_s * 1000))
        self._places.hold_back(lane, delay_s)
        if (claimer := self._claimers.get(lane.upstream)) is not None:
            claimer.poke()  # whoever waits has to know of its end

    def allow(self, lane: Lane, room: int | None) -> None:
        if room is None:
            self._rooms.pop(lane, None)
        else:
            self._rooms[lane] = room
        if room != 0 and (claimer := self._claimers.get(lane.upstream)) is not None:
            claimer.poke()

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        data, *parts = await self._apart(self._packed, outcome, outcome.size)
        lifetime_ms = math.ceil((outcome.expires_at - (self._clock or time.time)()) * 1000)
        # A finish whose reply was lost may have been recorded. Its repetition has the same token, and
        # is told so; the finish of another has not.
        sent, token = self._unsure.get(job.id, (None, ""))
        if sent is not outcome:
            token = secrets.token_hex(8)
        self._unsure[job.id] = (outcome, token)
        recorded = await self._run(
            "finish", job.id, job.claims, token, data, outcome.size, lifetime_ms,
            LARGE_OUTCOME if len(data) > LARGE else OUTCOME, *parts,
            size=sum(map(len, (data, *parts))),
        )  # fmt: skip
        self._unsure.pop(job.id, None)
        if recorded < 0:
            raise IllegalTransition(f"job {job.id} is {JobStatus.PENDING.value}")
        self._leases.forget(job)
        if recorded:
            self._waiters.wake(job.id, outcome)
        return bool(recorded)

    def _packed(self, outcome: Outcome) -> list[bytes]:
        return [self._codec.pack_outcome(outcome), *self._codec.pack_parts(outcome)]

    async def read(self, outcome: Outcome, start: int = 0) -> AsyncIterator[bytes]:
        async for piece in read_parts(outcome, start, partial(self._part, outcome.id)):
            yield piece

    async def _part(self, job_id: str, number: int) -> bytes | None:
        """A part of a result."""
        data = await self._link.call("HGET", f"{self._prefix}parts:{job_id}", number, size=LARGE + 1)
        return None if data is None else self._codec.unpack_part(data)

    async def delete(self, job_id: str) -> bool:
        deleted = await self._run("delete", job_id)
        self._leases.drop(job_id)
        if deleted:
            self._waiters.wake(job_id, None)
        return bool(deleted)

    async def claim_overdue(self, created_before: float) -> list[Job]:
        rows = await self._run("overdue", self._lease_ms, repr(created_before * 1000))
        return [job for row in rows if (job := self._taken(*row)) is not None]

    async def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        given_up = self._served.difference(upstreams)
        patience_ms = _LEASES_TO_ORPHANS * self._lease_ms
        rows, waits = await self._run(
            "orphans", self._lease_ms, patience_ms, len(given_up), *given_up, *upstreams
        )
        self._served -= given_up
        unserved = zip(waits[::2], waits[1::2], strict=True)
        self._places.note_unserved((name.decode(), ms / 1000) for name, ms in unserved)
        return [job for row in rows if (job := self._taken(*row)) is not None]

    async def wait(self, job_id: str, timeout_s: float) -> Job | Outcome | None:
        # Here first, then in Redis: the message may come before the reply is looked at.
        with self._waiters.waiting(job_id) as woken:
            found = await self._found(job_id, await self._run("wait", job_id))
            if not isinstance(found, Job):
                return found
            try:
                async with asyncio.timeout(timeout_s):
                    return await woken
            except TimeoutError:
                pass
        return await self.get(job_id)

    def release_waiters(self) -> None:
        self._waiters.release()

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        await self._run("retire", outcome.id, math.ceil(within_s * 1000))

    def position(self, job: Job) -> QueuePosition | None:
        return self._places.of(job)

    async def usage(self) -> Usage:
        live, _, results, size = await self._run("usage")
        return Usage(live, results, size)

    async def states(self) -> States:
        live, processing, _, _ = await self._run("usage")
        return States(live - processing, processing)

    async def check(self) -> None:
        await self._link.call("PING")

    async def tick(self) -> None:
        upstreams = list(self._claimers)
        gone = await self._run("tick", int(self._may_take_over()), *upstreams)
        for upstream, count in zip(upstreams, gone, strict=True):
            self._places.note_gone(upstream, count)
        self._places.tidy()
        for claimer in self._claimers.values():
            claimer.poke()

    async def renew(self) -> None:
        """Renew the leases of all jobs that are claimed here, and hear which are lost."""
        await self._leases.renew(self._served)

    async def _found(self, job_id: str, fields: Sequence[Any]) -> Job | Outcome | None:
        """A job from its fields, and one more where the outcome is large."""
        if is_large(fields):
            data = await self._link.call("HGET", self._key(job_id), LARGE_OUTCOME, size=LARGE + 1)
            if data is None:
                return None  # it has expired meanwhile
            fields = with_outcome(fields, data)
        return self._records.found(job_id, fields)

    async def _leave(self) -> None:
        """Let the questions under way end, and give back what they bring."""
        for claimer in self._claimers.values():
            await claimer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _key(self, job_id: str) -> str:
        return f"{self._prefix}job:{job_id}"

    async def _run(self, script: str, *args: bytes | str | int, size: int = 0) -> Any:
        time_ms = "" if self._clock is None else round(self._clock() * 1000)
        return await self._scripts.run(
            self._link.call, script, self._prefix, time_ms, self._node, *args, size=size
        )

    def _claimer(self, upstream: str) -> Claimer:
        claimer = self._claimers.get(upstream)
        if claimer is None:
            claimer = Claimer(
                lambda count: self._ask(upstream, count),
                lambda job: self._begin(self._give_back(job), "give-back"),
            )
            self._claimers[upstream] = claimer
            self._loops.append(
                asyncio.create_task(claimer.run(), name=f"asyncproxy-redis-claims-{upstream}")
            )
        return claimer

    async def _ask(self, upstream: str, count: int) -> Claimed:
        due_ms, gone, more, *rows = await self._run(
            "claim", self._lease_ms, upstream, count, self.limits.max_bytes, _MOST_CALL_BYTES,
            int(self._may_take_over()), int(upstream not in self._served), LARGE,
            *(part for lane, room in self._rooms.items() if lane.upstream == upstream
              for part in (lane_name(lane), room)),
        )  # fmt: skip
        if due_ms == _ONLY_NEWER_CLAIM:
            if not self._superseded:
                logger.warning(
                    "a newer version of asyncproxy uses this Redis: this process claims no more jobs. "
                    "Bring it up to date"
                )
            self._superseded = True
            return Claimed([], None, more=False)
        self._served.add(upstream)
        self._places.note_gone(upstream, gone)
        jobs: list[Claim | UnreadableCall] = []
        for record, sealed, claims, attempts in rows:
            job = self._taken(record, claims, attempts)
            if job is not None and job.lane in self._rooms:
                self._rooms[job.lane] = max(0, self._rooms[job.lane] - 1)
            try:
                claimed = None if job is None else await self._with_call(job, sealed)
            except Exception:
                logger.exception("a job that was claimed cannot be prepared, and its lease runs out")
                claimed = None  # and the others are handed out all the same
            if claimed is not None:
                jobs.append(claimed)
            elif job is not None:
                self._leases.forget(job)
        return Claimed(jobs, due_ms / 1000 if due_ms >= 0 else None, bool(more))

    def _taken(self, record: bytes, claims: int, attempts: bytes) -> Job | None:
        """A job that was claimed, held from now on. None: it cannot even be read, and is not held."""
        try:
            return self._leases.take(self._records.claimed(record, claims, attempts), record)
        except Unreadable as error:
            logger.error("a job that was claimed cannot be read: %s", error)  # noqa: TRY400  it is said
            return None

    async def _with_call(self, job: Job, sealed: bytes) -> Claim | UnreadableCall | None:
        """A claimed job with what to send. None: it is out of reach, its lease will run out."""
        try:
            if not sealed:  # it is large, and has to be fetched
                fetched = await self._link.call("HGET", self._key(job.id), "c", size=LARGE + 1)
                if fetched is None:
                    return None  # deleted meanwhile
                sealed = fetched
            return Claim(job, await self._apart(self._codec.open_call, sealed, len(sealed)))
        except Unreadable:
            if job.claims >= _CLAIMS_WITHOUT_KEY:
                return UnreadableCall(job)
            # While keys are being rotated another node may have the one it is sealed with.
            logger.warning("job %s was sealed with a key that this node does not have", job.id)
            await self._quietly(self.release(job, attempts=job.attempts, delay_s=_WITHOUT_KEY_S))
            return None
        except StoreUnavailable as error:
            logger.debug("job %s was claimed in vain: %s", job.id, error.detail or error)
            return None

    async def _give_back(self, claimed: Claim | UnreadableCall) -> None:
        """Release a job that nobody here waits for any more. If that fails, its lease runs out."""
        job = claimed.job
        try:
            await self.release(job, attempts=job.attempts)
        except (StoreUnavailable, StoreFull) as error:
            self._leases.forget(job)
            logger.debug("job %s cannot be given back: %s", job.id, error.detail or error)

    def _hear(self, message: bytes) -> None:
        """What another node says: w upstream, f job, d job, l job."""
        what, name = message[:1], message[1:].decode()
        if what == b"w":
            claimer = self._claimers.get(name)
            if claimer is None or not claimer.poke():
                self._begin(self._quietly(self._run("wake", name)), "pass-on")
        elif what == b"f":
            self._begin(self._quietly(self._recheck(name)), "wake")
        elif what == b"d":
            self._waiters.wake(name, None)
        elif what == b"l":
            self._leases.lose(name)

    async def _recheck(self, job_id: str) -> None:
        """Look at a job for those who wait for it here, and say again that they do if it is alive."""
        if job_id in self._waiters:
            found = await self._found(job_id, await self._run("wait", job_id))
            if not isinstance(found, Job):
                self._waiters.wake(job_id, found)

    def _restored(self) -> None:
        """Redis is back: whatever was said meanwhile was not heard."""
        # While it was away no lease was renewed, and those of the others lapse with ours. They get the
        # time of a lease to say that they live, or else every call under way would be made again.
        self._reconnected_at = self._monotonic()
        self._begin(self._quietly(self.renew()), "renew")
        for claimer in self._claimers.values():
            claimer.poke()
        self._begin(self._recheck_all(), "recheck")

    async def _recheck_all(self) -> None:
        waited = list(self._waiters)
        for start in range(0, len(waited), _RECHECK_AT_ONCE):
            some = waited[start : start + _RECHECK_AT_ONCE]
            await asyncio.gather(*(self._quietly(self._recheck(job_id)) for job_id in some))

    def _may_take_over(self) -> bool:
        return self._monotonic() - self._reconnected_at >= self._lease_s

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            await self._quietly(self.renew())

    async def _quietly(self, step: Coroutine[Any, Any, object]) -> None:
        """Take a step that is made up for later if it fails."""
        try:
            await step
        except StoreUnavailable as error:
            logger.debug("%s", error.detail or error)  # the link has said so
        except Exception:
            logger.exception("an error inside the proxy, beside its jobs")

    def _begin(self, step: Coroutine[Any, Any, object], name: str) -> None:
        task = asyncio.create_task(step, name=f"asyncproxy-redis-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _apart(work: Callable[[Any], T], subject: object, size: int) -> T:
        return await asyncio.to_thread(work, subject) if size > LARGE else work(subject)


def _alias_arguments(alias: Alias | None) -> tuple[str, str, int, int]:
    if alias is None:
        return "", "", 0, 0
    flags = int(alias.reuse_existing), int(alias.single_use)
    return alias.key.hex(), alias.fingerprint.hex(), *flags
