"""Claims jobs for the waiting workers of a node, many jobs with one script."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Final, NamedTuple, NoReturn

from asyncproxy.core.errors import StoreFull, StoreUnavailable
from asyncproxy.core.jobs import Job, Lane
from asyncproxy.stores.base import Claim, UnreadableCall
from asyncproxy.stores.codec import Codec, Unreadable
from asyncproxy.stores.redis.connection import LARGE
from asyncproxy.stores.redis.leases import Leases
from asyncproxy.stores.redis.node import Node, in_thread_if_large
from asyncproxy.stores.redis.positions import QueuePositions
from asyncproxy.stores.redis.records import Records, lane_name

__all__ = ["Claimed", "Claimer", "Claims"]

logger = logging.getLogger(__name__)

# The delay after a claim without a reply. A restored connection claims at once, but the connection need
# not have broken.
_AGAIN_S: Final = 1.0

# Bytes of calls in one reply, which one further call may pass: they are all in memory at once.
_MOST_CALL_BYTES: Final = 8 * 1024**2

# A job whose key a node lacks is left to the other nodes for this time. It fails after so many claims.
_WITHOUT_KEY_S: Final = 10.0
_CLAIMS_WITHOUT_KEY: Final = 30

# The reply of claim.lua to a node of an earlier schema.
_ONLY_NEWER_CLAIM: Final = -2


class Claimed(NamedTuple):
    """The result of one claim script."""

    jobs: list[Claim | UnreadableCall]
    due_s: float | None
    """Seconds until the next timer of the queue. None: there is no timer."""
    more: bool
    """Whether there are more jobs, which did not fit into the reply."""


class Claimer:
    """Hands claimed jobs to waiting workers.

    ``ask`` claims at most so many jobs. ``give_back`` releases a job that no worker waits for any more.
    """

    def __init__(
        self,
        ask: Callable[[int], Awaitable[Claimed]],
        give_back: Callable[[Claim | UnreadableCall], object],
    ) -> None:
        self._ask = ask
        self._give_back = give_back
        self._waiting: deque[asyncio.Future[Claim]] = deque()
        self._poked = asyncio.Event()
        self._quiet = asyncio.Event()  # no question is under way
        self._quiet.set()
        self._timer: asyncio.TimerHandle | None = None

    def poke(self) -> bool:
        """Claim again, if a worker waits for a job. False if none waits."""
        if self._count():
            self._poked.set()
        return bool(self._waiting)

    async def next(self) -> Claim:
        """Wait for the next job. May be cancelled. Raises :class:`UnreadableCall`."""
        given: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        self._poked.set()
        try:
            return await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                error = given.exception()
                if error is None:
                    self._hand(given.result())
                elif isinstance(error, UnreadableCall):
                    self._hand(error)
            raise

    async def run(self) -> NoReturn:
        """Claim whenever :meth:`poke` or :meth:`next` gives a reason to."""
        while True:
            await self._poked.wait()
            self._poked.clear()
            more = True
            while more and (count := self._count()):
                more = await self._ask_once(count)

    async def _ask_once(self, count: int) -> bool:
        """Claim once. Returns whether to claim again at once."""
        self._quiet.clear()
        try:
            claimed = await self._ask(count)
        except StoreUnavailable as error:
            logger.debug("no jobs can be claimed now: %s", error.detail or error)
            self._later(_AGAIN_S)
            return False
        except Exception as error:  # noqa: BLE001  those who wait get it
            self._fail(error)
            return False
        finally:
            self._quiet.set()
        for job in claimed.jobs:
            self._hand(job)
        if claimed.due_s is not None and not claimed.more:
            self._later(claimed.due_s)
        return claimed.more or len(claimed.jobs) == count

    def _count(self) -> int:
        """How many workers wait. Drops those that were cancelled."""
        self._waiting = deque(given for given in self._waiting if not given.done())
        return len(self._waiting)

    def _hand(self, job: Claim | UnreadableCall) -> None:
        while self._waiting:
            given = self._waiting.popleft()
            if given.done():
                continue
            if isinstance(job, UnreadableCall):
                given.set_exception(job)
            else:
                given.set_result(job)
            return
        self._give_back(job)

    def _fail(self, error: Exception) -> None:
        while self._waiting:
            given = self._waiting.popleft()
            if not given.done():
                given.set_exception(error)

    def _later(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.poke)

    async def close(self) -> None:
        """Claim no more. The jobs of a claim under way are given back, because no worker waits."""
        if self._timer is not None:
            self._timer.cancel()
        for given in self._waiting:
            given.cancel()
        await self._quiet.wait()
        await asyncio.sleep(0)  # the jobs of a reply are handed out in the next round of the loop


class Claims:
    """Claims the jobs of each upstream, and opens their calls.

    ``release`` gives a job back. ``max_bytes`` returns the limit of the store. ``may_take_over``
    returns whether the job of a lease that has run out may be claimed.
    """

    def __init__(
        self,
        node: Node,
        *,
        codec: Codec,
        leases: Leases,
        records: Records,
        positions: QueuePositions,
        lease_ms: int,
        release: Callable[[Job, float], Coroutine[Any, Any, None]],
        max_bytes: Callable[[], int],
        may_take_over: Callable[[], bool],
    ) -> None:
        self._node = node
        self._codec = codec
        self._leases = leases
        self._records = records
        self._positions = positions
        self._lease_ms = lease_ms
        self._release = release
        self._max_bytes = max_bytes
        self._may_take_over = may_take_over
        self._claimers: dict[str, Claimer] = {}
        self._loops: list[asyncio.Task[NoReturn]] = []
        self._rooms: dict[Lane, int] = {}  # how many more jobs of a lane this node may claim
        self._superseded = False
        self.served: set[str] = set()
        """The upstreams that this node claims for."""

    def __iter__(self) -> Iterator[str]:
        """The upstreams for which a worker of this node has claimed."""
        return iter(self._claimers)

    async def next(self, upstream: str) -> Claim:
        """Wait for the next job of an upstream. May be cancelled. Raises :class:`UnreadableCall`."""
        return await self._claimer(upstream).next()

    def poke(self, upstream: str) -> bool:
        """Claim again for an upstream. False if no worker waits for a job of it here."""
        claimer = self._claimers.get(upstream)
        return claimer is not None and claimer.poke()

    def poke_all(self) -> None:
        """Claim again for all upstreams."""
        for claimer in self._claimers.values():
            claimer.poke()

    def allow(self, lane: Lane, room: int | None) -> None:
        """See :meth:`Store.allow`."""
        if room is None:
            self._rooms.pop(lane, None)
        else:
            self._rooms[lane] = room
        if room != 0:
            self.poke(lane.upstream)

    def take(self, record: bytes, claims: int, attempts: bytes) -> Job | None:
        """Hold a claimed job from now on, and return it. None: its record cannot be read."""
        try:
            return self._leases.take(self._records.claimed(record, claims, attempts), record)
        except Unreadable as error:
            logger.error("a job that was claimed cannot be read: %s", error)  # noqa: TRY400  it is said
            return None

    async def settle(self) -> None:
        """Wait for the claims under way. Their jobs are given back."""
        for claimer in self._claimers.values():
            await claimer.close()

    async def close(self) -> None:
        """Claim no more."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    def _claimer(self, upstream: str) -> Claimer:
        claimer = self._claimers.get(upstream)
        if claimer is None:
            claimer = Claimer(
                lambda count: self._ask(upstream, count),
                lambda job: self._node.begin(self._give_back(job), "give-back"),
            )
            self._claimers[upstream] = claimer
            name = f"asyncproxy-redis-claims-{upstream}"
            self._loops.append(asyncio.create_task(claimer.run(), name=name))
        return claimer

    async def _ask(self, upstream: str, count: int) -> Claimed:
        due_ms, gone, more, *rows = await self._node.run(
            "claim", self._lease_ms, upstream, count, self._max_bytes(), _MOST_CALL_BYTES,
            int(self._may_take_over()), int(upstream not in self.served), LARGE,
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
        self.served.add(upstream)
        self._positions.note_gone(upstream, gone)
        jobs: list[Claim | UnreadableCall] = []
        for record, sealed, claims, attempts in rows:
            job = self.take(record, claims, attempts)
            if job is None:
                continue
            if job.lane in self._rooms:
                self._rooms[job.lane] = max(0, self._rooms[job.lane] - 1)
            try:
                claimed = await self._with_call(job, sealed)
            except Exception:
                logger.exception("a job that was claimed cannot be prepared, and its lease runs out")
                claimed = None  # and the others are handed out all the same
            if claimed is not None:
                jobs.append(claimed)
            else:
                self._leases.forget(job)
        return Claimed(jobs, due_ms / 1000 if due_ms >= 0 else None, bool(more))

    async def _with_call(self, job: Job, sealed: bytes) -> Claim | UnreadableCall | None:
        """A claimed job with its call. None: the call cannot be fetched or opened here."""
        try:
            if not sealed:  # a large call has to be fetched by itself
                key = self._node.job_key(job.id)
                fetched = await self._node.call("HGET", key, "c", size=LARGE + 1)
                if fetched is None:
                    return None  # deleted meanwhile
                sealed = fetched
            return Claim(job, await in_thread_if_large(self._codec.open_call, sealed, len(sealed)))
        except Unreadable:
            if job.claims >= _CLAIMS_WITHOUT_KEY:
                return UnreadableCall(job)
            # While keys are rotated, another node may have the key of the call.
            logger.warning("job %s was sealed with a key that this node does not have", job.id)
            self._node.begin(self._release(job, _WITHOUT_KEY_S), "without-key")
            return None
        except StoreUnavailable as error:
            logger.debug("job %s was claimed in vain: %s", job.id, error.detail or error)
            return None

    async def _give_back(self, claimed: Claim | UnreadableCall) -> None:
        """Release a job that no worker here waits for any more. If that fails, its lease runs out."""
        job = claimed.job
        try:
            await self._release(job, 0.0)
        except (StoreUnavailable, StoreFull) as error:
            self._leases.forget(job)
            logger.debug("job %s cannot be given back: %s", job.id, error.detail or error)
