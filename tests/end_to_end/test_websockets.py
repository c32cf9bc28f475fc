"""WebSockets through the proxy, with the client and the server of the `websockets` package."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp.connector import Connection
from websockets import (
    ClientConnection,
    ConnectionClosed,
    ConnectionClosedError,
    InvalidStatus,
    ServerConnection,
    connect,
    serve,
)
from websockets.typing import Subprotocol

from asyncproxy.upstream.exchange import ConnectionPool
from tests.conftest import Client, Start
from tests.gateway import Gateway, answer, raw

PATH = "/v1/realtime?model=m"

UPGRADE = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"

Handler = Callable[[ServerConnection], Awaitable[None]]

quiet = logging.getLogger("test-websockets")
quiet.setLevel(logging.CRITICAL)


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


@asynccontextmanager
async def behind(start: Start, handler: Handler, **upstream: object) -> AsyncIterator[Client]:
    """A proxy in front of a WebSocket server."""
    async with serve(
        handler, "127.0.0.1", 0, max_size=None, subprotocols=[Subprotocol("realtime")], logger=quiet
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield await start(upstream={"base_url": f"http://127.0.0.1:{port}/v1", **upstream})


def connected(proxy: Client, **options: object) -> connect:
    url = proxy.url.replace("http", "ws", 1) + PATH
    protocols = [Subprotocol("realtime")]
    return connect(
        url,
        subprotocols=protocols,
        max_size=None,
        proxy=None,
        logger=quiet,
        **options,  # type: ignore[arg-type]
    )


async def test_messages_of_any_kind_and_size(start: Start) -> None:
    async with behind(start, echo) as proxy, connected(proxy) as client:
        for message in ("hello", "é 😀", b"\x00\xff\r\n", "", 10_000_000 * "x", 10_000_000 * b"\xff"):
            await client.send(message)
            assert await client.recv() == message


@pytest.mark.parametrize("chunk", [1, 100_000])
async def test_both_sides_speak_at_once(start: Start, chunk: int) -> None:
    async def flood(connection: ServerConnection) -> None:
        for _ in range(200):
            await connection.send(chunk * b"x")
        for _ in range(200):
            assert len(await connection.recv()) == chunk
        await connection.send("done")

    async with behind(start, flood) as proxy, connected(proxy) as client:
        sending = asyncio.gather(*[client.send(chunk * b"y") for _ in range(200)])
        for _ in range(200):
            assert len(await client.recv()) == chunk
        await sending
        assert await client.recv() == "done"


async def test_the_handshake_is_the_servers(start: Start) -> None:
    seen: list[ServerConnection] = []

    async def greet(connection: ServerConnection) -> None:
        seen.append(connection)
        await connection.send("hello")

    headers = {"Authorization": "Bearer theirs", "OpenAI-Beta": "realtime=v1"}
    async with (
        behind(start, greet, headers={"Authorization": "Bearer gateway-key"}) as proxy,
        connected(proxy, additional_headers=headers) as client,
    ):
        assert await client.recv() == "hello"
        assert client.subprotocol == "realtime"
        assert client.response is not None
        assert client.response.headers.get_all("Upgrade") == ["websocket"]
    request = seen[0].request
    assert request is not None
    assert request.path == PATH
    assert request.headers.get_all("Authorization") == ["Bearer gateway-key"]
    assert request.headers["OpenAI-Beta"] == "realtime=v1"
    assert request.headers["X-Forwarded-For"] == "127.0.0.1"


async def test_the_close_code_of_the_server_arrives(start: Start) -> None:
    async def refuse(connection: ServerConnection) -> None:
        await connection.close(4008, "no quota")

    async with behind(start, refuse) as proxy, connected(proxy) as client:
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4008, "no quota")


async def test_the_close_code_of_the_client_arrives(start: Start) -> None:
    closed = asyncio.get_running_loop().create_future()

    async def listen(connection: ServerConnection) -> None:
        await connection.wait_closed()
        closed.set_result((connection.close_code, connection.close_reason))

    async with behind(start, listen) as proxy:
        async with connected(proxy) as client:
            await client.close(4001, "enough")
        assert await closed == (4001, "enough")


async def test_pings_go_through_in_both_directions(start: Start) -> None:
    async def ping(connection: ServerConnection) -> None:
        await (await connection.ping(b"from the server"))
        await connection.send("ponged")
        await connection.wait_closed()

    async with behind(start, ping) as proxy, connected(proxy) as client:
        await (await client.ping(b"from the client"))
        assert await client.recv() == "ponged"


async def test_a_client_that_vanishes_takes_the_servers_side_with_it(start: Start) -> None:
    closed = asyncio.get_running_loop().create_future()

    async def listen(connection: ServerConnection) -> None:
        await connection.wait_closed()
        closed.set_result(connection.close_code)

    async with behind(start, listen) as proxy:
        client: ClientConnection = await connected(proxy)
        client.transport.abort()
        assert await closed == 1006
        await client.wait_closed()


async def test_what_a_client_said_last_arrives_though_it_has_left(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes nothing yet, so a part of it is still with us when the client leaves."""
    go_on = asyncio.Event()
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    take = ConnectionPool.take

    async def narrow(pool: ConnectionPool, connect_s: float) -> Connection:
        connection = await take(pool, connect_s)
        assert connection.transport is not None
        sock = connection.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection

    async def serve_it(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED)
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads too
        await go_on.wait()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        got.set_result(await reader.read())
        writer.close()

    monkeypatch.setattr(ConnectionPool, "take", narrow)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    async with await asyncio.start_server(serve_it, sock=listener):
        proxy = await start(upstream={"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}"})
        host, own_port = proxy.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(own_port))
        writer.write(UPGRADE + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        (passed,) = proxy.parts.pass_through._under_way
        words = b"".join(b"%09d " % number for number in range(20_000))
        writer.write(words[:150_000])
        while passed.received_bytes < 150_000:
            await asyncio.sleep(0)
        writer.write(words[150_000:])
        writer.close()
        while not passed.client_gone:
            await asyncio.sleep(0)
        go_on.set()
        assert await got == words


async def test_a_server_that_vanishes_takes_the_clients_side_with_it(start: Start) -> None:
    async def vanish(connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.abort()

    async with behind(start, vanish) as proxy:
        client = await connected(proxy)
        await client.send("x")
        with pytest.raises(ConnectionClosedError):
            await client.recv()
        assert client.close_code == 1006


async def test_silence_ends_a_tunnel(start: Start) -> None:
    async with behind(start, echo, timeout={"total": "300ms"}) as proxy:
        client = await connected(proxy, ping_interval=None)
        await client.send("x")
        assert await client.recv() == "x"
        with pytest.raises(ConnectionClosedError):
            await client.recv()


async def test_bytes_go_through_as_they_are(start: Start, gateway: Gateway) -> None:
    """Also those that come in one packet with the head."""
    gateway.behaviour = raw(SWITCHED + b"\x81\x02hi" + b"anything")
    proxy = await start()
    response = await proxy.raw(UPGRADE + b"\r\nunasked")
    head, _, rest = response.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 101 Switching Protocols",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
    ]
    assert rest == b"\x81\x02hianything"
    (got,) = gateway.received
    assert (got.header("Connection"), got.header("Upgrade")) == ("Upgrade", "websocket")
    assert got.header("Sec-WebSocket-Key") == "dGhlIHNhbXBsZSBub25jZQ=="


async def test_a_refusal_is_an_ordinary_response(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = answer({"error": {"message": "no"}}, status=403)
    proxy = await start()
    with pytest.raises(InvalidStatus) as caught:
        await connected(proxy)
    assert caught.value.response.status_code == 403
    assert caught.value.response.body == b'{"error": {"message": "no"}}'


@pytest.mark.parametrize(
    "switched",
    [
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        SWITCHED.replace(b"websocket", b"h2c"),
    ],
)
async def test_a_101_to_another_protocol_is_no_answer(
    start: Start, gateway: Gateway, switched: bytes
) -> None:
    gateway.behaviour = raw(switched)
    proxy = await start()
    response = await proxy.raw(UPGRADE + b"\r\n")
    assert response.startswith(b"HTTP/1.1 502 ")
    assert b"upstream_unreachable" in response


@pytest.mark.parametrize(
    "request_head",
    [
        UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"),
        UPGRADE.replace(b"Connection: keep-alive, Upgrade", b"Connection: close"),
        UPGRADE.replace(b"GET", b"POST") + b"Content-Length: 0\r\n",
    ],
)
async def test_what_is_no_upgrade_is_an_ordinary_request(
    start: Start, gateway: Gateway, request_head: bytes
) -> None:
    gateway.behaviour = answer(b"", status=426)
    proxy = await start()
    assert (await proxy.raw(request_head + b"\r\n")).startswith(b"HTTP/1.1 426 ")
    assert gateway.received[0].all("Upgrade") == []


async def test_a_key_is_needed_where_keys_are(start: Start, gateway: Gateway) -> None:
    proxy = await start(auth={"keys": ["sk-ours"]})
    with pytest.raises(InvalidStatus) as caught:
        await connected(proxy)
    assert caught.value.response.status_code == 401
    assert gateway.received == []


async def test_a_key_that_lets_in_is_not_for_the_gateway(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"", status=403)
    proxy = await start(auth={"keys": ["sk-ours"]})
    with pytest.raises(InvalidStatus):
        await connected(proxy, additional_headers={"Authorization": "Bearer sk-ours"})
    assert gateway.received[0].all("Authorization") == []


async def test_the_model_in_the_query_says_which_upstream(start: Start, gateway: Gateway) -> None:
    protocols = [Subprotocol("realtime")]
    async with serve(echo, "127.0.0.1", 0, subprotocols=protocols, logger=quiet) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        proxy = await start(
            upstreams=[
                {"name": "one", "base_url": f"{gateway.url}/v1", "models": ["other"]},
                {"name": "two", "base_url": f"http://127.0.0.1:{port}", "models": ["m"]},
            ]
        )
        async with connected(proxy) as client:
            await client.send("x")
            assert await client.recv() == "x"
        with pytest.raises(InvalidStatus) as caught:
            await connect(proxy.url.replace("http", "ws", 1) + "/v1/realtime?model=none", proxy=None)
        assert caught.value.response.status_code == 404
    assert gateway.received == []


@pytest.mark.parametrize("leaves", ["with a close frame", "without a word"])
async def test_a_tunnel_has_its_line_in_the_log(
    start: Start, caplog: pytest.LogCaptureFixture, leaves: str
) -> None:
    caplog.set_level(logging.INFO, "asyncproxy")
    async with behind(start, echo) as proxy:
        async with connected(proxy) as client:
            await client.send("hello")
            await client.recv()
            if leaves == "without a word":
                client.transport.abort()
        while proxy.parts.pass_through.under_way:
            await asyncio.sleep(0)
    (line,) = [r.__dict__ for r in caplog.records if r.getMessage().startswith("request ")]
    fields = line["fields"]
    assert (fields["status"], fields["outcome"], fields["path"]) == (101, "ok", "/v1/realtime")
