"""What listens: a client that takes nothing of its answer is cut off, and its answer given back."""

from __future__ import annotations

import asyncio

import pytest

from asyncproxy.app import PROXY, build_app
from asyncproxy.config import load_config
from asyncproxy.errors import StartupError
from asyncproxy.server import listening
from tests.conftest import EMBED
from tests.gateway import Gateway, answer


async def test_a_client_that_does_not_read_is_cut_off(gateway: Gateway) -> None:
    gateway.behaviour = answer(b'"' + b"x" * 30_000_000 + b'"')
    app = build_app(load_config({"upstreams": [{"base_url": f"{gateway.url}/v1"}]}))
    async with listening(app, "127.0.0.1", 0, send_timeout_s=0.3) as url:
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
            while (await app[PROXY].store.usage()).live:
                await asyncio.sleep(0.01)
        tasks = asyncio.all_tasks()
        writer.write(f"GET {path}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await asyncio.sleep(0)  # and never a read of what comes
        async with asyncio.timeout(20):
            while any(not task.done() and "start" in repr(task.get_coro()) for task in tasks):
                await asyncio.sleep(0.05)
        writer.transport.abort()


async def test_an_address_that_is_taken_is_a_clear_error(gateway: Gateway) -> None:
    app = build_app(load_config({"upstreams": [{"base_url": gateway.url}]}))
    port = int(gateway.url.rpartition(":")[2])
    with pytest.raises(
        StartupError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"
    ):
        async with listening(app, "127.0.0.1", port):
            raise AssertionError
