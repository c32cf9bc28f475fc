"""A gateway on port 0 whose behaviour a test sets: good, slow, broken in any way that bytes can be.

It speaks HTTP/1.1 by hand, on purpose: what is to be broken must not be mended by a library.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Behaviour",
    "Gateway",
    "Received",
    "answer",
    "embeddings",
    "in_turn",
    "raw",
    "reset",
    "running",
]


@dataclass
class Received:
    """A request as it came over the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """The values of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """The value of a header that is there once, or None."""
        values = self.all(name)
        assert len(values) <= 1, values
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


Behaviour = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def answer(
    body: object = b"",
    *,
    status: int = 200,
    headers: Iterable[tuple[str, str]] = (),
    content_type: str | None = "application/json",
) -> Behaviour:
    """Answer with a body: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def behave(_request: Received, writer: asyncio.StreamWriter) -> None:
        fields = [("Content-Length", str(len(data))), *headers]
        if content_type is not None:
            fields.append(("Content-Type", content_type))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields)
        writer.write(f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode("latin-1") + data)

    return behave


def chunked(data: bytes, size: int) -> Behaviour:
    """Answer with JSON in chunks of so many bytes."""

    async def behave(_request: Received, writer: asyncio.StreamWriter) -> None:
        head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        writer.write(head)
        for start in range(0, len(data), size):
            chunk = data[start : start + size]
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    return behave


def raw(data: bytes, *, close: bool = True) -> Behaviour:
    """Write bytes, and close the connection unless told otherwise."""

    async def behave(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()

    return behave


async def reset(_request: Received, writer: asyncio.StreamWriter) -> None:
    """Break the connection without an answer."""
    writer.transport.abort()


async def hang(_request: Received, _writer: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.Event().wait()


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Behave in one way after the other; the last one stays."""
    rest = list(behaviours)

    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        await (rest.pop(0) if len(rest) > 1 else rest[0])(request, writer)

    return behave


async def embeddings(request: Received, writer: asyncio.StreamWriter) -> None:
    """A deterministic vector for each input."""
    data = request.json()
    texts = data["input"] if isinstance(data["input"], list) else [data["input"]]
    vectors = [
        {"object": "embedding", "index": i, "embedding": [len(text) / 7, 0.1, -1e-7]}
        for i, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    body = {"object": "list", "data": vectors, "model": data["model"], "usage": usage}
    await answer(body)(request, writer)


@dataclass
class Gateway:
    """Requests it has got, and how it answers the next ones."""

    behaviour: Behaviour = embeddings
    received: list[Received] = field(default_factory=list)
    open_connections: int = 0
    url: str = ""
    # How many requests it is answering just now, and the most it ever was.
    busy: int = 0
    busiest: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something about this gateway holds."""
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(condition)

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        request: Received | None = None
        try:
            while (request := await _read_request(reader, writer)) is not None:
                self.received.append(request)
                self.busy += 1
                self.busiest = max(self.busiest, self.busy)
                await self.notify()
                try:
                    if not await self._answer(request, reader, writer):
                        return
                finally:
                    self.busy -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            self.open_connections -= 1
            writer.close()
            await self.notify()

    async def _answer(
        self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Behave, unless the other side goes away meanwhile. Whether the connection goes on."""
        behaving = asyncio.ensure_future(self.behaviour(request, writer))
        while not behaving.done():
            if reader.at_eof():
                behaving.cancel()
            # A reader has no event for its end; this is the test's gateway, not the product.
            await asyncio.wait({behaving}, timeout=0.01)
        with suppress(asyncio.CancelledError):
            await behaving
        return not writer.is_closing() and not reader.at_eof()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Received | None:
    line = await reader.readline()
    if not line:
        return None
    method, target, _version = line.decode().split(" ", 2)
    headers: list[tuple[str, str]] = []
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").rstrip("\r\n").partition(": ")
        headers.append((name, value))
    lowered = {name.lower(): value for name, value in headers}
    body = b""
    if "chunked" in lowered.get("transfer-encoding", ""):
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readline()
        while (await reader.readline()) not in (b"\r\n", b""):
            continue
    elif "content-length" in lowered:
        body = await reader.readexactly(int(lowered["content-length"]))
    return Received(method, target, headers, body)


@asynccontextmanager
async def running(**listen: Any) -> AsyncIterator[Gateway]:
    """A gateway for the length of a ``with``, on a TCP port or (``path=…``) a unix socket."""
    gateway = Gateway()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        with suppress(asyncio.CancelledError):
            await gateway.serve(reader, writer)

    if "path" in listen:
        server = await asyncio.start_unix_server(serve, limit=2**20, **listen)
        gateway.url = f"unix:{listen['path']}"
    else:
        port = listen.pop("port", 0)
        server = await asyncio.start_server(serve, "127.0.0.1", port, limit=2**20, **listen)
        scheme = "https" if "ssl" in listen else "http"
        gateway.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield gateway
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
