"""The connections of a node to Redis: opens them, and reopens them whenever they break."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

from redis.asyncio.connection import Connection
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from asyncproxy.core.errors import StartupError, StoreFull, StoreUnavailable
from asyncproxy.stores.redis.address import Address
from asyncproxy.stores.redis.pipelined import PipelinedConnection

__all__ = ["LARGE", "ConnectionManager"]

logger = logging.getLogger(__name__)

# Larger commands and replies have a connection of their own, so that small ones need not wait for them.
LARGE: Final = 256 * 1024

_CONNECT_S: Final = 5.0
_TIMEOUT_S: Final = 10.0
_LARGE_TIMEOUT_S: Final = 60.0
_PING_S: Final = 5.0

_FIRST_RETRY_S: Final = 0.05
_LONGEST_RETRY_S: Final = 2.0

# Errors of a Redis that cannot run a command now but may later. Some have no class: see _LATER_WORDS.
_LATER: Final = (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    TryAgainError,
)
# An error of a command within a script arrives as an error of the script.
_LATER_WORDS: Final = ("BUSY ", "MISCONF ", "NOREPLICAS ", "can't run this command", "Script killed")

# Errors of a server that no longer has the jobs.
_ELSEWHERE: Final = (MovedError, ReadOnlyError)

Call = Callable[..., Awaitable[Any]]


class _Lines:
    """Three connections that live and die together: two for commands, and one that listens."""

    def __init__(self, connections: list[Connection]) -> None:
        small, large, self._ear = connections
        self.small = PipelinedConnection(small, timeout_s=_TIMEOUT_S)
        self.large = PipelinedConnection(large, timeout_s=_LARGE_TIMEOUT_S)
        loop = asyncio.get_running_loop()
        self._cut: asyncio.Future[Exception] = loop.create_future()
        self.listening: asyncio.Future[None] = loop.create_future()

    def cut(self, reason: Exception) -> None:
        """Break the connections now."""
        if not self._cut.done():
            self._cut.set_result(reason)

    async def run(self, channel: bytes, hear: Callable[[bytes], object]) -> Exception:
        """Run until one of the connections breaks, and return the reason."""
        parts: list[asyncio.Task[Exception]] = [
            asyncio.create_task(self.small.run()),
            asyncio.create_task(self.large.run()),
            asyncio.create_task(self._listen(channel, hear)),
            asyncio.create_task(self._ping()),
        ]
        try:
            ends: list[asyncio.Future[Exception]] = [*parts, self._cut]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            first = done.pop()
            error = first.exception()
            return error if isinstance(error, Exception) else first.result()
        finally:
            self.listening.cancel()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await self._ear.disconnect(nowait=True)

    async def _listen(self, channel: bytes, hear: Callable[[bytes], object]) -> NoReturn:
        await self._ear.send_command("SUBSCRIBE", channel, check_health=False)
        while True:
            async with asyncio.timeout(3 * _PING_S):  # a pong arrives in this time
                message: Any = await self._ear.read_response(disable_decoding=True)
            if message[0] == b"message":
                hear(message[2])
            elif message[0] == b"subscribe":
                self.listening.set_result(None)

    async def _ping(self) -> NoReturn:
        while True:
            await asyncio.sleep(_PING_S)
            await self._ear.send_command("PING", check_health=False)


class ConnectionManager:
    """Sends commands, and listens on ``channel``. All keys are in the slot of ``key``.

    ``prepare`` sends the first commands on every new set of connections. ``hear`` gets each message.
    ``restored`` is called when a new set replaces a broken one. ``rng`` adds jitter to the attempts.
    """

    def __init__(
        self,
        address: Address,
        *,
        key: str,
        channel: bytes,
        prepare: Callable[[Call], Awaitable[None]],
        hear: Callable[[bytes], object],
        restored: Callable[[], object],
        rng: random.Random,
    ) -> None:
        self._address = address
        self._key = key
        self._channel = channel
        self._prepare = prepare
        self._hear = hear
        self._restored = restored
        self._rng = rng
        self._lines: _Lines | None = None
        self._detail = "the store is not open"

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Stay connected for the length of a ``with``.

        Raises :class:`StartupError` if the first connection fails.
        """
        try:
            lines, running = await self._open()
        except (TimeoutError, RedisError, OSError) as error:
            raise StartupError(f"the store {self._address} cannot be used: {_said(error)}") from None
        keeping = asyncio.create_task(self._keep(running), name="asyncproxy-redis")
        self._lines = lines
        try:
            yield
        finally:
            self._lines = None
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def call(self, *args: bytes | str | int, size: int = 0) -> Any:
        """Send a command, and return its reply. ``size`` is about the bytes of command or reply.

        Raises :class:`StoreUnavailable` or :class:`StoreFull`, and :class:`ResponseError` for a command
        that is wrong.
        """
        lines = self._lines
        if lines is None:
            raise self._unavailable(self._detail)
        pipe = lines.large if size > LARGE else lines.small
        if pipe.crowded:
            await pipe.room()
        try:
            return await pipe.send(args)
        except RedisError as error:
            self._translate(error, lines)
            raise

    def _translate(self, error: RedisError, lines: _Lines) -> None:
        """Raise the proxy's own error for an error of redis-py, unless the command was wrong."""
        detail = _said(error)
        if isinstance(error, OutOfMemoryError):
            raise StoreFull(detail) from None
        if isinstance(error, _ELSEWHERE):
            lines.cut(error)
        known = isinstance(error, _LATER) or any(words in detail for words in _LATER_WORDS)
        if isinstance(error, ResponseError) and not known:
            return
        raise self._unavailable(detail) from None

    def _unavailable(self, detail: str) -> StoreUnavailable:
        error = StoreUnavailable("The store is out of reach. Try again in a moment.", retry_after_s=2)
        error.detail = f"{self._address}: {detail}"
        return error

    async def _open(self) -> tuple[_Lines, asyncio.Task[Exception]]:
        lines = _Lines(await self._address.connect(3, self._key))
        running = asyncio.create_task(lines.run(self._channel, self._hear))

        async def call(*args: bytes | str | int) -> Any:
            return await lines.small.send(args)

        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._prepare(call)
                await asyncio.wait([lines.listening])
            return lines, running
        except BaseException:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise

    async def _keep(self, running: asyncio.Task[Exception]) -> NoReturn:
        """Connect again whenever the connections break. No other code reconnects."""
        try:
            while True:
                reason = await asyncio.shield(running)
                self._lines, self._detail = None, _said(reason)
                logger.warning("the store %s is out of reach: %s", self._address, self._detail)
                self._lines, running = await self._reopen()
                logger.info("the store %s is back", self._address)
                self._restored()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _reopen(self) -> tuple[_Lines, asyncio.Task[Exception]]:
        delay_s = _FIRST_RETRY_S
        while True:
            await asyncio.sleep(delay_s * self._rng.uniform(0.5, 1.0))
            try:
                return await self._open()
            except (TimeoutError, RedisError, OSError, StartupError) as error:
                self._detail = _said(error)
                logger.debug("the store %s is still out of reach: %s", self._address, self._detail)
            delay_s = min(2 * delay_s, _LONGEST_RETRY_S)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
