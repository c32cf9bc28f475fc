"""Calls as they go over the wire, and the connections that they go over."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from asyncproxy.core.errors import Interrupted, RequestTimeout, UpstreamTimeout, UpstreamUnreachable
from asyncproxy.core.jobs import Call, head_of
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.upstream.client import Upstream, UpstreamOptions
from asyncproxy.upstream.exchange import ConnectionPool, Exchange
from asyncproxy.upstream.registry import UpstreamRegistry

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
LARGE = b"x" * 3_000_000

Behave = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Wire:
    """A server that does what it is told to with each connection, and counts them."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[int] = []
        self.connections = 0
        self.url = ""

    async def request(self, reader: asyncio.StreamReader, *, body: bool = True) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if body:
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            self.bodies.append(len(await reader.readexactly(length)))


@asynccontextmanager
async def server(behave: Callable[[Wire], Behave]) -> AsyncIterator[Wire]:
    wire = Wire()
    on_connection = behave(wire)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.connections += 1
        try:
            await on_connection(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has closed it
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    wire.url = f"http://{host}:{port}"
    async with listener:
        yield wire


@asynccontextmanager
async def upstream(wire: Wire, *headers: tuple[str, str]) -> AsyncIterator[Upstream]:
    found = Upstream(UpstreamOptions("up", f"{wire.url}/base", headers=headers), HeavyWork())
    async with found.connected():
        yield found


def answering(*answers: bytes) -> Callable[[Wire], Behave]:
    """Reads each request whole, and answers all of them with ``answers``, on a kept connection."""

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await wire.request(reader)
                for answer in answers:
                    writer.write(answer)
                    await asyncio.sleep(0.01)

        return on_connection

    return behave


def call(body: bytes = b"{}", *fields: tuple[str, str]) -> Call:
    return Call("embeddings", "/v1/embeddings?a=%20b", head_of(fields), body)


async def test_what_is_sent() -> None:
    async with server(answering(OK)) as wire, upstream(wire, ("api-key", "ours")) as up:
        answer = await up.call(
            call(b"[1]", ("X-One", "é"), ("X-One", "2"), ("Api-Key", "theirs")), timeout_s=9
        )
        assert (answer.status, answer.body) == (200, b"{}")
        host = wire.url.removeprefix("http://")
        assert wire.heads[0].decode().split("\r\n") == [
            "POST /base/embeddings?a=%20b HTTP/1.1",
            f"Host: {host}",
            "api-key: ours",
            "Accept-Encoding: identity",
            "X-One: é",
            "X-One: 2",
            "Content-Length: 3",
            "",
            "",
        ]


async def test_a_field_of_the_operator_is_the_only_one() -> None:
    ours = (("host", "inner.example"), ("ACCEPT-ENCODING", "gzip"))
    async with server(answering(OK)) as wire, upstream(wire, *ours) as up:
        await up.call(call(b"{}", ("Accept-Encoding", "br")), timeout_s=9)
        head = wire.heads[0].lower()
        assert (head.count(b"\r\nhost:"), head.count(b"\r\naccept-encoding:")) == (1, 1)
        assert b"\r\nhost: inner.example\r\n" in head
        assert b"\r\naccept-encoding: identity\r\n" in head


@pytest.mark.parametrize("body", [b"{}", LARGE])
async def test_a_connection_is_used_again(body: bytes) -> None:
    async with server(answering(OK)) as wire, upstream(wire) as up:
        for _ in range(3):
            assert (await up.call(call(body), timeout_s=9)).status == 200
        assert (wire.connections, wire.bodies) == (1, 3 * [len(body)])


async def test_what_comes_before_the_answer_is_not_the_answer() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    async with server(answering(hints, hints, OK)) as wire, upstream(wire) as up:
        assert (await up.call(call(), timeout_s=9)).status == 200
        assert (await up.call(call(), timeout_s=9)).status == 200
        assert wire.connections == 1


@pytest.mark.parametrize("size", [250_000, 30_000_000])
async def test_an_answer_that_comes_before_the_body_was_sent(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts, and nothing else is sent over a connection that is in the middle of a request."""

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.request(reader, body=False)
            writer.write(OK.replace(b"200 OK", b"413 Large"))
            await asyncio.sleep(30)

        return on_connection

    take = ConnectionPool.take

    async def narrow(pool: ConnectionPool, connect_s: float) -> Connection:
        connection = await take(pool, connect_s)
        assert connection.transport is not None
        sock = connection.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is not read stays with us
        return connection

    monkeypatch.setattr(ConnectionPool, "take", narrow)
    async with server(behave) as wire, upstream(wire) as up:
        for _ in range(2):
            assert (await up.call(call(size * b"x"), timeout_s=9)).status == 413
        assert wire.connections == 2


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_nobody_asked_for_is_nobodys_answer(pause_s: float, *, streamed: bool) -> None:
    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await wire.request(reader)
                writer.write(OK)
                await asyncio.sleep(pause_s)
                writer.write(OK.replace(b"{}", b"[]"))

        return on_connection

    async with server(behave) as wire, upstream(wire) as up:
        for number in range(1, 4):
            if streamed:
                async with up.exchange("POST", "/v1/models", b"", b"{}") as response:
                    body = await response.read()
            else:
                body = (await up.call(call(), timeout_s=9)).body
            assert (body, wire.connections) == (b"{}", number)
            await asyncio.sleep(3 * pause_s)


@pytest.mark.parametrize("body", [b"{}", LARGE])
async def test_what_comes_before_a_request_was_sent_is_not_its_answer(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request waits for others for a moment: its connection may say something meanwhile."""
    writers: list[asyncio.StreamWriter] = []

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            while True:
                await wire.request(reader)
                writer.write(OK)

        return on_connection

    write = Exchange._write

    def write_later(exchange: Exchange, protocol: ResponseHandler) -> None:
        writers[-1].write(OK)
        asyncio.get_running_loop().call_later(0.05, write, exchange, protocol)

    async with server(behave) as wire, upstream(wire) as up:
        assert (await up.call(call(), timeout_s=9)).status == 200
        with monkeypatch.context() as patch:
            patch.setattr(Exchange, "_write", write_later)
            with pytest.raises(UpstreamUnreachable) as caught:
                await up.call(call(body), timeout_s=9)
        assert "an answer came before its request" in caught.value.detail
        await asyncio.sleep(0.1)
        assert len(wire.heads) == 1
        assert (await up.call(call(), timeout_s=9)).status == 200


async def test_a_connection_that_is_to_be_closed_is_not_used_again() -> None:
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    async with server(answering(closing)) as wire, upstream(wire) as up:
        for _ in range(2):
            assert (await up.call(call(), timeout_s=9)).status == 200
        assert wire.connections == 2


@pytest.mark.parametrize("body", [b"{}", LARGE])
async def test_a_call_that_is_given_up_leaves_no_connection_behind(body: bytes) -> None:
    closed: list[bool] = []

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.request(reader, body=False)
            while await reader.read(100_000):
                pass
            closed.append(True)

        return on_connection

    async with server(behave) as wire, upstream(wire) as up:
        with pytest.raises(UpstreamTimeout):
            await up.call(call(body), timeout_s=0.2)
        task = asyncio.create_task(up.call(call(body), timeout_s=9))
        while len(wire.heads) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(60):
            while len(closed) < 2:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"what?\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_what_is_no_answer_is_an_error(answer: bytes) -> None:
    async with server(answering(answer)) as wire, upstream(wire) as up:
        for _ in range(2):
            with pytest.raises(UpstreamUnreachable):
                await up.call(call(), timeout_s=9)
        assert wire.connections == 2


@pytest.mark.parametrize("value", ["a\rb", "a\0b", "\udcff"])
async def test_a_field_that_would_split_the_head_is_not_sent(value: str) -> None:
    async with server(answering(OK)) as wire, upstream(wire) as up:
        with pytest.raises(Interrupted):
            await up.call(call(b"{}", ("X-One", value)), timeout_s=9)
        assert wire.heads == []


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("POST", b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n"),
        ("POST", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("POST", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ],
)
async def test_a_late_body_is_not_the_next_answer(method: str, answer: bytes) -> None:
    """It comes when the next request is on its way already, and looks like an answer to it."""

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first = wire.connections == 1
            await wire.request(reader)
            writer.write(answer if first else OK)
            await wire.request(reader)
            writer.write(OK.replace(b"{}", b"[]"))

        return on_connection

    async with server(behave) as wire, upstream(wire) as up:
        async with up.exchange(method, "/v1/x", b"", b"{}") as response:
            assert (response.has_body, response.at_end()) == (False, True)
        for _ in range(2):
            assert (await up.call(call(), timeout_s=9)).body in (b"{}", b"[]")
        assert (wire.connections, len(wire.heads)) == (2, 3)


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("POST", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"),
        ("POST", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        ("POST", b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n"),
    ],
)
async def test_a_response_without_a_body_keeps_its_connection(method: str, answer: bytes) -> None:
    async with server(answering(answer)) as wire, upstream(wire) as up:
        for _ in range(3):
            async with up.exchange(method, "/v1/x", b"", b"{}") as response:
                assert response.at_end()
        assert wire.connections == 1


@pytest.mark.parametrize("framing", [b"Content-Length: 2", b"Transfer-Encoding: chunked"])
async def test_what_comes_before_the_answer_has_no_body(framing: bytes) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\n%b\r\n\r\n" % framing
    async with server(answering(hints + OK)) as wire, upstream(wire) as up:
        with pytest.raises(UpstreamUnreachable) as caught:
            await up.call(call(), timeout_s=9)
        assert caught.value.detail == "NotHttpError: a 103 with a body"
        assert caught.value.delivered


async def test_a_body_that_cannot_be_had_ends_the_exchange_with_its_error() -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"half"
        raise RequestTimeout("too slow")

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.request(reader, body=False)
            await reader.read()

        return on_connection

    async with server(behave) as wire, upstream(wire) as up:
        with pytest.raises(RequestTimeout):
            async with up.exchange("POST", "/v1/x", b"", broken()):
                pytest.fail("there is no response")


async def test_the_end_of_an_exchange_ends_its_body() -> None:
    """An early response: whoever reads the client must not go on when the exchange is over."""
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0)
        finally:
            closed.set()

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.request(reader, body=False)
            writer.write(OK)
            await reader.read()

        return on_connection

    async with server(behave) as wire, upstream(wire) as up:
        async with up.exchange("POST", "/v1/x", b"", endless()) as response:
            assert await response.read() == b"{}"
        assert closed.is_set()


@pytest.mark.parametrize(
    ("base_url", "delivered"),
    [
        ("http://127.0.0.1:1", False),
        ("http://gateway.invalid", False),
        ("unix:/nowhere/gateway.sock", False),
    ],
)
async def test_an_upstream_that_was_never_reached(base_url: str, *, delivered: bool) -> None:
    found = Upstream(UpstreamOptions("up", base_url), HeavyWork())
    async with found.connected():
        with pytest.raises(UpstreamUnreachable) as caught:
            await found.call(call(), timeout_s=9)
        assert caught.value.delivered is delivered


async def test_a_connection_that_is_not_taken_was_never_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", never)
    found = Upstream(UpstreamOptions("up", "http://127.0.0.1:1", connect_s=0.05), HeavyWork())
    async with found.connected():
        with pytest.raises(UpstreamUnreachable, match="in time") as caught:
            await found.call(call(), timeout_s=9)
        assert not caught.value.delivered


async def test_tls_that_fails_was_never_reached() -> None:
    def behave(_wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        return on_connection

    async with server(behave) as wire:
        found = Upstream(UpstreamOptions("up", wire.url.replace("http", "https")), HeavyWork())
        async with found.connected():
            with pytest.raises(UpstreamUnreachable, match="TLS handshake") as caught:
                await found.call(call(), timeout_s=9)
        assert not caught.value.delivered


async def test_a_call_that_broke_off_may_have_been_delivered() -> None:
    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.request(reader)
            writer.transport.abort()

        return on_connection

    async with server(behave) as wire, upstream(wire) as up:
        with pytest.raises(UpstreamUnreachable) as caught:
            await up.call(call(), timeout_s=9)
        assert caught.value.delivered


async def test_nothing_is_kept_for_an_upstream_that_a_reload_removed() -> None:
    async with server(answering(OK)) as wire:
        one, two = (UpstreamOptions(name, wire.url) for name in ("one", "two"))
        registry = UpstreamRegistry([one, two], HeavyWork())
        async with registry.connected():
            for up in registry.values():
                assert (await up.call(call(), timeout_s=9)).status == 200
            removed = weakref.ref(registry["two"])
            del up
            registry.replace(await registry.prepare([one]))
            await asyncio.gather(*registry._retiring)
            await asyncio.sleep(0)
            gc.collect()
            assert removed() is None
            assert list(registry._open) == [registry["one"]]
            assert registry._retiring == set()


async def test_an_upstream_that_a_reload_removed_ends_what_is_under_way() -> None:
    go_on = asyncio.Event()

    def behave(wire: Wire) -> Behave:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.request(reader)
            writer.write(OK[:-1])
            await go_on.wait()
            writer.write(OK[-1:])

        return on_connection

    async with server(behave) as wire:
        options = UpstreamOptions("one", wire.url)
        registry = UpstreamRegistry([options], HeavyWork())
        async with registry.connected():
            async with registry["one"].exchange("POST", "/v1/x", b"", b"{}") as response:
                registry.replace(await registry.prepare([UpstreamOptions("two", wire.url)]))
                (retiring,) = registry._retiring
                assert await response.read() == b"{"
                assert not retiring.done()
                go_on.set()
                assert await response.read() == b"}"
            await retiring


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
async def test_a_large_answer_is_checked_as_it_arrives_with_a_byte_order_mark_too(mark: bytes) -> None:
    body = mark + b"[" + b"1.5," * 200_000 + b"1]"
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with server(answering(head + body)) as wire, upstream(wire) as up:
        response = await up.call(call(), timeout_s=9)
        assert response.body == body
        assert response.checked
