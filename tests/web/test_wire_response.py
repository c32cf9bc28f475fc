"""Answers whose head is written by hand, over real connections, against those that aiohttp writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web
from aiohttp.http_writer import StreamWriter
from aiohttp.test_utils import TestClient

from asyncproxy.core.errors import MethodNotAllowed, RequestTooLarge, TooManyJobs
from asyncproxy.web.routes import Route, RouteTable, add_to
from asyncproxy.web.server import listening
from asyncproxy.web.wire_response import (
    WireResponse,
    error_response,
    http_date,
    json_response,
    status_line,
)

Make = Callable[[], WireResponse]
AiohttpClient = Callable[[web.Application], Awaitable[TestClient[Any, Any]]]
Serve = Callable[..., Awaitable["Server"]]

LINES = b"Content-Type: application/json\r\nX-Twice: 1\r\nX-Twice: 2\r\n"
BODY = b'{"a":1}'


@dataclass
class Server:
    """Talks to a server in bytes, for what a client library would not show."""

    port: int

    async def talk(self, *requests: bytes) -> bytes:
        """Write requests to one connection at once; all that comes until the server closes it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"".join(requests))
            async with asyncio.timeout(60):
                return await reader.read()
        finally:
            writer.close()


@pytest.fixture
async def serve(aiohttp_client: AiohttpClient) -> AsyncIterator[Serve]:
    """Serves what ``make`` makes, for any request: on our server, or in an application that has its own ways."""
    async with AsyncExitStack() as stack:

        async def start(make: Make, *, middlewares: Any = None, signals: Any = None) -> Server:
            async def handler(_request: web.BaseRequest) -> WireResponse:
                return make()

            routes = [Route("*", "/{rest}", handler)]
            if middlewares is signals is None:
                url = await stack.enter_async_context(listening(RouteTable(routes), "127.0.0.1", 0))
                return Server(int(url.rpartition(":")[2]))
            app = web.Application(middlewares=middlewares or ())
            app.on_response_prepare.extend(signals or ())
            add_to(app.router, routes)
            client = await aiohttp_client(app)
            assert client.port is not None
            return Server(client.port)

        yield start


def plain(status: int = 200, lines: bytes = LINES, body: bytes = BODY) -> WireResponse:
    return WireResponse(status, lines, body)


def ask(method: str = "GET", version: str = "1.1", *, close: bool = True, head: str = "") -> bytes:
    connection = "Connection: close\r\n" if close else ""
    return f"{method} / HTTP/{version}\r\nHost: h\r\n{connection}{head}\r\n".encode()


def split(answer: bytes) -> tuple[bytes, list[bytes], bytes]:
    """The status line, the fields and the body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    return status, fields, body


def names(fields: list[bytes]) -> list[bytes]:
    return sorted(field.partition(b":")[0].lower() for field in fields)


def without_server(fields: list[bytes]) -> list[bytes]:
    """The fields in no order, without Server, and with the date only by its name."""
    return sorted(
        b"Date" if field.startswith(b"Date: ") else field
        for field in fields
        if not field.startswith(b"Server: ")
    )


async def untouched(_request: web.Request, _response: web.StreamResponse) -> None:
    """A signal that looks at an answer and leaves it alone."""


async def test_an_answer_is_its_status_its_lines_and_its_body(serve: Serve) -> None:
    status, fields, body = split(await (await serve(plain)).talk(ask()))
    assert status == b"HTTP/1.1 200 OK"
    assert fields[:3] == [b"Content-Type: application/json", b"X-Twice: 1", b"X-Twice: 2"]
    assert names(fields[3:]) == [b"connection", b"content-length", b"date"]
    assert b"Content-Length: 7" in fields
    assert body == BODY


CASES: dict[str, tuple[int, bytes, bytes]] = {
    "small": (200, LINES, BODY),
    "accepted": (202, LINES + b"Retry-After: 1\r\n", BODY),
    "empty": (200, LINES, b""),
    "no-content": (204, b"X-A: 1\r\n", b""),
    "not-modified": (304, b"ETag: x\r\n", b""),
    "an-error": (503, LINES, BODY),
    "of-no-name": (599, LINES, BODY),
    "empty-value": (200, LINES + b"X-Empty: \r\n", BODY),
    "colons": (200, LINES + b"X-Colons: a: b\r\n", BODY),
    "utf-8": (200, LINES + "X-Name: grün\r\n".encode(), BODY),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("close", [False, True], ids=["keep-alive", "close"])
async def test_aiohttp_would_have_written_the_same(
    case: str,
    method: str,
    *,
    close: bool,
    serve: Serve,
) -> None:
    """But for Server, which we do not send, and the order. It writes it when a signal is there.

    To a HEAD of nothing it says no length, and we say 0, as to a GET: both are right.
    """
    status, lines, body = CASES[case]
    if method == "HEAD" and case == "empty":
        return
    requests = [ask(method, close=close)] if close else [ask(method, close=False), ask()]

    def make() -> WireResponse:
        return WireResponse(status, lines, body)

    ours = split(await (await serve(make)).talk(*requests))
    theirs = split(await (await serve(make, signals=[untouched])).talk(*requests))
    assert b"Server: asyncproxy" in theirs[1], "this is the way of aiohttp"
    assert b"server" not in names(ours[1]), "this is the way of ours"
    if status != 599:
        assert ours[0] == theirs[0]
    assert without_server(ours[1]) == without_server(theirs[1])
    if close:
        assert ours[2] == theirs[2]


async def test_head_has_the_length_and_no_body(serve: Serve) -> None:
    status, fields, body = split(await (await serve(plain)).talk(ask("HEAD")))
    assert status == b"HTTP/1.1 200 OK"
    assert b"Content-Length: 7" in fields
    assert body == b""


@pytest.mark.parametrize("size", [0, 7, 1_000_000])
async def test_head_leaves_a_connection_that_can_be_used(size: int, serve: Serve) -> None:
    server = await serve(lambda: plain(body=b"x" * size))
    answer = await server.talk(ask("HEAD", close=False), ask("HEAD", close=False), ask())
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert answer.count(b"Content-Length: %d\r\n" % size) == 3
    assert answer.count(b"x") == size


async def test_a_connection_is_kept_until_the_client_is_done(serve: Serve) -> None:
    server = await serve(plain)
    answer = await server.talk(ask(close=False), ask(close=False), ask())
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert answer.count(BODY) == 3
    first, second, last = answer.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert b"Connection" not in first + second
    assert b"\r\nConnection: close\r\n" in last


@pytest.mark.parametrize("how", ["argument", "force_close"])
async def test_a_connection_is_closed_when_the_answer_says_so(how: str, serve: Serve) -> None:
    def make() -> WireResponse:
        response = WireResponse(200, LINES, BODY, close=how == "argument")
        if how == "force_close":
            response.force_close()
        return response

    answer = await (await serve(make)).talk(ask(close=False), ask(close=False))
    status, fields, body = split(answer)
    assert (status, body) == (b"HTTP/1.1 200 OK", BODY)
    assert b"Connection: close" in fields


async def test_http_1_0_gets_an_answer_of_its_own_version(serve: Serve) -> None:
    server = await serve(plain)
    status, fields, body = split(await server.talk(ask(version="1.0", close=False)))
    assert (status, body) == (b"HTTP/1.0 200 OK", BODY)
    assert {b"Content-Length: 7", b"X-Twice: 1", b"X-Twice: 2"} <= set(fields)
    kept = ask(version="1.0", close=False, head="Connection: keep-alive\r\n")
    answer = await server.talk(kept, ask(version="1.0", close=False))
    assert answer.count(b"HTTP/1.0 200 OK\r\n") == answer.count(BODY) == 2
    assert answer.lower().count(b"connection: keep-alive") == 1


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what aiohttp's writer is given."""
    sizes: list[int] = []
    write = StreamWriter.write

    async def counting(self: StreamWriter, chunk: Any, **kwargs: Any) -> None:
        sizes.append(len(chunk))
        await write(self, chunk, **kwargs)

    monkeypatch.setattr(StreamWriter, "write", counting)
    return sizes


@pytest.mark.parametrize("kind", [bytes, memoryview])
@pytest.mark.parametrize("size", [256 * 1024, 256 * 1024 + 1, 1_000_000])
async def test_a_large_body_goes_out_in_pieces(
    kind: Callable[[bytes], bytes | memoryview], size: int, serve: Serve, written: list[int]
) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    server = await serve(lambda: WireResponse(200, LINES, kind(content)[:size]))
    answer = await server.talk(ask(close=False), ask())
    first, second = answer.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert split(first)[2] == split(second)[2] == content[:size]
    assert b"Content-Length: %d\r\n" % size in first
    assert max(written, default=0) <= 256 * 1024, "a large body is not copied as a whole"
    assert len(written) == 2 * (0 if size <= 256 * 1024 else -(-size // (256 * 1024)))


@pytest.mark.parametrize("signals", [None, [untouched]], ids=["", "in an application"])
async def test_a_large_body_goes_out_in_pieces_to_an_old_client_too(
    signals: Any, serve: Serve, written: list[int]
) -> None:
    content = bytes(range(256)) * 4096
    server = await serve(lambda: WireResponse(200, LINES, content), signals=signals)
    status, fields, body = split(await server.talk(ask(version="1.0", close=False)))
    assert (status, body) == (b"HTTP/1.0 200 OK", content)
    assert b"Content-Length: %d" % len(content) in fields
    assert max(written) <= 256 * 1024


@pytest.mark.parametrize("count", [1, 3, 20])
async def test_pieces_are_cut_to_the_same_size(count: int, serve: Serve, written: list[int]) -> None:
    """A transport may copy what it is given, for each client that does not read."""
    pieces = [bytes([n]) * 300_000 for n in range(count)]

    async def read() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    def respond() -> WireResponse:
        response = WireResponse(200, LINES, b"")
        response.stream(300_000 * count, read)
        return response

    server = await serve(respond)
    assert split(await server.talk(ask()))[2] == b"".join(pieces)
    assert max(written) <= 256 * 1024


@pytest.mark.parametrize("size", [7, 1_000_000])
async def test_a_view_of_bytes_is_as_good_as_bytes(size: int, serve: Serve) -> None:
    view = memoryview(b"<" + b"x" * size + b">")[1:-1]
    for signals in (None, [untouched]):
        server = await serve(lambda: WireResponse(200, LINES, view), signals=signals)
        assert split(await server.talk(ask()))[2] == b"x" * size


async def test_no_content_has_no_length_and_leaves_the_connection_usable(serve: Serve) -> None:
    server = await serve(lambda: plain(204, b"X-A: 1\r\n", b""))
    answer = await server.talk(ask("DELETE", close=False), ask("DELETE"))
    assert answer.count(b"HTTP/1.1 204 No Content\r\n") == 2
    assert answer.count(b"X-A: 1\r\n") == 2
    assert b"content-length" not in answer.lower()
    assert b"transfer-encoding" not in answer.lower()
    assert answer.endswith(b"\r\n\r\n")


# What a host application may do to an answer


def changing(change: Callable[[Any], None]) -> Any:
    """A middleware that changes an answer."""

    @web.middleware
    async def middleware(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        change(response)
        return response

    return middleware


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_middleware_adds_replaces_and_removes_headers(method: str, serve: Serve) -> None:
    def change(response: web.Response) -> None:
        assert response.headers.getall("X-Twice") == ["1", "2"]
        assert response.content_type == "application/json"
        response.headers["X-New"] = "new"
        response.headers["Content-Type"] = "text/plain"
        del response.headers["X-Twice"]

    server = await serve(plain, middlewares=[changing(change)])
    _, fields, body = split(await server.talk(ask(method)))
    assert {b"X-New: new", b"Content-Type: text/plain", b"Content-Length: 7"} <= set(fields)
    assert b"x-twice" not in names(fields)
    assert names(fields).count(b"content-type") == 1
    assert body == (b"" if method == "HEAD" else BODY)


async def test_a_middleware_sets_a_cookie(serve: Serve) -> None:
    server = await serve(plain, middlewares=[changing(lambda r: r.set_cookie("a", "b"))])
    _, fields, body = split(await server.talk(ask()))
    assert b"Set-Cookie: a=b; Path=/" in fields
    assert body == BODY


async def test_a_middleware_sets_another_status(serve: Serve) -> None:
    server = await serve(plain, middlewares=[changing(lambda r: r.set_status(418))])
    assert split(await server.talk(ask()))[0].startswith(b"HTTP/1.1 418 ")


async def test_a_middleware_compresses(serve: Serve) -> None:
    def change(response: web.Response) -> None:
        response.enable_compression(web.ContentCoding.gzip)

    server = await serve(lambda: plain(body=b"x" * 5000), middlewares=[changing(change)])
    _, fields, body = split(await server.talk(ask()))
    assert b"Content-Encoding: gzip" in fields
    assert b"Content-Length: %d" % len(body) in fields
    assert body.startswith(b"\x1f\x8b")


async def test_a_middleware_reads_the_body(serve: Serve) -> None:
    seen: list[object] = []

    def change(response: web.Response) -> None:
        seen.extend((response.body, response.text, response.content_length, response.status))

    server = await serve(plain, middlewares=[changing(change)])
    assert split(await server.talk(ask()))[2] == BODY
    assert seen == [BODY, BODY.decode(), 7, 200]


@pytest.mark.parametrize("touching", [False, True])
async def test_a_middleware_replaces_the_body(*, touching: bool, serve: Serve) -> None:
    def change(response: web.Response) -> None:
        response.body = b"another"
        if touching:
            response.headers["X-New"] = "new"

    server = await serve(plain, middlewares=[changing(change)])
    assert split(await server.talk(ask()))[2] == b"another"


async def test_a_signal_of_the_host_sees_and_changes_an_answer(serve: Serve) -> None:
    seen: list[object] = []

    async def signal(_request: web.Request, response: web.StreamResponse) -> None:
        seen.append((response.status, response.headers["Content-Type"], response.content_length))
        response.headers["X-Signal"] = "yes"

    server = await serve(plain, signals=[signal])
    answer = await server.talk(ask(close=False), ask())
    assert answer.count(b"X-Signal: yes\r\n") == answer.count(BODY) == 2
    assert answer.count(b"X-Twice: 2\r\n") == 2
    assert seen == [(200, "application/json", 7)] * 2


async def test_a_signal_of_an_application_around_ours_sees_it_too(
    aiohttp_client: AiohttpClient,
) -> None:
    async def signal(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Signal"] = "yes"

    async def handler(_request: web.Request) -> web.StreamResponse:
        return plain().for_application()

    inner = web.Application()
    inner.router.add_get("/a", handler)
    outer = web.Application()
    outer.on_response_prepare.append(signal)
    outer.add_subapp("/inner", inner)
    client = await aiohttp_client(outer)
    async with client.get("/inner/a") as response:
        assert response.headers["X-Signal"] == "yes"
        assert await response.read() == BODY


# What the parts are


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (200, b"HTTP/1.1 200 OK\r\n"),
        (404, b"HTTP/1.1 404 Not Found\r\n"),
        (599, b"HTTP/1.1 599 \r\n"),
    ],
)
def test_status_lines(status: int, line: bytes) -> None:
    assert status_line(status) == line


def test_dates_are_those_of_rfc_9110() -> None:
    assert http_date(784111777) == b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    assert http_date(784111778) == b"Date: Sun, 06 Nov 1994 08:49:38 GMT\r\n"


async def test_json_of_ours_is_not_to_be_kept(serve: Serve) -> None:
    server = await serve(lambda: json_response(202, BODY, lines=b"Retry-After: 3\r\n"))
    status, fields, body = split(await server.talk(ask()))
    assert (status, body) == (b"HTTP/1.1 202 Accepted", BODY)
    assert fields[:3] == [
        b"Content-Type: application/json",
        b"Cache-Control: no-store",
        b"Retry-After: 3",
    ]


async def test_an_error_brings_its_status_and_headers(serve: Serve) -> None:
    server = await serve(lambda: error_response(TooManyJobs(3), BODY))
    answer = await server.talk(ask(close=False), ask())
    assert answer.count(b"HTTP/1.1 429 Too Many Requests\r\n") == 2
    assert answer.count(b"\r\nRetry-After: 5\r\n") == 2
    server = await serve(lambda: error_response(MethodNotAllowed("…", allow="GET, DELETE"), BODY))
    assert b"Allow: GET, DELETE" in split(await server.talk(ask()))[1]


async def test_an_error_closes_the_connection_where_it_has_to(serve: Serve) -> None:
    def by_itself() -> WireResponse:
        return error_response(RequestTooLarge("…"), BODY)

    def as_told() -> WireResponse:
        return error_response(TooManyJobs(3), BODY, close=True)

    for make in (by_itself, as_told):
        answer = await (await serve(make)).talk(ask(close=False), ask(close=False))
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"\r\nConnection: close\r\n" in answer
