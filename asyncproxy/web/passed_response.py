"""Writes an upstream's response to the client: the head in its own bytes, the body as it arrives."""

from __future__ import annotations

import socket
import struct
from typing import Final

from aiohttp import web
from aiohttp.http import HttpVersion11

from asyncproxy.loop.write_coalescing import CoalescingTransport
from asyncproxy.upstream.exchange import Exchange
from asyncproxy.web.passed_request import PassedRequest
from asyncproxy.web.wire_response import AlreadyWritten
from asyncproxy.wire import headers

__all__ = ["break_off", "head", "relay"]

_FRAMING: Final = frozenset({"content-length"})


async def relay(passed: PassedRequest, exchange: Exchange, *, gather: bool) -> web.StreamResponse:
    """Write a response to the client as it arrives. ``gather``: other responses are under way."""
    request = passed.request
    writer, has_body = request.writer, exchange.has_body
    keep_alive, chunked, framing = _framing(request, exchange)
    # The bytes that arrived with the head leave with the head: a small response is one write.
    pending = head(exchange, framing, without_length=exchange.length is None)
    passed.begin_response(exchange.status)
    piece = exchange.received() if has_body else b""
    while True:
        passed.sent_bytes += len(piece)
        at_end = not has_body or exchange.at_end()
        if chunked:
            chunk = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
            pending = b"".join((pending, chunk, b"0\r\n\r\n" if at_end else b""))
        else:
            pending = pending + piece if pending else piece
        if not at_end:
            await writer.write(pending)
            gather = False
            passed.moved()
            pending, piece = b"", await exchange.read()
            continue
        transport = request.transport
        if gather and isinstance(transport, CoalescingTransport):
            transport.write_soon(pending)
        else:
            await writer.write(pending)
        await writer.drain()
        return AlreadyWritten(keep_alive=keep_alive)


def _framing(request: web.BaseRequest, exchange: Exchange) -> tuple[bool, bool, bytes]:
    """Whether the connection stays open, whether the body is chunked, and the header lines for both."""
    http11 = request.version == HttpVersion11
    # After an Upgrade that was not accepted, aiohttp reads no further request (RFC 9110, 7.8).
    keep_alive = request.keep_alive and "Upgrade" not in request.headers
    lines = b""
    chunked = False
    if exchange.has_body and exchange.length is None:
        if http11:
            chunked = True
            lines = b"Transfer-Encoding: chunked\r\n"
        else:
            keep_alive = False  # HTTP/1.0: the end of the connection is the end of the body
    if not keep_alive:
        lines += b"Connection: close\r\n"
    elif not http11:
        lines += b"Connection: keep-alive\r\n"
    return keep_alive, chunked, lines


def head(exchange: Exchange, own_lines: bytes, *, without_length: bool = False) -> bytes:
    """The head of a response, in the upstream's own bytes, with ``own_lines`` at its end."""
    return b"".join(
        (
            f"HTTP/1.1 {exchange.status} {exchange.reason or ''}\r\n".encode(
                "utf-8", "surrogateescape"
            ),
            headers.response_lines(
                exchange.headers, without=_FRAMING if without_length else frozenset()
            ),
            own_lines,
            b"\r\n",
        )
    )


def break_off(request: web.BaseRequest) -> web.StreamResponse:
    """Close the client's connection so that the client does not take a part for the whole response."""
    transport = request.transport
    if transport is not None:
        if request.version == HttpVersion11:
            transport.close()  # the framing shows that the body is incomplete
        else:
            # Nothing frames an HTTP/1.0 body: only a reset shows that it is incomplete.
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
    return AlreadyWritten(keep_alive=False)
