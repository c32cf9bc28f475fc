"""A connection remembers what its last head meant: it must mean the same when it is read anew."""

from __future__ import annotations

import asyncio
import itertools
import json
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from asyncproxy.core.errors import InvalidApiKey
from asyncproxy.web.connection import Connection
from asyncproxy.web.request_heads import RequestHeads
from asyncproxy.wire.credentials import KeyRing
from asyncproxy.wire.request import RequestHead
from tests.conftest import EMBED, Start
from tests.gateway import Gateway

BODY = json.dumps(EMBED).encode()
USUAL = [
    ("Host", "proxy.example"),
    ("Content-Type", "application/json"),
    ("Content-Length", str(len(BODY))),
    ("Authorization", "Bearer sk-first"),
]
KEY = b"k" * 32


def changed(name: str, value: str) -> list[tuple[str, str]]:
    return [(key, value if key == name else given) for key, given in USUAL]


HEADS = [
    USUAL,
    USUAL[::-1],
    USUAL[:-1],
    changed("Host", "other.example"),
    changed("Authorization", "Bearer sk-second"),
    changed("Content-Type", "application/json; charset=utf-8"),
    changed("Content-Type", "text/plain"),
    [(name.lower(), value) for name, value in USUAL],
    [("X-Request-Id", "mine"), *USUAL],
    [*USUAL, ("X-Request-Id", "mine")],
    [*USUAL, ("X-Request-Id", "other")],
    [*USUAL, ("Idempotency-Key", "")],
    [*USUAL, ("X-Twice", "1"), ("X-Twice", "2")],
    [*USUAL, ("X-Twice", "1"), ("X-Twice", "2"), ("Connection", "X-Twice")],
    [*USUAL, ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")],
    [*USUAL, ("X-Forwarded-For", "192.0.2.7")],
]


class Seen:
    """What comes of requests that are sent over one connection."""

    def __init__(
        self, gateway: Gateway, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.gateway, self.reader, self.writer = gateway, reader, writer

    async def send(self, head: list[tuple[str, str]]) -> tuple[int, list[tuple[str, str]]]:
        """The status of the answer, and the fields that the gateway got, without ids of a job."""
        before = len(self.gateway.received)
        lines = "".join(f"{name}: {value}\r\n" for name, value in head)
        self.writer.write(f"POST /v1/async/embeddings HTTP/1.1\r\n{lines}\r\n".encode() + BODY)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = int(answer.partition("Content-Length: ")[2].partition("\r\n")[0])
        body = json.loads(await self.reader.readexactly(length))
        status = int(answer.split(" ")[1])
        if status != 202:
            return status, []
        await self.gateway.until(lambda: len(self.gateway.received) > before)
        got = self.gateway.received[-1].headers
        return status, [(name, value.replace(body["id"], "<job>")) for name, value in got]


async def test_each_head_means_what_it_says_whatever_came_before(
    start: Start, gateway: Gateway
) -> None:
    proxy = await start()
    host, port = proxy.url.removeprefix("http://").split(":")

    async def connection() -> Seen:
        return Seen(gateway, *await asyncio.open_connection(host, int(port)))

    alone = []
    for head in HEADS:
        seen = await connection()
        alone.append(await seen.send(head))
        seen.writer.close()
    assert {status for status, _ in alone} == {202, 415}
    # But for what Connection names, each makes a difference: names travel in the client's spelling.
    assert len({json.dumps(answer) for answer in alone}) == len(HEADS) - 1
    seen = await connection()
    for first, second in itertools.product(range(len(HEADS)), repeat=2):
        assert await seen.send(HEADS[first]) == alone[first]
        assert await seen.send(HEADS[second]) == alone[second]
    seen.writer.close()


def read(
    heads: RequestHeads, connection: Connection | None, fields: list[tuple[str, str]] = USUAL
) -> RequestHead:
    request = make_mocked_request(
        "POST", "/v1/async/embeddings", headers=CIMultiDict(fields), protocol=connection
    )
    assert isinstance(request, web.BaseRequest)
    return heads.read(request)


@pytest.fixture
def connection() -> Connection:
    made: Connection = Mock(spec=Connection, last_head=None)
    return made


def test_the_same_head_is_read_once_whatever_the_length_of_its_body(
    connection: Connection,
) -> None:
    heads = RequestHeads(KeyRing([], KEY), KEY)
    first = read(heads, connection)
    assert read(heads, connection) is first
    assert read(heads, connection, changed("Content-Length", "7")) is first
    chunked = [("Transfer-Encoding", "chunked") if n == "Content-Length" else (n, v) for n, v in USUAL]
    assert read(heads, connection, chunked) is not first
    assert read(heads, connection, changed("Host", "other")) is not first
    assert read(heads, connection) is not first, "only the last one is remembered"


def test_nothing_is_remembered_of_a_long_head_nor_of_many_fields(
    connection: Connection,
) -> None:
    heads = RequestHeads(KeyRing([], KEY), KEY)
    read(heads, connection)
    read(heads, connection, [*USUAL, ("X-Long", "x" * 4096)])
    assert connection.last_head is None
    read(heads, connection)
    read(heads, connection, [*USUAL, *((f"x{number}", "") for number in range(32))])
    assert connection.last_head is None


def test_a_key_that_does_not_count_any_more_is_refused(connection: Connection) -> None:
    keys = KeyRing(["sk-first"], KEY)
    heads = RequestHeads(keys, KEY)
    first = read(heads, connection)
    assert read(heads, connection) is first
    keys.replace(["sk-second"])
    with pytest.raises(InvalidApiKey):
        read(heads, connection)
    keys.replace(["sk-first"])
    assert read(heads, connection) is not first


def test_no_credential_is_in_what_a_head_is_shown_as(connection: Connection) -> None:
    head = read(RequestHeads(KeyRing([], KEY), KEY), connection)
    assert "sk-first" not in f"{head!r} {head.caller!r} {connection.last_head!r}"
