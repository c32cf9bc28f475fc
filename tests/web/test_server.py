"""What listens, and what becomes of connections that are not used as they should be."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from aiohttp import http_parser
from aiohttp.http_exceptions import (
    BadHttpMessage,
    BadStatusLine,
    HttpProcessingError,
    InvalidHeader,
    InvalidURLError,
    LineTooLong,
)

from asyncproxy.app import compose
from asyncproxy.config.load import load_config
from asyncproxy.core.errors import Overloaded, RequestTooLarge, StartupError
from asyncproxy.loop.write_coalescing import WriteCoalescer
from asyncproxy.web.connection import EdgeServer, _reason
from asyncproxy.web.routes import RouteTable
from asyncproxy.web.server import listening
from tests.conftest import EMBED, Client, Start
from tests.gateway import Gateway, answer


async def test_a_client_that_does_not_read_is_cut_off(gateway: Gateway) -> None:
    gateway.behaviour = answer(b'"' + b"x" * 30_000_000 + b'"')
    proxy = compose(load_config({"upstreams": [{"base_url": f"{gateway.url}/v1"}]}))
    serving = listening(proxy.table, "127.0.0.1", 0, client_timeout_s=0.3)
    async with proxy.running(), serving as url:
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = str(EMBED).replace("'", '"')
        writer.write(
            f"POST /v1/async/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.partition(b"Location: ")[2].partition(b"\r\n")[0].decode()
        async with asyncio.timeout(60):
            while (await proxy.store.usage()).live:
                await asyncio.sleep(0.01)
        tasks = asyncio.all_tasks()
        writer.write(f"GET {path}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await asyncio.sleep(0)  # and never a read of what comes
        async with asyncio.timeout(60):
            while any(not task.done() and "start" in repr(task.get_coro()) for task in tasks):
                await asyncio.sleep(0.05)
        writer.transport.abort()


async def test_a_trailer_is_no_field_of_the_next_request(proxy: Client, gateway: Gateway) -> None:
    """It may be another client's, where a proxy before us shares its connections between them."""
    body = json.dumps(EMBED)
    head = "POST /v1/{} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for path in ("async/embeddings", "embeddings"):
        first = (
            f"{head.format(path)}Authorization: Bearer sk-first\r\nTransfer-Encoding: chunked\r\n\r\n"
            f"{len(body):x}\r\n{body}\r\n0\r\nAuthorization: Bearer sk-trailer\r\n\r\n"
        )
        second = (
            f"{head.format(path)}Authorization: Bearer sk-second\r\nContent-Length: {len(body)}\r\n\r\n"
            f"{body}"
        )
        seen = (await proxy.raw(first.encode() + second.encode())).lower()
        assert seen.count(b"http/1.1 20") == 1
        assert b"connection: close" in seen
        assert (await proxy.raw((second.replace("Host", "Connection: close\r\nHost")).encode())).count(
            b"HTTP/1.1 20"
        ) == 1
    await gateway.until(lambda: len(gateway.received) == 4)
    sent = [request.all("authorization") for request in gateway.received]
    assert sorted(sent) == 2 * [["Bearer sk-first"]] + 2 * [["Bearer sk-second"]]


class _Wire(asyncio.Transport):
    """Notes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass


async def test_who_says_no_more_still_gets_the_answer(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the end of what a client sends is read before an answer that is there has left."""
    monkeypatch.setattr(WriteCoalescer, "hold", lambda *_: None)  # until something else makes it leave
    proxy = compose(load_config({"upstreams": [{"base_url": gateway.url}], "shutdown_grace": "0s"}))
    async with proxy.running():
        server = EdgeServer(proxy.table.dispatch, client_timeout_s=1.0, max_connections=1)
        connection, wire = server(), _Wire()
        connection.connection_made(wire)
        connection.data_received(b"GET /v1/async/embeddings/x HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.05)
        assert wire.written == b""
        connection.eof_received()
        assert wire.written.startswith(b"HTTP/1.1 404 ")
        await server.shutdown(0.1)


class _Body:
    """A request body whose end is far away."""

    head = (
        b"POST /v1/async/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100000000\r\n\r\n"
    )
    piece = b"x" * 100_000


async def test_what_a_refused_upload_goes_on_sending_is_not_kept(gateway: Gateway) -> None:
    """Thousands of them have no turn between two pieces: each is let go of as it arrives."""
    proxy = compose(load_config({"upstreams": [{"base_url": gateway.url}], "shutdown_grace": "0s"}))
    async with proxy.running():
        server = EdgeServer(proxy.table.dispatch, client_timeout_s=60.0, max_connections=1)
        connection, wire = server(), _Wire()
        connection.connection_made(wire)
        connection.data_received(_Body.head)
        async with asyncio.timeout(60):
            while not wire.written.startswith(b"HTTP/1.1 413 "):
                await asyncio.sleep(0)
        body = connection._unwanted
        assert body is not None
        for _ in range(50):  # in one round of the loop
            connection.data_received(_Body.piece)
        assert (body.total_bytes, body._size) == (50 * len(_Body.piece), 0)
        await asyncio.sleep(0)
        assert not body.is_eof()
        await server.shutdown(0.1)


async def test_a_connection_goes_on_after_the_body_of_a_refusal(proxy: Client) -> None:
    """A 404 does not end a connection: what was sent with it is no request."""
    first = b"POST /v1/async/x HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + b"GET " * 75_000
    second = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    seen = await proxy.raw(first + second)
    assert [part[:3] for part in seen.split(b"HTTP/1.1 ")[1:]] == [b"404", b"200"]


async def test_a_refusal_keeps_none_of_the_body(gateway: Gateway) -> None:
    """An error in a variable of a frame keeps the frame until the collector comes by, and that is rare."""
    proxy = compose(
        load_config({"upstreams": [{"base_url": gateway.url}], "store": {"max_bytes": "64KiB"}})
    )
    gc.collect()
    gc.disable()
    try:
        for max_total_bytes, kind in ((10, Overloaded), (10**9, RequestTooLarge)):
            before = sum(type(o) is kind for o in gc.get_objects())  # those of other tests
            proxy.body_reader.max_total_bytes, pieces = max_total_bytes, [b"x" * 30_000] * 3
            request = Mock(headers={}, content_length=None, version=(1, 1))
            request.content.is_eof.side_effect = lambda: False
            request.content.readany = AsyncMock(side_effect=pieces)
            with contextlib.suppress(kind):
                await proxy.body_reader.read(request)
            assert sum(type(o) is kind for o in gc.get_objects()) == before
    finally:
        gc.enable()


async def ask(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the answer to a first request has been read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b'"ok"' in await reader.readuntil(b"}")
    return reader, writer


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_one_connection_too_many_is_refused_and_closed(start: Start, method: str) -> None:
    proxy = await start(max_connections=2)
    open_ones = [await ask(proxy.url) for _ in range(2)]
    head, _, body = (await proxy.raw(f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode())).partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert {b"Retry-After: 1", b"Connection: close"} <= set(head.split(b"\r\n"))
    assert (json.loads(body)["error"]["code"] if method != "HEAD" else body) in ("overloaded", b"")
    for reader, writer in open_ones:  # they are as they were
        writer.write(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b'"ok"' in await reader.read()
        writer.close()
    async with asyncio.timeout(60):  # and there is room again
        while (
            await proxy.raw(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        ).startswith(b"HTTP/1.1 503"):
            await asyncio.sleep(0)


async def test_a_flood_is_cut_off_without_an_answer(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start(max_connections=1)
    first = await ask(proxy.url)
    port = int(proxy.url.rpartition(":")[2])
    waiting = await asyncio.open_connection("127.0.0.1", port)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):  # a reset, for nothing was read of it
        assert await reader.read() == b""
    waiting[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await waiting[0].read()).startswith(b"HTTP/1.1 503 ")
    assert [r.getMessage() for r in caplog.records if "refused" in r.getMessage()] == [
        "new connections are refused: there are 1"
    ]
    for each in (first[1], waiting[1], writer):
        each.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadHttpMessage("Missing 'Host' header in request."), "Missing 'Host' header in request"),
        (BadHttpMessage("Duplicate 'Host' header found."), "Duplicate 'Host' header found"),
        (BadHttpMessage("Invalid header token:\n\n  b'sk-secret'\n   ^"), "Invalid header token"),
        (LineTooLong(b"sk-secret", 9), "Got more than 9 bytes when reading"),
        (LineTooLong(bytearray(b"sk-secret"), 9), "Got more than 9 bytes when reading"),  # type: ignore[arg-type]
        (InvalidHeader("sk-secret"), "Invalid HTTP header"),
        (InvalidHeader(b"sk-'secret"), "Invalid HTTP header"),
        (BadStatusLine("sk-secret"), "Bad status line"),
        (InvalidURLError("http://sk-secret:x/"), "its target is no URL"),
        (BadHttpMessage(""), "unreadable"),
    ],
)
def test_a_reason_has_no_word_of_the_request(error: HttpProcessingError, reason: str) -> None:
    """Nor with aiohttp's parser in Python, which quotes in other places."""
    assert _reason(error, error.message) == reason


@pytest.mark.parametrize("lax", [False, True])
async def test_a_lax_parser_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, lax: bool
) -> None:
    parser = http_parser.HttpRequestParserPy if lax else object
    monkeypatch.setattr(http_parser, "HttpRequestParser", parser)
    async with listening(RouteTable([]), "127.0.0.1", 0):
        assert ("parser" in caplog.text) is lax


async def test_an_address_that_is_taken_is_a_clear_error(gateway: Gateway) -> None:
    table = compose(load_config({"upstreams": [{"base_url": gateway.url}]})).table
    port = int(gateway.url.rpartition(":")[2])
    with pytest.raises(
        StartupError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"
    ):
        async with listening(table, "127.0.0.1", port):
            raise AssertionError
