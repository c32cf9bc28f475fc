"""WebSockets: the gateway's ``101``, then the bytes of both sides, unread (RFC 9110, 7.8)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from aiohttp import StreamReader, web
from aiohttp.http import HttpVersion11

from asyncproxy.core.errors import CallError
from asyncproxy.upstream.exchange import Exchange, VerbatimParser
from asyncproxy.web.passed_request import PassedRequest
from asyncproxy.web.passed_response import head
from asyncproxy.web.wire_response import AlreadyWritten

__all__ = ["UPGRADE", "tunnel", "wants_tunnel"]

# The fields for the upstream, and for the client, in place of the other side's own fields.
UPGRADE: Final = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"

_READ_BUFFER: Final = 64 * 1024


def wants_tunnel(request: web.BaseRequest) -> bool:
    """Whether a request asks for a WebSocket."""
    given = request.headers
    return (
        given.get("Upgrade", "").lower() == "websocket"
        and request.method == "GET"
        and request.version == HttpVersion11
        and any(
            name.strip().lower() == "upgrade"
            for value in given.getall("Connection", ())
            for name in value.split(",")
        )
        and not request.can_read_body
    )


async def tunnel(passed: PassedRequest, exchange: Exchange) -> web.StreamResponse:
    """Answer with the upstream's ``101``, then pass bytes through until either side closes."""
    request = passed.request
    await request.writer.write(head(exchange, UPGRADE))
    passed.begin_response(101)
    client = _bytes_of(request)
    up = asyncio.create_task(_to_upstream(passed, client, exchange))
    down = asyncio.create_task(_to_client(passed, exchange))
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.wait({up, down})
        if client.exception() is None and (last := client.read_nowait()):
            # The client's last bytes are still to be sent: usually its close frame.
            with contextlib.suppress(CallError):
                await exchange.write(last)
    for task in (up, down):
        if not task.cancelled():
            task.result()
    return AlreadyWritten(keep_alive=False)


async def _to_upstream(passed: PassedRequest, client: StreamReader, exchange: Exchange) -> None:
    while piece := await client.readany():
        passed.moved()
        passed.received_bytes += len(piece)
        await exchange.write(piece)


async def _to_client(passed: PassedRequest, exchange: Exchange) -> None:
    writer = passed.request.writer
    while piece := await exchange.read():
        passed.moved()
        passed.sent_bytes += len(piece)
        await writer.write(piece)
        await writer.drain()


def _bytes_of(request: web.BaseRequest) -> StreamReader:
    """The bytes that a client sends after its request. aiohttp's own WebSockets get them so too."""
    protocol = request.protocol
    content = StreamReader(protocol, _READ_BUFFER, loop=asyncio.get_running_loop())
    protocol.set_parser(VerbatimParser(content))  # type: ignore[arg-type]  # in the shape of its parser
    return content
