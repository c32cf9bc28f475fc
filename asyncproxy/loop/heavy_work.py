"""Heavy work on the event loop, one piece at a time: what is beside it waits for one, not for all."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from time import monotonic
from typing import Final, TypeVar

from asyncproxy.wire.steps import Steps

__all__ = ["HEAVY_BYTES", "HeavyWork"]

# Checking and copying an answer of this size takes some 0.2 ms, and cannot be interrupted.
HEAVY_BYTES: Final = 256 * 1024

# So many rounds of the loop a request takes: it is read, its handler begins, its handler is done.
_ROUNDS_BETWEEN: Final = 3

# As much time for other things is enough between two turns: when there is so much to do that rounds are
# long, heavy work gets its share too.
_ENOUGH_S: Final = 0.002


T = TypeVar("T")


class HeavyWork:
    """Gives out turns on the loop, with some rounds of it between each two.

    Large answers that arrive together would all be checked in one round, and a poll wait for all of
    them in each of the rounds that it takes.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next(self) -> None:
        """Wait for a turn, first come, first served. It lasts until the caller awaits anything else."""
        loop = asyncio.get_running_loop()
        if self._taken:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn
        else:
            self._taken = True
            loop.call_soon(self._pass, loop, _ROUNDS_BETWEEN)

    async def run(self, steps: Steps[T]) -> T:
        """The result of ``steps``: the first at once, each further one in a turn of its own.

        Raises what the steps raise.
        """
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            await self.next()

    def _pass(self, loop: asyncio.AbstractEventLoop, rounds: int, enough_at: float = math.inf) -> None:
        now = monotonic()
        if rounds and now < enough_at:
            enough_at = min(enough_at, now + _ENOUGH_S)  # from the first call on: the turn is over then
            loop.call_soon(self._pass, loop, rounds - 1, enough_at)
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # it may have been cancelled
                turn.set_result(None)
                loop.call_soon(self._pass, loop, _ROUNDS_BETWEEN)
                return
        self._taken = False
