"""What listens, and what becomes of connections that are not used as they should be."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from asyncproxy.app import compose
from asyncproxy.config.load import load_config
from asyncproxy.core.errors import StartupError
from asyncproxy.loop.write_coalescing import WriteCoalescer
from asyncproxy.web.connection import EdgeServer
from asyncproxy.web.server import listening
from tests.conftest import EMBED, Client
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
        async with asyncio.timeout(10):
            while (await proxy.store.usage()).live:
                await asyncio.sleep(0.01)
        tasks = asyncio.all_tasks()
        writer.write(f"GET {path}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await asyncio.sleep(0)  # and never a read of what comes
        async with asyncio.timeout(20):
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


async def test_an_address_that_is_taken_is_a_clear_error(gateway: Gateway) -> None:
    table = compose(load_config({"upstreams": [{"base_url": gateway.url}]})).table
    port = int(gateway.url.rpartition(":")[2])
    with pytest.raises(
        StartupError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"
    ):
        async with listening(table, "127.0.0.1", port):
            raise AssertionError
