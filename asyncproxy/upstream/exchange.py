"""One HTTP/1.1 exchange with an upstream, over a connection of aiohttp's pool.

    take a connection ── write the head ──┬── write the body ───────────────┐
                                          └── read the head ── read the body ┴── release, or close

Request and response run at the same time: a response may come before the request is sent.

    | at the end of an exchange                                | its connection      |
    | -------------------------------------------------------- | ------------------- |
    | request sent, response read, nothing else can follow     | goes to the pool    |
    | anything else: an error, an early response, bytes unread | is closed           |

aiohttp's client session is not used: it handles redirects, cookies, tracing and bodies of any kind, and
costs three times the exchange. Connections, TLS, name resolution and the parser are aiohttp's. Only
this file uses undocumented names of aiohttp's client (`tests/upstream/test_aiohttp_names.py`).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
from aiohttp import StreamReader, hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError, RawResponseMessage, StreamWriter
from yarl import URL

from asyncproxy.loop.write_coalescing import WriteCoalescer
from asyncproxy.upstream.errors import NotHttpError, translate
from asyncproxy.upstream.target import RawHeaders, Target

__all__ = ["ConnectionPool", "Exchange", "RequestBody", "VerbatimParser", "connection_pool"]

# A whole body, or a body that arrives while it is sent.
RequestBody = bytes | AsyncGenerator[bytes, None]

# Limits of a response head: bytes of a header line, and lines.
_MAX_FIELD: Final = 64 * 1024
_MAX_FIELDS: Final = 512

_READ_BUFFER: Final = 64 * 1024

# A request with a body up to this size is one write. A larger body is written in pieces of this size.
_PIECE: Final = 256 * 1024

# Requests that may wait for each other. With more, the first responses leave the processor's caches.
_REQUESTS_AT_ONCE: Final = 8

# We close idle connections before the gateway does. A request that crosses the gateway's close on the
# wire is lost, and a POST cannot be repeated. uvicorn, under most gateways, waits 5 s.
_KEEPALIVE_S: Final = 4.0

_BODILESS: Final = frozenset({204, 304})

_LIBRARY_ERRORS: Final = (aiohttp.ClientError, HttpProcessingError, OSError)


class ConnectionPool:
    """Connections to one upstream, and a count of the exchanges that are under way.

    ``name`` is for errors, ``target`` the URL of the upstream.
    """

    def __init__(self, name: str, target: Target, connector: aiohttp.BaseConnector) -> None:
        self.name = name
        self.target = target
        self.writes = WriteCoalescer(_REQUESTS_AT_ONCE)
        self.under_way = 0
        self._connector = connector
        # The connector finds connections by a request. This request is never sent.
        self._request = aiohttp.ClientRequest(
            "GET", URL(target.origin), loop=asyncio.get_running_loop()
        )
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def host(self) -> str:
        """The value of the ``Host`` field for the upstream's URL."""
        return self._request.headers[hdrs.HOST]

    async def take(self, connect_s: float) -> Connection:
        """An idle connection, or a new one.

        Raises :class:`aiohttp.ClientError`, a ``ConnectionTimeoutError`` after ``connect_s``.
        """
        timeout = aiohttp.ClientTimeout(connect=connect_s)
        try:
            while True:
                connection = await self._connector.connect(self._request, [], timeout)
                # Unrequested bytes would become the response to the next request: another client's.
                if connection.protocol is None or not connection.protocol.should_close:
                    return connection
                connection.close()
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError("the connection was not taken in time") from error

    def begin(self) -> None:
        """Count an exchange that begins."""
        self.under_way += 1
        self._idle.clear()

    def end(self) -> None:
        """Count an exchange that has ended."""
        self.under_way -= 1
        if not self.under_way:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no exchange is under way."""
        await self._idle.wait()


@asynccontextmanager
async def connection_pool(
    name: str, target: Target, *, socket_path: str | None, tls: ssl.SSLContext | bool
) -> AsyncIterator[ConnectionPool]:
    """A pool for the length of a ``with``. ``tls`` is aiohttp's ``ssl`` argument."""
    connector: aiohttp.BaseConnector
    if socket_path is not None:
        connector = aiohttp.UnixConnector(path=socket_path, limit=0, keepalive_timeout=_KEEPALIVE_S)
    else:
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=tls, ttl_dns_cache=30
        )
    factory: Any = partial(_Protocol, loop=asyncio.get_running_loop())
    connector._factory = factory  # noqa: SLF001  there is no public way
    async with connector:
        yield ConnectionPool(name, target, connector)


class _Protocol(ResponseHandler):
    """A connection that passes its error to the reader of a body too.

    On a malformed chunk, aiohttp's own class passes the error only to the reader of a response head.
    """

    reading: StreamReader | None = None

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        super().set_exception(exc, exc if exc_cause is None else exc_cause)
        reading, self.reading = self.reading, None
        if reading is not None and not reading.is_eof() and reading.exception() is None:
            reading.set_exception(exc)


class Exchange:
    """An exchange, for an ``async with``. Its block begins when the response head has arrived.

    ``head`` is the request head with its empty line. ``chunked``: the length of ``body`` is unknown.
    ``upgrade``: the response may be a ``101``. Then both sides may send (:meth:`write`, :meth:`read`).

    Raises :class:`~asyncproxy.core.errors.UpstreamUnreachable`, ``UpstreamTimeout``, and the errors of
    the iteration of ``body``.
    """

    status: int
    reason: str
    headers: RawHeaders
    """The response's fields. A ``Location`` at the upstream is turned into a path at the proxy."""
    length: int | None  # the Content-Length of the response
    has_body: bool
    """Whether the response may have a body."""
    coded: bool
    """Whether the response has a content coding."""

    def __init__(
        self,
        pool: ConnectionPool,
        method: str,
        head: bytes,
        body: RequestBody = b"",
        *,
        connect_s: float,
        chunked: bool = False,
        upgrade: bool = False,
    ) -> None:
        self._pool = pool
        self._method = method
        self._head = head
        self._body = body
        self._connect_s = connect_s
        self._chunked = chunked
        self._upgrade = upgrade
        self._connection: Connection | None = None
        self._sending: asyncio.Task[None] | None = None
        self._begun = False  # The upstream may have received a part of the request.
        self._sent = False  # The transport has the whole request.
        self._reusable = True  # Nothing but the response to a next request can follow.
        self._content: StreamReader | None = None

    # Connect, write the head, read the head.

    async def __aenter__(self) -> Self:
        self._pool.begin()
        try:
            self._connection = await self._pool.take(self._connect_s)
            protocol = self._protocol()
            protocol.set_response_params(
                skip_payload=self._method == "HEAD",
                read_until_eof=True,
                auto_decompress=False,
                read_bufsize=_READ_BUFFER,
                max_line_size=_MAX_FIELD,
                max_field_size=_MAX_FIELD,
                max_headers=_MAX_FIELDS,
            )
            self._write(protocol)
            await self._read_head(protocol)
        except BaseException as error:
            await self._end(whole=False)
            if isinstance(error, _LIBRARY_ERRORS):
                raise self._translated(error) from error
            raise
        return self

    def _protocol(self) -> ResponseHandler:
        protocol = None if self._connection is None else self._connection.protocol
        if protocol is None:
            raise aiohttp.ServerDisconnectedError
        return protocol

    def _write(self, protocol: ResponseHandler) -> None:
        if not isinstance(self._body, bytes) or len(self._body) > _PIECE:
            self._sending = asyncio.create_task(self._send(protocol))
            self._sending.add_done_callback(self._on_sent)
        elif self._pool.under_way > 1:
            self._pool.writes.hold(self)
        else:
            self.flush()

    def flush(self) -> None:
        """Write a small request, unless the exchange has already ended."""
        connection = self._connection
        transport = None if connection is None else connection.transport
        if transport is not None and not transport.is_closing() and self._may_begin():
            assert isinstance(self._body, bytes)
            transport.write(self._head + self._body)
            self._sent = True

    def _may_begin(self) -> bool:
        """Whether the connection is still silent: bytes before the request belong to no response."""
        assert self._connection is not None
        protocol = self._connection.protocol
        self._begun = protocol is not None and not protocol.should_close
        return self._begun

    async def _read_head(self, protocol: ResponseHandler) -> None:
        message, content = await protocol.read()
        while 100 <= message.code < 200 and message.code != 101:
            if _announces_body(message):
                raise NotHttpError(f"a {message.code} with a body")
            message, content = await protocol.read()
        if not self._begun:
            raise NotHttpError("an answer came before its request")
        given = message.headers
        if given.get(hdrs.TRANSFER_ENCODING, "chunked").lower() != "chunked":
            raise NotHttpError("a Transfer-Encoding that was not asked for")
        self.status = message.code
        self.reason = message.reason
        self.headers = message.raw_headers
        if hdrs.LOCATION in given or hdrs.CONTENT_LOCATION in given:
            self.headers = self._pool.target.with_our_locations(message.raw_headers)
        length = given.get(hdrs.CONTENT_LENGTH)
        self.length = None if length is None else int(length)
        self.coded = hdrs.CONTENT_ENCODING in given
        self.has_body = self._method != "HEAD" and message.code not in _BODILESS
        if not self.has_body and _announces_body(message):
            # If the upstream sends the body anyway, the body would become the next response.
            self._reusable = False
        if message.code == 101:
            content = self._switch(protocol, message)
        self._content = content
        if not content.is_eof():
            assert isinstance(protocol, _Protocol)
            protocol.reading = content

    def _switch(self, protocol: ResponseHandler, message: RawResponseMessage) -> StreamReader:
        """Read raw bytes from now on (RFC 9110, section 7.8)."""
        if not self._upgrade or message.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
            raise NotHttpError("a 101 that was not asked for")
        content = StreamReader(protocol, _READ_BUFFER, loop=asyncio.get_running_loop())
        protocol.set_parser(VerbatimParser(content), content)
        return content

    # Write the body.

    async def _send(self, protocol: ResponseHandler) -> None:
        """Write a large request as fast as the transport accepts it."""
        if not self._may_begin():
            return
        writer = StreamWriter(protocol, asyncio.get_running_loop())
        await writer.write(self._head)
        if isinstance(self._body, bytes):
            for start in range(0, len(self._body), _PIECE):
                await writer.write(self._body[start : start + _PIECE])
        else:
            if self._chunked:
                writer.enable_chunking()
            async with aclosing(self._body) as pieces:
                async for piece in pieces:
                    await writer.write(piece)
        await writer.write_eof()
        self._sent = True

    def _on_sent(self, sending: asyncio.Task[None]) -> None:
        """Pass an error of ``body`` to the reader. A lost connection reaches the reader by itself."""
        error = None if sending.cancelled() else sending.exception()
        if error is None or isinstance(error, _LIBRARY_ERRORS):
            return
        if self._connection is not None and self._connection.protocol is not None:
            self._connection.protocol.set_exception(error)

    async def write(self, data: bytes) -> None:
        """Write to an upgraded connection, as fast as the transport accepts it."""
        try:
            await StreamWriter(self._protocol(), asyncio.get_running_loop()).write(data, LIMIT=0)
        except _LIBRARY_ERRORS as error:
            raise self._translated(error) from error

    # Read the body.

    def at_end(self) -> bool:
        """Whether the whole body was read."""
        return self._content is None or self._content.at_eof()

    def received(self) -> bytes:
        """The bytes of the body that have arrived. May be empty before the end."""
        assert self._content is not None
        try:
            return self._content.read_nowait()
        except _LIBRARY_ERRORS as error:
            raise self._translated(error) from error

    async def read(self) -> bytes:
        """Wait for the next bytes of the body. Empty at its end."""
        content = self._content
        assert content is not None
        try:
            return await content.readany()
        except _LIBRARY_ERRORS as error:
            raise self._translated(error) from error

    # Release or close.

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end(whole=error is None)

    async def _end(self, *, whole: bool) -> None:
        """Give the connection back, or close it. ``whole``: the caller's block raised no error."""
        connection, content = self._connection, self._content
        try:
            if self._sending is not None and not self._sending.done():
                self._sending.cancel()
                await asyncio.wait({self._sending})
        finally:
            self._pool.end()
            if connection is not None:
                transport = connection.transport
                # After an early response, the rest of its request would be sent before the next one.
                left = transport is None or transport.get_write_buffer_size() > 0
                read = content is not None and content.is_eof()
                if whole and self._sent and self._reusable and read and not left:
                    connection.release()
                else:
                    connection.close()

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, HttpProcessingError):
            error = NotHttpError(error.message)
        return translate(error, self._pool.name, delivered=self._begun)


class VerbatimParser:
    """Stands in for aiohttp's WebSocket parser after a ``101``, and passes the raw bytes on."""

    def __init__(self, content: StreamReader) -> None:
        self._content = content

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._content.feed_data(data)
        return False, b""

    def feed_eof(self) -> None:
        self._content.feed_eof()


def _announces_body(message: RawResponseMessage) -> bool:
    """Whether a response has the header fields of a body (RFC 9112, section 6.3)."""
    length = message.headers.get(hdrs.CONTENT_LENGTH, "0")
    return hdrs.TRANSFER_ENCODING in message.headers or length != "0"
