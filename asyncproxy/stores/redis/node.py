"""This process as Redis sees it: its id, its keys, its connections, and its steps beside all jobs."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.stores.redis.address import Address
from asyncproxy.stores.redis.connection import LARGE, ConnectionManager
from asyncproxy.stores.redis.scripts import Scripts

__all__ = ["Node", "in_thread_if_large"]

logger = logging.getLogger(__name__)

_CONNECT_S: Final = 5.0

T = TypeVar("T")


class Node:
    """Runs scripts and commands.

    ``clock`` gives seconds since the epoch; without one the time is that of Redis. ``hear`` gets what
    other nodes say, ``restored`` is called when lost connections are there again. ``rng`` jitters.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        clock: Callable[[], float] | None,
        hear: Callable[[bytes], None],
        restored: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self.prefix = f"{{{prefix}}}:"
        self._id = secrets.token_hex(8)
        self._clock = clock
        self._scripts = Scripts()
        self.link = ConnectionManager(
            Address(url, connect_s=_CONNECT_S),
            key=self.prefix,
            channel=f"{self.prefix}node:{self._id}".encode(),
            prepare=self._scripts.load,
            hear=hear,
            restored=restored,
            rng=rng,
        )
        self.call = self.link.call
        self._tasks: set[asyncio.Task[Any]] = set()

    def job_key(self, job_id: str) -> str:
        """The key of a job's hash."""
        return f"{self.prefix}job:{job_id}"

    def parts_key(self, job_id: str) -> str:
        """The key of the parts of a result."""
        return f"{self.prefix}parts:{job_id}"

    async def run(self, script: str, *args: bytes | str | int, size: int = 0) -> Any:
        """Run a script. ``size`` is that of its arguments, if they may be large."""
        time_ms = "" if self._clock is None else round(self._clock() * 1000)
        return await self._scripts.run(
            self.call, script, self.prefix, time_ms, self._id, *args, size=size
        )

    def begin(self, step: Coroutine[Any, Any, object], name: str) -> None:
        """Take a step beside all others. What it cannot do is made up for later."""
        task = asyncio.create_task(self._quietly(step), name=f"asyncproxy-redis-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, step: Coroutine[Any, Any, object]) -> None:
        try:
            await step
        except StoreUnavailable as error:
            logger.debug("%s", error.detail or error)  # the connection has said so
        except Exception:
            logger.exception("an error inside the proxy, beside its jobs")

    async def settle(self) -> None:
        """Wait until all steps that were begun have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Cancel the steps that were begun."""
        for task in self._tasks:
            task.cancel()
        await self.settle()


async def in_thread_if_large(work: Callable[[Any], T], subject: object, size: int) -> T:
    """Seal or open something: off the event loop if it is large."""
    return await asyncio.to_thread(work, subject) if size > LARGE else work(subject)
