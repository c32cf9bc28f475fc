"""The parts of the experiment: a gateway, proxies that can be killed, a Redis that can be stopped."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from tests.chaos.books import Books

__all__ = ["Gateway", "Proxy", "answer_to", "free_port", "gateway"]

# A part of the texts is refused by the gateway: its own answer, which is an outcome as any other.
_REFUSED = 0.05


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def answer_to(text: str) -> tuple[int, bytes]:
    """The gateway's answer to a text: always the same."""
    numbers = random.Random(text)
    if numbers.random() < _REFUSED:
        error = {
            "message": f"not {text}",
            "type": "invalid_request_error",
            "code": "refused",
            "param": None,
        }
        return 400, json.dumps({"error": error}).encode()
    vector = [numbers.random() for _ in range(50)]
    data = [{"object": "embedding", "index": 0, "embedding": vector}]
    return 200, json.dumps({"object": "list", "model": "m", "data": data, "for": text}).encode()


class Gateway:
    """A gateway that counts what it gets, and takes up to twice ``delay_s``. It can be stopped."""

    def __init__(self, books: Books, *, delay_s: float) -> None:
        self.refuses_with = 0  # the status; 0: it takes what comes
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._books = books
        self._delay_s = delay_s
        self._runner: web.AppRunner

    async def start(self) -> None:
        """Take connections."""
        app = web.Application()
        app.router.add_post("/v1/embeddings", self._embeddings)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0, handler_cancellation=True
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def stop(self) -> None:
        """Break the calls in flight, and refuse connections."""
        await self._runner.cleanup()

    async def misbehave(self) -> None:
        """Be away for a while, or refuse every call."""
        status = random.choice([0, 429, 502, 503, 504])
        self._books.events[f"gateway {status or 'stopped'}"] += 1
        self.refuses_with = status
        if not status:
            await self.stop()
        await asyncio.sleep(random.uniform(0.1, 0.8))
        if not status:
            await self.start()
        self.refuses_with = 0

    async def _embeddings(self, request: web.Request) -> web.Response:
        text = (await request.json())["input"]
        if self.refuses_with:
            self._books.events["calls refused by the gateway"] += 1
            return web.Response(status=self.refuses_with)
        self._books.calls[text] += 1
        await asyncio.sleep(random.uniform(0, 2 * self._delay_s))
        status, body = answer_to(text)
        return web.Response(status=status, body=body, content_type="application/json")


@asynccontextmanager
async def gateway(books: Books, *, delay_s: float) -> AsyncIterator[Gateway]:
    """A gateway that is there, until the end."""
    running = Gateway(books, delay_s=delay_s)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


class Proxy:
    """An ``asyncproxy serve`` on a port of its own, started again whenever it was killed."""

    def __init__(self, config: Path, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._config = config
        self._log = log
        self._process: asyncio.subprocess.Process

    async def start(self) -> None:
        """Start, and wait until it listens."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "asyncproxy",
                "serve",
                "--config",
                str(self._config),
                "--listen",
                f"127.0.0.1:{self.port}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            line = await self._process.stdout.readline()
        if b"listens on" not in line:
            raise RuntimeError(f"a proxy did not start; {self._log} says why")

    async def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._process.terminate()
        async with asyncio.timeout(60):
            return await self._process.wait()

    async def pause(self, seconds: float) -> None:
        """Sleep as a machine does that was suspended: SIGSTOP, and SIGCONT later."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._process.send_signal(signal.SIGCONT)
