"""The store in Redis: many proxies serve as one, and any of them may die.

Each operation is one round trip. An operation that changes anything is one script (``lua/``). A node
keeps only hints in memory: the clients that wait here, and the claims to renew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

from asyncproxy.core.errors import (
    IdempotencyKeyReused,
    IllegalTransition,
    Overloaded,
    StoreFull,
    TooManyJobs,
)
from asyncproxy.core.jobs import Call, Job, JobStatus, Lane, Outcome
from asyncproxy.stores.base import Alias, Limits, Lost, States, Usage
from asyncproxy.stores.codec import Codec
from asyncproxy.stores.parts import read_parts
from asyncproxy.stores.redis.claims import Claims
from asyncproxy.stores.redis.connection import LARGE
from asyncproxy.stores.redis.leases import Leases
from asyncproxy.stores.redis.node import Node, in_thread_if_large
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
from asyncproxy.stores.waiters import Waiters

__all__ = ["RedisStore"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S: Final = 5.0
_CLOSE_S: Final = 2.0

# An upstream's jobs are orphans when no node has served the upstream for so many leases: a node with a
# newer configuration may be about to come back. After one lease, if the last node to serve the upstream
# was told to give it up: see orphans.lua.
_LEASES_TO_ORPHANS: Final = 4

_RECHECK_AT_ONCE: Final = 100


class RedisStore:
    """See :class:`~asyncproxy.stores.base.Store`.

    ``keys`` and ``seal_outcomes`` are for the :class:`Codec`. All keys in Redis begin with
    ``{prefix}:``. If a node is silent for ``lease_s``, other nodes take its jobs. ``clock`` returns
    seconds since the epoch; without it scripts use the time of Redis, so the clocks of the nodes do not
    matter. ``monotonic`` times delays, ``rng`` adds jitter.
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
        self._lease_s = lease_s
        self._lease_ms = math.ceil(lease_s * 1000)
        self._clock = clock
        self._monotonic = monotonic
        self._node = Node(
            url,
            prefix=prefix,
            clock=clock,
            hear=self._hear,
            restored=self._restored,
            rng=rng or random.Random(),  # noqa: S311  jitter
        )
        self._run = self._node.run
        self._unsure: dict[str, tuple[Outcome, str]] = {}  # outcomes whose finish got no reply
        self._waiters = Waiters()
        self._positions = QueuePositions(monotonic)
        self._records = Records(self._codec, self._positions, clock)
        self._leases = Leases(self._run, self._lease_ms)
        self._claims = Claims(
            self._node,
            codec=self._codec,
            leases=self._leases,
            records=self._records,
            positions=self._positions,
            lease_ms=self._lease_ms,
            release=self._release,
            max_bytes=lambda: self.limits.max_bytes,
            may_take_over=self._may_take_over,
        )
        self.allow = self._claims.allow
        self.claim = self._claims.next
        self.position = self._positions.of
        self.release_waiters = self._waiters.release
        self._reconnected_at = -math.inf

    @asynccontextmanager
    async def opened(self, lost: Lost) -> AsyncIterator[None]:
        self._leases.lost = lost
        node = self._node
        async with node.link.opened():
            await prepare_schema(node.link, self._run, node.prefix, self._codec)
            await look_after(node.link)
            renewing = asyncio.create_task(self._keep_leases(), name="asyncproxy-redis-leases")
            try:
                yield
            finally:
                try:
                    async with asyncio.timeout(_CLOSE_S):
                        await self._claims.settle()
                        await node.settle()
                except TimeoutError:
                    logger.warning("jobs claimed last cannot be given back now: their leases run out")
                renewing.cancel()
                await asyncio.gather(renewing, return_exceptions=True)
                await self._claims.close()
                await node.close()

    async def create(self, job: Job, call: Call, alias: Alias | None = None) -> Job | Outcome | None:
        sealed = await in_thread_if_large(self._codec.seal_call, call, call.size)
        # A worker that waits here claims right after this script, on the same connection. A large call
        # goes over another connection, so the claim would arrive before it.
        claims_next = len(sealed) <= LARGE and self._claims.poke(job.upstream)
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
                self._positions.note_turn(job.id, reply[1])
                self._positions.note_gone(job.upstream, reply[2])
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
        return await self._found(
            job_id, await self._node.call("HMGET", self._node.job_key(job_id), *FIELDS)
        )

    async def release(
        self,
        job: Job,
        *,
        attempts: int,
        delay_s: float = 0.0,
        whole_lane: bool = False,
        call: Call | None = None,
    ) -> None:
        sealed = (
            b"" if call is None else await in_thread_if_large(self._codec.seal_call, call, call.size)
        )
        claims_next = len(sealed) <= LARGE and self._claims.poke(job.upstream)
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
            self._positions.hold_back(job.lane if whole_lane else job.id, delay_s)

    async def pause(self, lane: Lane, delay_s: float) -> None:
        await self._run("pause", lane.upstream, lane_name(lane), math.ceil(delay_s * 1000))
        self._positions.hold_back(lane, delay_s)
        self._claims.poke(lane.upstream)  # a waiting worker needs a timer for the end of the pause

    async def finish(self, job: Job, outcome: Outcome) -> bool:
        data, *parts = await in_thread_if_large(self._packed, outcome, outcome.size)
        lifetime_ms = math.ceil((outcome.expires_at - (self._clock or time.time)()) * 1000)
        # A finish whose reply was lost may have been recorded. The same finish sent again has the same
        # token, and is told that it was recorded. The finish of another node has another token.
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
        data = await self._node.call("HGET", self._node.parts_key(job_id), number, size=LARGE + 1)
        return None if data is None else self._codec.unpack_part(data)

    async def delete(self, job_id: str) -> bool:
        deleted = await self._run("delete", job_id)
        self._leases.drop(job_id)
        if deleted:
            self._waiters.wake(job_id, None)
        return bool(deleted)

    async def claim_overdue(self, created_before: float) -> list[Job]:
        rows = await self._run("overdue", self._lease_ms, repr(created_before * 1000))
        return [job for row in rows if (job := self._claims.take(*row)) is not None]

    async def claim_orphans(self, upstreams: Collection[str]) -> list[Job]:
        given_up = self._claims.served.difference(upstreams)
        patience_ms = _LEASES_TO_ORPHANS * self._lease_ms
        rows, waits = await self._run(
            "orphans", self._lease_ms, patience_ms, len(given_up), *given_up, *upstreams
        )
        self._claims.served -= given_up
        unserved = zip(waits[::2], waits[1::2], strict=True)
        self._positions.note_unserved((name.decode(), ms / 1000) for name, ms in unserved)
        return [job for row in rows if (job := self._claims.take(*row)) is not None]

    async def wait(self, job_id: str, timeout_s: float) -> Job | Outcome | None:
        # Register here first, then in Redis: the message may arrive before the reply is read.
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

    async def retire(self, outcome: Outcome, within_s: float) -> None:
        await self._run("retire", outcome.id, math.ceil(within_s * 1000))

    async def usage(self) -> Usage:
        live, _, results, size = await self._run("usage")
        return Usage(live, results, size)

    async def states(self) -> States:
        live, processing, _, _ = await self._run("usage")
        return States(live - processing, processing)

    async def check(self) -> None:
        await self._node.call("PING")

    async def tick(self) -> None:
        upstreams = list(self._claims)
        gone = await self._run("tick", int(self._may_take_over()), *upstreams)
        for upstream, count in zip(upstreams, gone, strict=True):
            self._positions.note_gone(upstream, count)
        self._positions.tidy()
        self._claims.poke_all()

    async def renew(self) -> None:
        """Renew the leases of all jobs that are claimed here, and drop the claims that are lost."""
        await self._leases.renew(self._claims.served)

    async def _found(self, job_id: str, fields: Sequence[Any]) -> Job | Outcome | None:
        """A job from its fields. A large outcome is fetched by itself."""
        if is_large(fields):
            data = await self._node.call(
                "HGET", self._node.job_key(job_id), LARGE_OUTCOME, size=LARGE + 1
            )
            if data is None:
                return None  # the result has expired meanwhile
            fields = with_outcome(fields, data)
        return self._records.found(job_id, fields)

    def _hear(self, message: bytes) -> None:
        """Handle the message of a node: (w)ork for an upstream, a job (f)inished, (d)eleted, (l)ost."""
        what, name = message[:1], message[1:].decode()
        if what == b"w":
            if not self._claims.poke(name):
                self._node.begin(self._run("wake", name), "pass-on")
        elif what == b"f":
            self._node.begin(self._recheck(name), "wake")
        elif what == b"d":
            self._waiters.wake(name, None)
        elif what == b"l":
            self._leases.lose(name)

    async def _recheck(self, job_id: str) -> None:
        """Read a job for the clients that wait here, and register their wait again if it is live."""
        if job_id in self._waiters:
            found = await self._found(job_id, await self._run("wait", job_id))
            if not isinstance(found, Job):
                self._waiters.wake(job_id, found)

    def _restored(self) -> None:
        """Catch up after an outage of Redis, whose messages were lost."""
        # During the outage no node could renew its leases. The other nodes get the time of a lease to
        # renew theirs. Otherwise every call under way would be made again.
        self._reconnected_at = self._monotonic()
        self._node.begin(self.renew(), "renew")
        self._claims.poke_all()
        self._node.begin(self._recheck_all(), "recheck")

    async def _recheck_all(self) -> None:
        waited = list(self._waiters)
        for start in range(0, len(waited), _RECHECK_AT_ONCE):
            some = waited[start : start + _RECHECK_AT_ONCE]
            await asyncio.gather(*map(self._recheck, some))

    def _may_take_over(self) -> bool:
        return self._monotonic() - self._reconnected_at >= self._lease_s

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            self._node.begin(self.renew(), "renew")

    async def _release(self, job: Job, delay_s: float) -> None:
        await self.release(job, attempts=job.attempts, delay_s=delay_s)


def _alias_arguments(alias: Alias | None) -> tuple[str, str, int, int]:
    if alias is None:
        return "", "", 0, 0
    flags = int(alias.reuse_existing), int(alias.single_use)
    return alias.key.hex(), alias.fingerprint.hex(), *flags
