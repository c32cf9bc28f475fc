"""Responses whose head is assembled as bytes.

:class:`aiohttp.web.Response` builds a multidict and serialises it for each response: most of the cost
of a small response. Here the head is assembled directly. In a host application the response becomes one
of aiohttp's, because the host's middlewares and signals may change it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Any, Final

from aiohttp import ClientConnectionResetError, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11
from multidict import CIMultiDict

from asyncproxy.core.errors import ApiError
from asyncproxy.loop.write_coalescing import CoalescingTransport
from asyncproxy.wire.headers import field_lines

__all__ = [
    "JSON",
    "AlreadyWritten",
    "Response",
    "WireResponse",
    "error_response",
    "http_date",
    "json_response",
    "status_line",
    "write_continue",
]

logger = logging.getLogger(__name__)

# A body up to this size is one write with its head. A larger body is not copied. It is written in
# pieces of this size, each when the piece before has left.
_PIECE: Final = 256 * 1024

_BODILESS: Final = frozenset({204, 304})

_CLOSE: Final = b"Connection: close\r\n\r\n"

_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {reason}\r\n".encode() for status, reason in _REASONS.items()
}


# The header lines of the proxy's own JSON. The response is for one client and one moment: no caching.
JSON: Final = b"Content-Type: application/json\r\nCache-Control: no-store\r\n"


@lru_cache(maxsize=1)
def http_date(second: int) -> bytes:
    """The ``Date`` header line of a second since the epoch."""
    return f"Date: {formatdate(second, usegmt=True)}\r\n".encode()


def status_line(status: int) -> bytes:
    """The status line of HTTP/1.1, with its CRLF."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


class WireResponse:
    """A response that writes itself: a status, header lines (each with its CRLF) and a body.

    ``Date``, ``Content-Length`` and ``Connection`` are added: ``lines`` must not name them. A
    connection of aiohttp uses ``prepare``, ``write_eof`` and ``keep_alive`` of a response. An
    application of aiohttp needs more: see :meth:`for_application`.
    """

    __slots__ = ("_after", "_body", "_pieces", "_size", "keep_alive", "lines", "status")

    def __init__(
        self, status: int, lines: bytes, body: bytes | memoryview, *, close: bool = False
    ) -> None:
        self.status = status
        self.lines = lines
        self.keep_alive: bool | None = False if close else None
        self._body = body
        self._size = len(body)
        self._pieces: Callable[[], AsyncIterator[bytes]] | None = None
        self._after: Callable[[], Awaitable[None]] | None = None

    def stream(self, size: int, pieces: Callable[[], AsyncIterator[bytes]]) -> None:
        """Write ``pieces`` in place of the body, ``size`` bytes in all. Each is read when it is due."""
        self._size, self._pieces = size, pieces

    @property
    def is_streamed(self) -> bool:
        """Whether the body is read in pieces as it leaves."""
        return self._pieces is not None

    async def begin(self) -> None:
        """Read the first piece of what is streamed: an error that it raises can still be answered."""
        assert self._pieces is not None
        pieces = self._pieces()
        first = await anext(pieces, b"")
        self._pieces = lambda: _preceded(first, pieces)

    def force_close(self) -> None:
        """Close the connection after this response."""
        self.keep_alive = False

    def when_written(self, after: Callable[[], Awaitable[None]]) -> None:
        """Await ``after`` when the whole response is written and the client is still connected."""
        self._after = after

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write the response. Raises :class:`ConnectionError` if the client has gone."""
        if self.keep_alive is None:
            self.keep_alive = request.keep_alive
        head = self.head()
        if request.version != HttpVersion11:
            head = _for_http_1_0(head, keep_alive=self.keep_alive)
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client has gone")
        request.writer.output_size += len(head)  # from here on no other response can be written
        if request.method == "HEAD" or self.status in _BODILESS:
            _write_soon(transport, head)
        elif self._pieces is not None:
            transport.write(head)
            await self._write_pieces(self._pieces(), request.writer, transport)
        elif self._size <= _PIECE:
            _write_soon(transport, b"".join((head, self._body)))
        else:
            transport.write(head)
            for part in _cut(self._body):
                await request.writer.write(part)
        await request.writer.drain()
        if self._after is not None:
            await self._delivered(transport)

    async def _write_pieces(
        self, pieces: AsyncIterator[bytes], writer: AbstractStreamWriter, transport: asyncio.Transport
    ) -> None:
        try:
            async for piece in pieces:
                for part in _cut(piece):
                    await writer.write(part)
        except ApiError as error:
            # The head has announced more bytes: only a broken connection shows that they are missing.
            logger.warning("a result breaks off while it is being sent: %s", error.detail or error)
            transport.abort()
            raise ClientConnectionResetError("the rest of the result cannot be read") from error

    async def _delivered(self, transport: asyncio.Transport) -> None:
        if isinstance(transport, CoalescingTransport):
            transport.flush()
        if self._after is not None and not transport.is_closing():
            await self._after()

    async def write_eof(self) -> None:
        """Nothing is left to write: :meth:`prepare` writes the body too."""

    def head(self) -> bytes:
        """The HTTP/1.1 head, with its empty line."""
        return b"".join(
            (
                status_line(self.status),
                self.lines,
                b"" if self.status in _BODILESS else b"Content-Length: %d\r\n" % self._size,
                http_date(int(time())),
                _CLOSE if self.keep_alive is False else b"\r\n",
            )
        )

    async def _cut_body(self) -> AsyncIterator[bytes]:
        for part in _cut(self._body):
            yield bytes(part)

    def for_application(self) -> web.StreamResponse:
        """The same as a response of aiohttp, whose headers a middleware or a signal may change."""
        fields = (line.partition(b": ") for line in self.lines.split(b"\r\n") if line)
        headers = CIMultiDict((name.decode("ascii"), _text(value)) for name, _, value in fields)
        headers.setdefault("Server", "asyncproxy")  # aiohttp would name its version
        body: Any = None
        if self._pieces is not None or self._size > _PIECE:
            body = (self._pieces or self._cut_body)()
            headers["Content-Length"] = str(self._size)
        elif self.status not in _BODILESS:
            body = bytes(self._body)
        response = _ApplicationResponse(status=self.status, headers=headers, body=body)
        response.after = self._after
        if self.keep_alive is False:
            response.force_close()
        return response


class _ApplicationResponse(web.Response):
    """A response that goes through the middlewares and signals of a host application."""

    after: Callable[[], Awaitable[None]] | None = None

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        if self.after is not None:
            after, self.after = self.after, None
            await after()


class AlreadyWritten(web.StreamResponse):
    """Tells aiohttp that the response is already written to the connection."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._may_stay = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._may_stay

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


async def write_continue(request: web.BaseRequest) -> None:
    """Write ``100 Continue``, an interim response (RFC 9110, section 15.2)."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0


# The return value of a handler.
Response = WireResponse | web.StreamResponse


def _for_http_1_0(head: bytes, *, keep_alive: bool) -> bytes:
    head = head.replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    return head[:-2] + b"Connection: keep-alive\r\n\r\n" if keep_alive else head


def _write_soon(transport: asyncio.Transport, whole: bytes) -> None:
    if isinstance(transport, CoalescingTransport):
        transport.write_soon(whole)
    else:
        transport.write(whole)


def _cut(body: bytes | memoryview) -> Iterator[bytes | memoryview]:
    if len(body) <= _PIECE:
        yield body
        return
    view = memoryview(body)
    for start in range(0, len(view), _PIECE):
        yield view[start : start + _PIECE]


async def _preceded(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def json_response(status: int, body: bytes | memoryview, *, lines: bytes = b"") -> WireResponse:
    """A JSON response with the header lines :data:`JSON` and ``lines``."""
    return WireResponse(status, JSON + lines, body)


def error_response(error: ApiError, body: bytes, *, close: bool = False) -> WireResponse:
    """An error response. ``body`` comes from :func:`asyncproxy.wire.envelope.error_body`."""
    response = json_response(error.status, body, lines=field_lines(error.headers).encode())
    if close or error.close:
        response.force_close()
    return response
