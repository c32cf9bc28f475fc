"""One process that uses Redis: its id, its keys, its connections, and its background steps."""

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

    ``clock`` returns seconds since the epoch; without it scripts use the time of Redis. ``hear`` gets
    the messages of other nodes. ``restored`` is called when lost connections are open again. ``rng``
    adds jitter.
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
        """Run a script. ``size`` is the size of its arguments in bytes, if they may be large."""
        time_ms = "" if self._clock is None else round(self._clock() * 1000)
        return await self._scripts.run(
            self.call, script, self.prefix, time_ms, self._id, *args, size=size
        )

    def begin(self, step: Coroutine[Any, Any, object], name: str) -> None:
        """Run a step in the background. A failure is only logged: a later step makes up for it."""
        task = asyncio.create_task(self._quietly(step), name=f"asyncproxy-redis-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, step: Coroutine[Any, Any, object]) -> None:
        try:
            await step
        except StoreUnavailable as error:
            logger.debug("%s", error.detail or error)  # the connection has already logged a warning
        except Exception:
            logger.exception("an error inside the proxy, beside its jobs")

    async def settle(self) -> None:
        """Wait until all background steps have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Cancel all background steps."""
        for task in self._tasks:
            task.cancel()
        await self.settle()


async def in_thread_if_large(work: Callable[[Any], T], subject: object, size: int) -> T:
    """Run ``work`` on ``subject``, in a thread if ``size`` is large. For sealing and opening."""
    return await asyncio.to_thread(work, subject) if size > LARGE else work(subject)
