"""Claims jobs of one upstream for all workers of a node that wait for one: many with one question."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, NoReturn

from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.stores.base import Claim, UnreadableCall

__all__ = ["Claimed", "Claimer"]

logger = logging.getLogger(__name__)

# When the store did not answer a question: it says when it is back, but it need not have been away.
_AGAIN_S: Final = 1.0


class Claimed(NamedTuple):
    """What one question brought: ``due_s`` until something is due, None if nothing is known to be.

    ``more``: there is more, it was only enough for one answer.
    """

    jobs: list[Claim | UnreadableCall]
    due_s: float | None
    more: bool


class Claimer:
    """``ask`` claims so many jobs at the most; ``give_back`` takes one that nobody waits for now."""

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
        """Ask again, if anybody waits for a job. False if nobody does."""
        if self._count():
            self._poked.set()
        return bool(self._waiting)

    async def next(self) -> Claim:
        """The next job, as soon as there is one. Safe to cancel. Raises :class:`UnreadableCall`."""
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
        """Ask whenever there is a reason to."""
        while True:
            await self._poked.wait()
            self._poked.clear()
            more = True
            while more and (count := self._count()):
                more = await self._ask_once(count)

    async def _ask_once(self, count: int) -> bool:
        """Whether to ask again at once."""
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
        """How many wait. Those who have left are forgotten."""
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
        """Ask no more. What a question under way brings is given back: nobody waits for it any more."""
        if self._timer is not None:
            self._timer.cancel()
        for given in self._waiting:
            given.cancel()
        await self._quiet.wait()
        await asyncio.sleep(0)  # the answer is handed out in the turn after it came
