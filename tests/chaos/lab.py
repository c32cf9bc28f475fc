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

__all__ = ["Proxy", "answer_to", "free_port", "gateway"]

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


@asynccontextmanager
async def gateway(books: Books, *, delay_s: float) -> AsyncIterator[str]:
    """A gateway that counts what it gets, and takes up to twice ``delay_s``. Its URL."""

    async def embeddings(request: web.Request) -> web.Response:
        text = (await request.json())["input"]
        books.calls[text] += 1
        await asyncio.sleep(random.uniform(0, 2 * delay_s))
        status, body = answer_to(text)
        return web.Response(status=status, body=body, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


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
