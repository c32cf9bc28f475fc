"""Answers whose head is written once, as bytes.

aiohttp's own :class:`aiohttp.web.Response` builds a multidict and serialises it for each answer, which
is most of what a small answer costs. Here the head is put together by hand. Only in an application of
somebody else, which may change our answers, is one made of aiohttp's.
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

# A body up to this size goes out in one write with its head; a larger one is not copied, but written
# in pieces of it, each when the one before has left.
_PIECE: Final = 256 * 1024

_BODILESS: Final = frozenset({204, 304})

_CLOSE: Final = b"Connection: close\r\n\r\n"

_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {reason}\r\n".encode() for status, reason in _REASONS.items()
}


# The header lines of JSON of ours. It is about one client and one moment, so nobody may keep it.
JSON: Final = b"Content-Type: application/json\r\nCache-Control: no-store\r\n"


@lru_cache(maxsize=1)
def http_date(second: int) -> bytes:
    """The ``Date`` header line of a second since the epoch."""
    return f"Date: {formatdate(second, usegmt=True)}\r\n".encode()


def status_line(status: int) -> bytes:
    """The status line of HTTP/1.1, with its CRLF."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


class WireResponse:
    """An answer of a status, header lines (each with its CRLF) and a body, written by itself.

    ``Date``, ``Content-Length`` and ``Connection`` are added: ``lines`` must not name them. A
    connection of aiohttp asks an answer for ``prepare``, ``write_eof`` and ``keep_alive``. An
    application of aiohttp wants more: see :meth:`for_application`.
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
        """Write ``pieces``, ``size`` bytes in all, in place of the body: each is read as it leaves."""
        self._size, self._pieces = size, pieces

    async def begin(self) -> None:
        """Read the first piece of what is streamed: an error that it raises can still be answered."""
        if self._pieces is not None:
            pieces = self._pieces()
            first = await anext(pieces, b"")
            self._pieces = lambda: _preceded(first, pieces)

    def force_close(self) -> None:
        """Close the connection after this answer."""
        self.keep_alive = False

    def when_written(self, after: Callable[[], Awaitable[None]]) -> None:
        """Await ``after`` when all has been written, and the client was there to take it."""
        self._after = after

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write the answer. Raises :class:`ConnectionError` if the client has gone."""
        if self.keep_alive is None:
            self.keep_alive = request.keep_alive
        head = self.head()
        if request.version != HttpVersion11:
            head = _for_http_1_0(head, keep_alive=self.keep_alive)
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client has gone")
        request.writer.output_size += len(head)  # from here on no other answer can be given
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
            # The head has promised more: only a broken connection says that this is not all.
            logger.warning("a result breaks off while it is being sent: %s", error.detail or error)
            transport.abort()
            raise ClientConnectionResetError("the rest of the result cannot be read") from error

    async def _delivered(self, transport: asyncio.Transport) -> None:
        if isinstance(transport, CoalescingTransport):
            transport.flush()
        if self._after is not None and not transport.is_closing():
            await self._after()

    async def write_eof(self) -> None:
        """All is written already."""

    def head(self) -> bytes:
        """The head in HTTP/1.1, to its empty line."""
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
        """The same as aiohttp's own response, whose headers a middleware or a signal may change."""
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
    """An answer on its way through the middlewares and signals of an application."""

    after: Callable[[], Awaitable[None]] | None = None

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        if self.after is not None:
            after, self.after = self.after, None
            await after()


class AlreadyWritten(web.StreamResponse):
    """Tells aiohttp that the answer has been written to the connection."""

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
    """Write ``100 Continue``, which is no answer yet (RFC 9110, section 15.2)."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0


# What a handler of ours returns.
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
    """JSON of ours, with the header lines :data:`JSON` and ``lines``."""
    return WireResponse(status, JSON + lines, body)


def error_response(error: ApiError, body: bytes, *, close: bool = False) -> WireResponse:
    """An error of ours; ``body`` is what :func:`asyncproxy.wire.envelope.error_body` made of it."""
    response = json_response(error.status, body, lines=field_lines(error.headers).encode())
    if close or error.close:
        response.force_close()
    return response
