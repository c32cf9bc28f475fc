"""How late the event loop runs. Every task waits for as long, and no other metric shows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["measuring_lag"]

_INTERVAL_S = 0.25


@asynccontextmanager
async def measuring_lag(
    note: Callable[[float], None], *, interval_s: float = _INTERVAL_S
) -> AsyncIterator[None]:
    """For the length of a ``with``, call ``note`` once per interval with a timer's delay in seconds."""
    task = asyncio.create_task(_measure(note, interval_s), name="asyncproxy-lag")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _measure(note: Callable[[float], None], interval_s: float) -> None:
    now = asyncio.get_running_loop().time
    while True:
        due = now() + interval_s
        await asyncio.sleep(interval_s)
        note(max(0.0, now() - due))
