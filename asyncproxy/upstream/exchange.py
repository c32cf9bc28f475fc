"""One POST over a connection of aiohttp's pool, without its session.

A session sees to redirects, cookies, tracing, proxies and bodies of any kind, and builds a request, a
response and a task to write with for each. A call has none of them: its head is a few lines, its body
is there. What is left to aiohttp is what is hard: the connections, TLS, names, and the parser.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import StreamReader, hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import StreamWriter
from yarl import URL

from asyncproxy.loop.write_coalescing import WriteCoalescer

__all__ = ["Connections", "Exchange"]

# Longest header line taken from an upstream, in bytes, and how many of them.
MAX_FIELD: Final = 64 * 1024
MAX_FIELDS: Final = 512

READ_BUFFER: Final = 64 * 1024

# A request with a body up to this size is one write. A larger body is handed to the transport in pieces
# of it, as the transport takes them, while an answer is waited for: it may come before the end.
_PIECE: Final = 256 * 1024

# Calls that may wait for each other. With more, so many answers arrive at once that the first ones are
# in no cache any more when their turn comes.
_CALLS_AT_ONCE: Final = 8


class Connections:
    """Those of a connector to one origin."""

    def __init__(self, connector: aiohttp.BaseConnector, origin: str) -> None:
        # What the connector knows a connection by. It is never sent.
        self._request = aiohttp.ClientRequest("POST", URL(origin), loop=asyncio.get_running_loop())
        self._connector = connector
        self.cork = WriteCoalescer(_CALLS_AT_ONCE)
        self.host = self._request.headers[hdrs.HOST]

    async def take(self, connect_s: float) -> aiohttp.connector.Connection:
        """A connection that is free, or a new one.

        Raises :class:`aiohttp.ClientError`, a ``ConnectionTimeoutError`` after ``connect_s``.
        """
        timeout = aiohttp.ClientTimeout(connect=connect_s)
        try:
            return await self._connector.connect(self._request, [], timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError("the connection was not taken in time") from error


class Exchange:
    """A request, for the length of an ``async with``, and its answer, whose body is left to be read.

    ``head`` is the request line and the header lines, ``body`` what follows. Raises what aiohttp's
    client does, and :class:`aiohttp.http.HttpProcessingError` for an answer that is none.
    """

    protocol: ResponseHandler
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    length: int  # as the answer says, 0 if it does not
    content: StreamReader

    def __init__(self, connections: Connections, head: bytes, body: bytes, *, connect_s: float) -> None:
        self._connections = connections
        self._head = head
        self._body = body
        self._connect_s = connect_s
        self._sending: asyncio.Task[None] | None = None
        self._begun = False  # it may be answered
        self._handed_over = False  # all of it, to the transport

    async def __aenter__(self) -> Self:
        self._connection = await self._connections.take(self._connect_s)
        try:
            await self._exchange(self._connection)
        except BaseException:
            self._end(whole=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(whole=error is None)

    def flush(self) -> None:
        """Send the request, unless it was given up."""
        transport = self._connection.transport
        if transport is not None and not transport.is_closing() and self._may_begin():
            transport.write(self._head + self._body)
            self._handed_over = True

    def _may_begin(self) -> bool:
        """Whether nothing has come yet: what comes unasked is the answer to no request of ours."""
        protocol = self._connection.protocol
        self._begun = protocol is not None and not protocol.should_close
        return self._begun

    async def _exchange(self, connection: aiohttp.connector.Connection) -> None:
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
            self._connections.cork.hold(self)
        else:
            self._sending = asyncio.create_task(self._send(protocol))
        message, content = await protocol.read()
        while 100 <= message.code < 200 and message.code != 101:
            message, content = await protocol.read()
        if not self._begun:
            raise aiohttp.ServerConnectionError("an answer came before its request")
        self.protocol = protocol
        self.status = message.code
        self.headers = message.raw_headers
        self.length = int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
        self.content = content

    async def _send(self, protocol: ResponseHandler) -> None:
        writer = StreamWriter(protocol, asyncio.get_running_loop())
        # Whoever reads the answer hears of the end of the connection.
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):
            if self._may_begin():
                await writer.write(self._head)
                for start in range(0, len(self._body), _PIECE):
                    await writer.write(self._body[start : start + _PIECE])
                self._handed_over = True

    def _end(self, *, whole: bool) -> None:
        """Give the connection back, or close it. ``whole``: all of the answer was read."""
        if self._sending is not None:
            self._sending.cancel()
        transport = self._connection.transport
        # An answer may come before all of the request has left. What is sent next would go on with it.
        left = transport is not None and not transport.get_write_buffer_size()
        if whole and self._handed_over and left:
            self._connection.release()
        else:
            self._connection.close()
