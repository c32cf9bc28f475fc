"""A streaming reverse proxy that a picky user cannot tell from a direct connection."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests import gateway as gateways
from tests.conftest import Client, Start
from tests.gateway import Gateway, Received, answer, hang, raw

HEAD = b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n"


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def split(response: bytes) -> tuple[list[bytes], bytes]:
    head, _, body = response.partition(b"\r\n\r\n")
    return head.split(b"\r\n"), body


async def test_the_response_is_the_upstreams_byte_for_byte(proxy: Client, gateway: Gateway) -> None:
    head = (
        b"HTTP/1.1 418 I'm a Teapot\r\nserver: odd/1\r\nSet-Cookie: a=1; Path=/\r\nX-Weird:  caf\xe9 \r\n"
        b"Set-Cookie: b=2\r\nContent-Type: text/x\r\nContent-Length: 3\r\nDate: yesterday\r\n"
    )
    gateway.behaviour = raw(head + b"Keep-Alive: 5\r\nConnection: X-Hop\r\nX-Hop: gone\r\n\r\nabc")
    lines, body = split(await proxy.raw(HEAD))
    expected = head.replace(b"X-Weird:  caf\xe9 \r\n", b"X-Weird: caf\xe9\r\n").split(b"\r\n")[:-1]
    assert lines == [*expected, b"Connection: close"]
    assert body == b"abc"


async def test_the_request_is_the_clients(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"")
    await proxy.raw(
        b"PATCH /v1/x%2Fy/z//?a=%20+&a=%C3%A9&empty HTTP/1.1\r\nHost: proxy\r\nX-A: 1\r\nX-A: 2\r\nCookie: session=1\r\n"
        b"Accept-Encoding: br\r\nX-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\nX-Request-Id: mine\r\n"
        b"traceparent: 00-a-b-01\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\nPrefer: respond-later\r\n"
        b"Content-Length: 4\r\n\r\n\x00\xff\r\n"
    )
    (got,) = gateway.received
    assert (got.method, got.target, got.body) == (
        "PATCH",
        "/v1/x%2Fy/z//?a=%20+&a=%C3%A9&empty",
        b"\x00\xff\r\n",
    )
    assert got.all("X-A") == ["1", "2"]
    assert got.header("Cookie") == "session=1"
    assert got.header("Accept-Encoding") == "br"
    assert got.header("Host") == gateway.url.removeprefix("http://")
    assert got.header("X-Forwarded-For") == "10.0.0.1, 127.0.0.1"
    assert got.header("X-Forwarded-Proto") == "https"
    assert got.header("X-Forwarded-Host") == "proxy"
    assert got.header("X-Request-Id") == "mine"
    assert got.header("traceparent") == "00-a-b-01"
    assert got.header("Prefer") == "respond-later"
    for gone in ("X-Hop", "TE", "Connection", "User-Agent", "Accept"):
        assert got.all(gone) == []


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_any_method(proxy: Client, gateway: Gateway, method: str) -> None:
    gateway.behaviour = answer({"m": method})
    assert (await proxy.request(method, "/anything")).json() == {"m": method}
    assert gateway.received[0].method == method
    assert gateway.received[0].target == "/anything"


async def test_head_has_the_headers_and_no_body(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\nX: y\r\n\r\n", close=False)
    for _ in range(2):  # on one connection: the first must not leave it waiting for a body
        response = await proxy.request("HEAD", "/v1/models")
        assert (response.status, response.headers["Content-Length"], response.body) == (
            200,
            "1234",
            b"",
        )


@pytest.mark.parametrize("status", [204, 304])
async def test_statuses_without_a_body(proxy: Client, gateway: Gateway, status: int) -> None:
    gateway.behaviour = raw(b"HTTP/1.1 %d X\r\nETag: w\r\n\r\n" % status, close=False)
    for _ in range(2):
        lines, body = split(await proxy.raw(HEAD))
        assert lines == [b"HTTP/1.1 %d X" % status, b"ETag: w", b"Connection: close"]
        assert body == b""


async def test_an_empty_post_says_so(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"")
    await proxy.raw(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    assert gateway.received[0].header("Content-Length") == "0"


async def test_compressed_bodies_stay_compressed(proxy: Client, gateway: Gateway) -> None:
    data = gzip.compress(b"x" * 1000)
    gateway.behaviour = answer(data, headers=[("Content-Encoding", "gzip")])
    response = await proxy.post("/v1/x", data, headers={"Content-Encoding": "gzip"})
    assert (response.body, response.headers["Content-Encoding"]) == (data, "gzip")
    assert gateway.received[0].body == data
    assert gateway.received[0].header("Content-Encoding") == "gzip"


async def test_trailers_do_not_hurt(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n",
        close=False,
    )
    for _ in range(3):
        response = await proxy.get("/v1/x")
        assert (response.status, response.body) == (200, b"abc")
    assert gateway.open_connections == 1


async def test_a_body_that_ends_with_the_connection(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = raw(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
    assert (await proxy.get("/v1/x")).body == b"all of it"
    lines, body = split(await proxy.raw(b"GET / HTTP/1.0\r\n\r\n"))
    assert b"Transfer-Encoding: chunked" not in lines
    assert body == b"all of it"


async def test_events_arrive_as_they_are_sent(proxy: Client, gateway: Gateway) -> None:
    seen = asyncio.Queue[None]()

    async def stream(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for number in range(3):
            await seen.get()
            event = b"data: %d\n\n" % number
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await seen.get()
        writer.write(b"0\r\n\r\n")

    gateway.behaviour = stream
    async with proxy.session.get(
        proxy.url + "/v1/events"
    ) as response:  # the head comes before any event
        for number in range(3):
            seen.put_nowait(None)
            assert await response.content.readany() == b"data: %d\n\n" % number
        seen.put_nowait(None)
        assert await response.content.readany() == b""


async def test_both_directions_at_once(start: Start) -> None:
    """Each piece of the request is at the upstream before the next one is sent."""
    pieces = asyncio.Queue[bytes]()

    async def serve(upstream: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        await upstream.readuntil(b"\r\n\r\n")
        for _ in range(3):
            size = int(await upstream.readline(), 16)
            pieces.put_nowait(await upstream.readexactly(size))
            await upstream.readline()
        out.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        out.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        proxy = await start(upstream={"base_url": f"http://127.0.0.1:{port}"})
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy.url))
        writer.write(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            writer.write(b"5\r\nping%d\r\n" % number)
            assert await pieces.get() == b"ping%d" % number
        writer.write(b"0\r\n\r\n")
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        writer.close()


async def test_a_hundred_megabytes_in_constant_memory(proxy: Client, gateway: Gateway) -> None:
    piece, count = b"x" * 1024**2, 100
    digest = hashlib.sha256()

    async def flood(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (count * len(piece)))
        for _ in range(count):
            writer.write(piece)
            await writer.drain()

    gateway.behaviour = flood
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with proxy.session.get(proxy.url + "/v1/big") as response:
        async for got in response.content.iter_any():
            digest.update(got)
    assert digest.hexdigest() == hashlib.sha256(piece * count).hexdigest()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 150 * 1024  # what the comparison itself takes, and not twice that


async def test_a_client_that_leaves_takes_the_call_with_it(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    _, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy.url))
    writer.write(HEAD)
    await gateway.until(lambda: gateway.busy == 1)
    writer.close()
    await gateway.until(lambda: gateway.open_connections == 0)


async def test_a_client_that_leaves_in_the_middle(proxy: Client, gateway: Gateway) -> None:
    async def endless(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"5\r\nhello\r\n")
            await writer.drain()
            await asyncio.sleep(0.001)

    gateway.behaviour = endless
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy.url))
    writer.write(HEAD)
    await reader.readuntil(b"hello")
    writer.transport.abort()
    await gateway.until(lambda: gateway.open_connections == 0)


@pytest.mark.parametrize(
    "beginning",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
async def test_an_upstream_that_dies_half_way_breaks_the_client_too(
    proxy: Client, gateway: Gateway, beginning: bytes
) -> None:
    gateway.behaviour = raw(beginning)
    response = await proxy.raw(HEAD.replace(b"Connection: close\r\n", b""))
    assert b"half" in response
    assert not response.endswith(b"0\r\n\r\n")
    declared = b"Content-Length: 100" in response
    assert declared or b"Transfer-Encoding: chunked" in response
    old = b"GET / HTTP/1.0\r\n\r\n"
    if not declared:  # with no framing, only a reset tells a broken body from a whole one
        with pytest.raises(ConnectionResetError):
            await _read_all(proxy, old)


async def test_a_chunk_that_is_none_breaks_the_client_too(start: Start, gateway: Gateway) -> None:
    seen = asyncio.Event()

    async def derail(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await seen.wait()
        writer.write(b"zz\r\n")

    gateway.behaviour = derail
    proxy = await start(upstream={"retry": {"attempts": 1}})
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy.url))
    writer.write(HEAD.replace(b"Connection: close\r\n", b""))
    await reader.readuntil(b"half")
    job = await proxy.submit()
    await gateway.until(lambda: gateway.busy == 2)
    seen.set()
    assert await reader.read() == b"\r\n"
    writer.close()
    assert (await proxy.outcome(job))["status_code"] == 502


async def test_a_client_that_stalls_after_the_answer_began_gets_no_second_one(
    start: Start, gateway: Gateway
) -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n" + b"x" * 10)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(early, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        proxy = await start(upstream={"base_url": f"http://127.0.0.1:{port}"}, client_timeout="200ms")
        response = await proxy.raw(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf")
    assert response.endswith(b"\r\n\r\n" + b"x" * 10)
    assert response.count(b"HTTP/1.1") == 1


async def _read_all(proxy: Client, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy.url))
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        (raw(b""), 502, "upstream_unreachable"),
        (raw(b"garbage\r\n\r\n"), 502, "upstream_unreachable"),
        (gateways.reset, 502, "upstream_unreachable"),
        (hang, 504, "upstream_timeout"),
        (raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), 502, "upstream_unreachable"),
    ],
)
async def test_no_answer(
    start: Start, gateway: Gateway, behaviour: Any, status: int, code: str
) -> None:
    gateway.behaviour = behaviour
    proxy = await start(upstream={"timeout": {"total": "200ms" if behaviour is hang else "20s"}})
    for _ in range(2):
        response = await proxy.post("/v1/embeddings")
        assert (response.status, response.code) == (status, code)
        assert "127.0.0.1" not in response.body.decode()
        assert response.json()["extra_fields"]["provider"] == "gateway"


async def test_a_stream_that_falls_silent_is_broken_off(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", close=False
    )
    proxy = await start(upstream={"timeout": {"total": "300ms"}})
    response = await proxy.raw(HEAD)
    assert b"half" in response
    assert not response.endswith(b"0\r\n\r\n")


async def test_a_slow_stream_may_last_longer_than_the_timeout(start: Start, gateway: Gateway) -> None:
    async def slow(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        for _ in range(10):
            await asyncio.sleep(0.075)
            writer.write(b"x")

    gateway.behaviour = slow
    proxy = await start(upstream={"timeout": {"total": "500ms"}})
    assert (await proxy.get("/v1/slow")).body == b"x" * 10


async def test_expect_100_continue(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"ok": 1})
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy.url))
    writer.write(
        b"POST /v1/x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"body")
    assert (await reader.read()).endswith(b'{"ok": 1}')
    assert gateway.received[0].body == b"body"
    assert gateway.received[0].header("Expect") is None
    writer.close()


async def test_another_upgrade_is_not_for_the_upstream(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"ok": 1})
    response = await proxy.raw(
        b"GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n\r\n"
    )
    assert response.startswith(b"HTTP/1.1 200 ")
    for gone in ("Upgrade", "HTTP2-Settings", "Connection"):
        assert gateway.received[0].all(gone) == []


async def test_trace_and_connect_are_refused(proxy: Client, gateway: Gateway) -> None:
    response = await proxy.raw(b"TRACE /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 405 ")
    response = await proxy.raw(
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\nConnection: close\r\n\r\n"
    )
    assert response.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 405 "))
    assert gateway.received == []


async def test_the_absolute_form_goes_to_our_upstream(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"ok": 1})
    await proxy.raw(
        b"GET http://evil.example/v1/models?a=1 HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    )
    assert gateway.received[0].target == "/v1/models?a=1"


async def test_cookies_of_one_client_are_not_anothers(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"", headers=[("Set-Cookie", "session=alice; Path=/")])
    await proxy.get("/v1/a")
    await proxy.get("/v1/b")
    assert [r.all("Cookie") for r in gateway.received] == [[], []]


async def test_connections_to_the_upstream_are_reused(proxy: Client, gateway: Gateway) -> None:
    for _ in range(5):
        await proxy.post("/v1/embeddings")
    assert gateway.open_connections == 1


async def test_redirects_are_the_clients_to_follow(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"", status=307, headers=[("Location", "/elsewhere")])
    response = await proxy.post("/v1/x")
    assert (response.status, response.headers["Location"]) == (307, "/elsewhere")
    assert len(gateway.received) == 1


# Upstreams: which one, and how to reach it.


async def test_headers_of_the_operator_replace_the_clients(start: Start, gateway: Gateway) -> None:
    proxy = await start(
        upstream={"headers": {"authorization": "Bearer gateway-key", "X-Team": "search"}}
    )
    mine = {"Authorization": "Bearer sk-mine", "x-team": "other"}
    await proxy.post("/v1/embeddings", headers=mine)
    path = await proxy.submit(headers=mine)
    done = await proxy.outcome(path, headers=mine)
    for got in gateway.received:
        assert got.header("Authorization") == "Bearer gateway-key"
        assert got.header("X-Team") == "search"
    assert "gateway-key" not in str(done)


async def test_a_base_url_without_a_path_keeps_the_clients(start: Start, gateway: Gateway) -> None:
    proxy = await start(upstream={"base_url": gateway.url})
    await proxy.post("/v1/embeddings")
    await proxy.outcome(await proxy.submit())
    assert [r.target for r in gateway.received] == ["/v1/embeddings", "/v1/embeddings"]


async def test_a_base_url_with_a_path_stands_for_v1(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = answer({})
    proxy = await start(upstream={"base_url": f"{gateway.url}/openai/deployments/x/"})
    await proxy.post("/v1/embeddings?a=1")
    await proxy.outcome(await proxy.submit())
    await proxy.get("/v1")
    await proxy.get("/health")
    await proxy.get("/v1beta/x")
    assert [r.target for r in gateway.received] == [
        "/openai/deployments/x/embeddings?a=1",
        "/openai/deployments/x/embeddings",
        "/openai/deployments/x",
        "/health",
        "/v1beta/x",
    ]


async def test_models_choose_the_upstream(start: Start, gateway: Gateway) -> None:
    async with gateways.running() as other:
        retry = {"attempts": 1}
        proxy = await start(
            upstreams=[
                {"name": "one", "base_url": f"{gateway.url}/v1", "models": ["bge-*"], "retry": retry},
                {
                    "name": "two",
                    "base_url": f"{other.url}/v1",
                    "models": ["text-*", "bge-m3"],
                    "retry": retry,
                },
            ]
        )
        for model, target in (("bge-m3", gateway), ("text-3", other)):
            body = {"model": model, "input": "x"}
            assert (await proxy.post("/v1/embeddings", body)).status == 200
            assert (await proxy.outcome(await proxy.submit(body)))["status"] == "completed"
            assert [r.json()["model"] for r in target.received] == [model, model]
        other.behaviour = gateway.behaviour = answer({"first": True})
        for odd in (b"not json", b'{"input":"x"}', json.dumps({"model": 7}).encode()):
            assert (await proxy.post("/v1/embeddings", odd)).json() == {"first": True}
        large = {"model": "text-3", "input": "x" * 1024**2}
        assert (await proxy.post("/v1/embeddings", large)).status == 200
        assert (await proxy.get("/v1/models")).status == 200
        assert (len(gateway.received), len(other.received)) == (7, 2)


@pytest.mark.parametrize("size", [0, 100_000, 1024**2 - 100])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    "content_type", [b"application/json", b"application/x-www-form-urlencoded", b""]
)
async def test_small_json_finds_its_upstream_however_it_is_framed(
    start: Start, gateway: Gateway, size: int, content_type: bytes, *, chunked: bool
) -> None:
    """In pieces, and not in one packet with its head. The other upstream, and its key, get nothing."""
    gateway.behaviour = answer({"first": True})
    async with gateways.running() as other:
        other.behaviour = answer({"second": True})
        proxy = await start(
            upstreams=[
                {"name": "one", "base_url": f"{gateway.url}/v1", "models": ["bge-*"]},
                {"name": "two", "base_url": f"{other.url}/v1", "models": ["text-*"]},
            ]
        )
        body = json.dumps({"input": "x" * size, "model": "text-3"}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy.url))
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        writer.write(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
            b"Content-Type: %b\r\n%b\r\n\r\n" % (content_type, framing)
        )
        await reader.readuntil(b"100 Continue\r\n\r\n")
        for piece in (body[:10], body[10:]):
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
        writer.write(b"0\r\n\r\n" if chunked else b"")
        assert (await reader.read()).endswith(b'{"second": true}')
        writer.close()
        assert (gateway.received, [got.body for got in other.received]) == ([], [body])


async def test_what_is_too_large_to_be_looked_into_streams_from_its_beginning(
    start: Start, gateway: Gateway
) -> None:
    gateway.behaviour = answer({"first": True})
    proxy = await start(
        upstreams=[
            {"name": "one", "base_url": f"{gateway.url}/v1", "models": ["bge-*"]},
            {"name": "two", "base_url": "http://127.0.0.1:1", "models": ["text-*"]},
        ]
    )
    body = json.dumps({"input": "x" * 3 * 1024**2, "model": "text-3"}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 100_000):
            yield body[at : at + 100_000]

    response = await proxy.request("POST", "/v1/embeddings", data=pieces())
    assert (response.status, gateway.received[0].body) == (200, body)


@pytest.mark.parametrize("kind", ["chunked", "whole"])
async def test_a_body_that_is_looked_into_counts_among_those_being_read(
    start: Start, gateway: Gateway, kind: str
) -> None:
    proxy = await start(
        upstreams=[{"name": "one", "base_url": f"{gateway.url}/v1", "models": ["m"]}],
    )
    proxy.parts.body_reader.max_total_bytes = 10_000

    async def pieces() -> AsyncIterator[bytes]:
        yield b" " * 500_000
        yield b"{}"

    headers = {} if kind == "chunked" else {"Content-Length": "500002"}
    response = await proxy.request("POST", "/v1/x", data=pieces(), headers=headers)
    assert (response.status, response.code) == (503, "overloaded")
    assert gateway.received == []
    assert proxy.parts.body_reader._total == 0


@pytest.mark.parametrize("field", ["Location", "content-location"])
async def test_a_location_at_the_upstreams_own_origin_is_ours(
    start: Start, gateway: Gateway, field: str
) -> None:
    proxy = await start(upstream={"base_url": f"{gateway.url}/inner"})
    for given, expected in (
        (f"{gateway.url}/inner/x/?a=1#b", "/v1/x/?a=1#b"),
        (f"{gateway.url}/other", "/other"),
        ("https://elsewhere.example/inner/x", "https://elsewhere.example/inner/x"),
        ("/inner/x", "/inner/x"),
    ):
        gateway.behaviour = answer(b"", status=307, headers=[(field, given), ("X-Other", given)])
        response = await proxy.get("/v1/x")
        assert response.headers[field] == expected
        assert response.headers["X-Other"] == given
    gateway.behaviour = answer(b"", status=307, headers=[(field, f"{gateway.url}/inner/x")])
    job = await proxy.submit()
    await proxy.outcome(job)
    assert (await proxy.get(f"{job}/content")).headers[field] == "/v1/x"


async def test_a_request_field_that_is_not_utf_8_goes_through(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"")
    await proxy.raw(HEAD.replace(b"\r\n\r\n", b"\r\nX-Latin: caf\xe9\r\n\r\n"))
    assert gateway.received[0].header("X-Latin") == "caf\xe9"


async def test_a_unix_socket(start: Start, tmp_path: Path) -> None:
    async with gateways.running(path=str(tmp_path / "g.sock")) as local:
        proxy = await start(upstream={"base_url": f"{local.url}:/v1"})
        assert (await proxy.post("/v1/embeddings")).status == 200
        assert (await proxy.outcome(await proxy.submit()))["status"] == "completed"


async def test_tls_is_verified(start: Start, tmp_path: Path) -> None:
    import ssl

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with gateways.running(ssl=context) as secure:
        base = f"{secure.url}/v1"
        proxy = await start(upstream={"base_url": base})
        response = await proxy.post("/v1/embeddings")
        assert (response.status, response.code) == (502, "upstream_unreachable")
        assert "certificate" in response.json()["error"]["message"]
        for trusting in ({"ca_file": str(tmp_path / "ca.pem")}, {"insecure_skip_verify": True}):
            proxy = await start(upstream={"base_url": base, **trusting})
            assert (await proxy.post("/v1/embeddings")).status == 200
            assert (await proxy.outcome(await proxy.submit()))["status"] == "completed"


# The proxy's own keys.


async def test_keys(start: Start, gateway: Gateway) -> None:
    proxy = await start(auth={"keys": ["sk-ours", "sk-second"]})
    path = "/v1/async/embeddings"
    for headers in (
        {},
        {"Authorization": "Bearer sk-wrong"},
        {"x-api-key": "sk-our"},
        {"x-bf-vk": "sk-wrong", "Authorization": "Bearer sk-ours"},
    ):
        for response in (
            await proxy.post(path, headers=headers),
            await proxy.get(path + "/x", headers=headers),
            await proxy.post("/v1/embeddings", headers=headers),
            await proxy.get("/", headers=headers),
        ):
            assert (response.status, response.code) == (401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert gateway.received == []
    assert (await proxy.get("/-/healthy")).status == 200
    ours = {"Authorization": "Bearer sk-ours", "x-api-key": "the gateway's"}
    job = await proxy.submit(headers=ours)
    assert (await proxy.get(job, headers={"x-api-key": "sk-second"})).status == 404
    await proxy.outcome(job, headers={"x-api-key": "sk-ours"})
    assert (await proxy.post("/v1/embeddings", headers=ours)).status == 200
    for got in gateway.received:  # our key is not for the gateway to see
        assert got.all("Authorization") == []
        assert got.header("x-api-key") == "the gateway's"
