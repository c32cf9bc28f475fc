"""Heavy work on the event loop, one step at a time: other tasks wait for one step, not for all."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from time import monotonic
from typing import Final, TypeVar

from asyncproxy.wire.steps import Steps

__all__ = ["HEAVY_BYTES", "HeavyWork"]

# Checking and copying a response of this size takes some 0.2 ms, and cannot be interrupted.
HEAVY_BYTES: Final = 256 * 1024

# Rounds of the loop between two turns. A request takes three: it is read, its handler begins, its
# handler ends.
_ROUNDS_BETWEEN: Final = 3

# Time between two turns after which the next turn begins anyway. On a busy loop rounds are long, and
# heavy work must get its share too.
_ENOUGH_S: Final = 0.002


T = TypeVar("T")


class HeavyWork:
    """Gives out turns for heavy work, with some rounds of the loop between two turns.

    Without turns, large responses that arrive together would all be checked in one round, and a poll
    would wait for all of them in each of its rounds.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next(self) -> None:
        """Wait for a turn, first come, first served. The turn ends when the caller awaits again."""
        loop = asyncio.get_running_loop()
        if self._taken:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn
        else:
            self._taken = True
            loop.call_soon(self._pass, loop, _ROUNDS_BETWEEN)

    async def run(self, steps: Steps[T]) -> T:
        """Run ``steps`` and return their result. The first step runs at once, each other one in a turn.

        Raises the errors of the steps.
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
            enough_at = min(enough_at, now + _ENOUGH_S)  # the turn is over at the first call
            loop.call_soon(self._pass, loop, rounds - 1, enough_at)
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # the waiting task may have been cancelled
                turn.set_result(None)
                loop.call_soon(self._pass, loop, _ROUNDS_BETWEEN)
                return
        self._taken = False
