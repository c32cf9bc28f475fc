"""One pipelined connection to Redis: commands do not wait for the replies of earlier ones."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

__all__ = ["PipelinedConnection"]

# Limits of the commands without a reply. Beyond them a sender waits. A command holds its arguments in
# memory until its reply.
_MOST_COMMANDS: Final = 10_000
_MOST_BYTES: Final = 64 * 1024**2


class PipelinedConnection:
    """Sends commands, and matches replies to them by their order.

    The commands of one round of the loop leave in one write. ``timeout_s`` is how long Redis may be
    silent while a reply is due.
    """

    def __init__(self, connection: Connection, *, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._something_to_write = asyncio.Event()
        self._due: deque[tuple[asyncio.Future[Any], int]] = deque()
        self._due_bytes = 0
        self._heard_at = 0.0
        self._room: deque[asyncio.Future[None]] = deque()
        self._broken: Exception | None = None

    @property
    def crowded(self) -> bool:
        """Whether the limits of commands without a reply are reached."""
        return len(self._due) >= _MOST_COMMANDS or self._due_bytes >= _MOST_BYTES

    async def room(self) -> None:
        """Wait until there is room for another command."""
        while self.crowded and self._broken is None:
            made: asyncio.Future[None] = self._loop.create_future()
            self._room.append(made)
            await made

    def send(self, args: tuple[Any, ...]) -> asyncio.Future[Any]:
        """Send a command at once. The future gets its reply, or the error."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._broken is not None:
            future.set_exception(self._broken)
            return future
        packed = pack_command(args)
        if not self._due:
            self._heard_at = self._loop.time()
        self._due.append((future, len(packed)))
        self._due_bytes += len(packed)
        self._out.append(packed)
        self._something_to_write.set()
        return future

    async def run(self) -> Exception:
        """Run until the connection breaks, and return the reason. All commands under way fail then."""
        parts = [asyncio.create_task(part) for part in (self._write(), self._read(), self._watch())]
        reason: Exception = RedisConnectionError("the connection was closed")
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            error = done.pop().exception()
            if isinstance(error, Exception):
                reason = error
        finally:
            self._fail(reason)
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await self._connection.disconnect(nowait=True)
        return reason

    async def _write(self) -> None:
        while True:
            await self._something_to_write.wait()
            self._something_to_write.clear()
            out, self._out = self._out, []
            await self._connection.send_packed_command(out, check_health=False)

    async def _read(self) -> None:
        read = self._connection.read_response
        while True:
            try:
                reply = await read(disable_decoding=True)
            except ResponseError as error:
                self._answer(error)
            else:
                self._answer(reply)

    def _answer(self, reply: Any) -> None:
        future, size = self._due.popleft()
        self._due_bytes -= size
        self._heard_at = self._loop.time()
        if not future.done():  # unless the caller was cancelled
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)
        while self._room and not self.crowded:
            made = self._room.popleft()
            if not made.done():
                made.set_result(None)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._timeout_s / 4)
            if self._due and self._loop.time() - self._heard_at > self._timeout_s:
                raise RedisTimeout(f"no reply within {self._timeout_s:g} s")

    def _fail(self, reason: Exception) -> None:
        self._broken = reason
        for future, _ in self._due:
            if not future.done():
                future.set_exception(reason)
        self._due.clear()
        for made in self._room:
            if not made.done():
                made.set_result(None)
        self._room.clear()
