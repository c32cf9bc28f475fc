"""One POST over a connection of aiohttp's pool, without its session.

A session sees to redirects, cookies, tracing, proxies and bodies of any kind, and builds a request, a
response and a task to write with for each. A call has none of them: its head is a few lines, its body
is there. What is left to aiohttp is what is hard: the connections, TLS, names, and the parser.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import StreamWriter
from yarl import URL

from asyncproxy.corking import Cork

__all__ = ["Pool", "Post"]

# Longest header line taken from an upstream, in bytes, and how many of them.
MAX_FIELD: Final = 64 * 1024
MAX_FIELDS: Final = 512

READ_BUFFER: Final = 64 * 1024

# A body is handed to the transport in pieces of this size, each when the one before has left.
_PIECE: Final = 256 * 1024

# Calls that may wait for each other. With more, so many answers arrive at once that the first ones are
# in no cache any more when their turn comes.
_CALLS_AT_ONCE: Final = 8


class Pool:
    """The connections of a connector to one origin."""

    def __init__(self, connector: aiohttp.BaseConnector, origin: str) -> None:
        # What the connector knows a connection by. It is never sent.
        self._request = aiohttp.ClientRequest("POST", URL(origin), loop=asyncio.get_running_loop())
        self._connector = connector
        self.cork = Cork(_CALLS_AT_ONCE)
        self.host = self._request.headers[hdrs.HOST]

    async def connection(self, connect_s: float) -> aiohttp.connector.Connection:
        """A connection that is free, or a new one.

        Raises :class:`aiohttp.ClientError`, a ``ConnectionTimeoutError`` after ``connect_s``.
        """
        timeout = aiohttp.ClientTimeout(connect=connect_s)
        try:
            return await self._connector.connect(self._request, [], timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError("the connection was not taken in time") from error


class Post:
    """A request, for the length of an ``async with``, and its answer, whose body is left to be read.

    ``head`` is the request line and the header lines, ``body`` what follows. Raises what aiohttp's
    client does, and :class:`aiohttp.http.HttpProcessingError` for an answer that is none.
    """

    def __init__(self, pool: Pool, head: bytes, body: bytes, *, connect_s: float) -> None:
        self._pool = pool
        self._head = head
        self._body = body
        self._connect_s = connect_s
        self._sending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._connection = await self._pool.connection(self._connect_s)
        try:
            await self._begin(self._connection)
        except BaseException:
            self._end(reusable=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(reusable=error is None)

    def flush(self) -> None:
        """Send the request, if it is not given up already."""
        transport = self._connection.transport
        if transport is not None and not transport.is_closing():
            transport.write(self._head + self._body)

    async def _begin(self, connection: aiohttp.connector.Connection) -> None:
        protocol = connection.protocol
        if protocol is None:
            raise aiohttp.ServerDisconnectedError
        protocol.set_response_params(
            read_until_eof=True,
            read_bufsize=READ_BUFFER,
            max_line_size=MAX_FIELD,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
        )
        if len(self._body) <= _PIECE:
            self._pool.cork.hold(self)
        else:
            self._sending = asyncio.create_task(self._send(protocol))
        message, content = await protocol.read()
        while 100 <= message.code < 200 and message.code != 101:
            message, content = await protocol.read()
        self.protocol = protocol
        self.status = message.code
        self.headers = message.raw_headers
        self.length = int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
        self.content = content

    async def _send(self, protocol: ResponseHandler) -> None:
        writer = StreamWriter(protocol, asyncio.get_running_loop())
        await writer.write(self._head)
        for start in range(0, len(self._body), _PIECE):
            await writer.write(self._body[start : start + _PIECE])

    def _end(self, *, reusable: bool) -> None:
        sending = self._sending
        if sending is not None and not sending.done():
            sending.cancel()  # the answer came before all of the body was sent
            reusable = False
        elif sending is not None and (sending.cancelled() or sending.exception()):
            reusable = False
        if reusable:
            self._connection.release()
        else:
            self._connection.close()
