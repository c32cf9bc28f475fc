"""Answers whose head is written once, as bytes.

aiohttp's own :class:`aiohttp.web.Response` builds a multidict and serialises it for each answer, which
is most of what a small answer costs. Here the head is put together by hand, and the multidict exists
only if somebody asks for it: a middleware or a signal of the application that we are part of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Any, Final

from aiohttp import ClientConnectionResetError, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.compression_utils import MAX_SYNC_CHUNK_SIZE
from aiohttp.http import HttpVersion11
from multidict import CIMultiDict

from asyncproxy.core.errors import ApiError
from asyncproxy.loop.write_coalescing import CoalescingTransport
from asyncproxy.wire.headers import field_lines

__all__ = ["JSON", "WireResponse", "error_response", "http_date", "json_response", "status_line"]

# A body up to this size goes out in one write with its head; a larger one is not copied, but written
# in pieces of it, each when the one before has left.
_PIECE: Final = 256 * 1024

_BODILESS: Final = frozenset({204, 304})

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


class WireResponse(web.Response):
    """An answer of a status, header lines (each with its CRLF) and a body.

    ``Date``, ``Content-Length`` and ``Connection`` are added. ``lines`` must not name them.
    """

    # What web.Response.__init__ would set, as far as it is not set below.
    _zlib_executor_size = MAX_SYNC_CHUNK_SIZE
    _zlib_executor = None

    _built: CIMultiDict[str] | None = None
    _pieces: Callable[[], Iterable[bytes]] | None = None
    _replaced = False

    def __init__(
        self, status: int, lines: bytes, body: bytes | memoryview, *, close: bool = False
    ) -> None:
        # web.Response.__init__ is left out on purpose: it builds the multidict.
        self._state = {}
        self._status = status
        self._reason = _REASONS.get(status, "")
        self._lines = lines
        self._body = body  # type: ignore[assignment]  # a view is made bytes before anyone sees it
        self._size = len(body)
        if close:
            self._keep_alive = False

    def stream(self, size: int, pieces: Callable[[], Iterable[bytes]]) -> None:
        """Write ``pieces``, ``size`` bytes in all, in place of the body: it is made as it leaves."""
        self._size, self._pieces = size, pieces

    @property
    def _headers(self) -> CIMultiDict[str]:  # type: ignore[override]
        if self._built is None:
            fields = (line.partition(b": ") for line in self._lines.split(b"\r\n") if line)
            self._built = CIMultiDict((k.decode("ascii"), _text(v)) for k, _, v in fields)
        return self._built

    @property
    def body(self) -> Any:
        """The body as bytes. Another one may be put in its place."""
        body: Any = self._body
        if self._pieces is not None:
            self._body, self._pieces = b"".join(self._pieces()), None
        elif isinstance(body, memoryview):
            self._body = bytes(body)
        return self._body

    @body.setter
    def body(self, body: Any) -> None:
        self._pieces, self._replaced = None, True
        web.Response.body.fset(self, body)  # type: ignore[attr-defined]

    @property
    def text(self) -> str | None:
        """The body as text."""
        return None if self.body is None else web.Response.text.fget(self)  # type: ignore[attr-defined]

    @text.setter
    def text(self, text: str) -> None:
        self._pieces, self._replaced = None, True
        web.Response.text.fset(self, text)  # type: ignore[attr-defined]

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if self._eof_sent or self._payload_writer is not None:
            return await super().prepare(request)
        if self._must_be_generic(request):
            _ = self.body  # made bytes now
            self._headers.setdefault("Server", "asyncproxy")  # aiohttp would name its version
            return await super().prepare(request)
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        bodiless = self._status in _BODILESS
        head = b"".join(
            (
                status_line(self._status),
                self._lines,
                b"" if bodiless else b"Content-Length: %d\r\n" % self._size,
                http_date(int(time())),
                b"\r\n" if self._keep_alive else b"Connection: close\r\n\r\n",
            )
        )
        self._eof_sent = True
        body: bytes | memoryview = self._body  # type: ignore[assignment]
        writer, transport = request.writer, request.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client has gone")
        writer.output_size += len(head)  # from here on no other answer can be given
        pieces = (body,) if self._pieces is None else self._pieces()
        if bodiless or request.method == "HEAD":
            pieces = ()
        if not pieces or self._size <= _PIECE:
            whole = b"".join((head, *pieces))
            if isinstance(transport, CoalescingTransport):
                transport.write_soon(whole)
            else:
                transport.write(whole)
        else:
            transport.write(head)
            for piece in pieces:
                for part in _parts(piece):
                    await writer.write(part)
        await writer.drain()
        return writer

    def _must_be_generic(self, request: web.BaseRequest) -> bool:
        """Whether somebody else has a say in this answer, or it is for HTTP/1.0."""
        if self._built is not None or self._replaced or self._cookies is not None or self._compression:
            return True
        if request.version != HttpVersion11:
            return True
        if not isinstance(request, web.Request):
            return False  # there is no application that could have a say
        for app in request.match_info.apps:  # noqa: SIM110  a generator for each answer costs more than the answer
            if app.on_response_prepare:
                return True
        return False


def _parts(piece: bytes | memoryview) -> Iterator[bytes | memoryview]:
    if len(piece) <= _PIECE:
        yield piece
        return
    view = memoryview(piece)
    for start in range(0, len(view), _PIECE):
        yield view[start : start + _PIECE]


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
