"""What the tests share: a gateway, and a proxy in front of it that listens as the real one does."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import pytest
from yarl import URL

from asyncproxy.app import Proxy, compose
from asyncproxy.config.load import load_config
from asyncproxy.web.server import listening
from tests import gateway as gateways
from tests import redis_server
from tests.gateway import Gateway

JSON = {"Content-Type": "application/json"}
EMBED = {"model": "m", "input": "hello"}


@dataclass
class Response:
    """A response of the proxy, read to its end."""

    status: int
    headers: Any
    body: bytes
    path: str = ""

    @property
    def location(self) -> str:
        """The path that ``Location`` leads to from the path that was asked."""
        return urljoin(self.path, str(self.headers["Location"]))

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        """The code of an error of ours, after a check that it has the one shape."""
        data = self.json()
        assert data["status_code"] == self.status
        assert data["is_bifrost_error"] is False
        assert set(data["extra_fields"]) == {"provider", "model_requested", "request_type"}
        error = data["error"]
        assert set(error) == {"type", "code", "message", "param"}
        assert error["message"]
        return error["code"]


class Client:
    """Talks to a proxy as its users do."""

    def __init__(self, url: str, parts: Proxy, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.parts = parts
        self.session = session

    async def request(self, method: str, path: str, **kwargs: Any) -> Response:
        url = URL(self.url + path, encoded=True)
        async with self.session.request(method, url, allow_redirects=False, **kwargs) as response:
            return Response(response.status, response.headers, await response.read(), path)

    async def get(self, path: str, **kwargs: Any) -> Response:
        return await self.request("GET", path, **kwargs)

    async def post(self, path: str, body: Any = EMBED, **kwargs: Any) -> Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if len(data) > 1024**2:
            kwargs["data"] = io.BytesIO(data)
        headers = {**JSON, **kwargs.pop("headers", {})}
        kwargs.setdefault("data", data)
        return await self.request("POST", path, headers=headers, **kwargs)

    async def submit(self, body: Any = EMBED, endpoint: str = "embeddings", **kwargs: Any) -> str:
        """Submit a job that is to be accepted. Its path."""
        answer = await self.post(f"/v1/async/{endpoint}", body, **kwargs)
        assert answer.status == 202, answer.body
        return str(answer.headers["Location"])

    async def outcome(self, path: str, **kwargs: Any) -> Any:
        """Poll until a job is done. Its envelope."""
        async with asyncio.timeout(60):
            while (answer := await self.get(path, **kwargs)).status == 202:
                await asyncio.sleep(0.01)
        assert answer.status == 200, answer.body
        return answer.json()

    @property
    def waiting(self) -> int:
        """How many requests the proxy holds until a job ends."""
        store: Any = self.parts.store
        return len(store._inner._waiters)

    async def until_waiting(self, count: int) -> None:
        """Wait until the proxy holds so many."""
        async with asyncio.timeout(60):
            while self.waiting != count:
                await asyncio.sleep(0.005)

    async def raw(self, data: bytes, *, until_eof: bool = True) -> bytes:
        """Write bytes to a connection, and read what comes until the proxy closes it."""
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(data)
            async with asyncio.timeout(60):
                return await (reader.read() if until_eof else reader.readuntil(b"\r\n\r\n"))
        finally:
            writer.close()


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with gateways.running() as running:
        yield running


Start = Callable[..., Awaitable[Client]]

StoreSection = Callable[[], dict[str, Any]]


@pytest.fixture
def store_section(request: pytest.FixtureRequest, tmp_path: Path) -> StoreSection:
    """The `store` of a configuration, another one each time: in memory unless the test is run for each."""
    numbers = itertools.count()

    def section() -> dict[str, Any]:
        kind = getattr(request, "param", "memory")
        if kind == "sqlite":
            return {"url": f"sqlite://{tmp_path}/{next(numbers)}.db", "durability": "normal"}
        if kind == "redis":
            url, key = redis_server.shared().url, b64encode(b"k" * 32).decode()
            prefix = f"test-{secrets.token_hex(8)}"
            return {"url": url, "prefix": prefix, "encryption_key": key, "lease": "1s"}
        return {}

    return section


@pytest.fixture
async def start(gateway: Gateway, store_section: StoreSection) -> AsyncIterator[Start]:
    """Starts a proxy: ``await start(jobs={…})`` in front of the gateway, or of ``upstreams``.

    ``upstream={…}`` adds to the one upstream. Retries wait milliseconds unless told otherwise.
    """
    async with AsyncExitStack() as stack:

        async def start_proxy(*, upstream: dict[str, Any] | None = None, **sections: Any) -> Client:
            retry = {"attempts": 3, "backoff": "1ms", "max_backoff": "2ms", "outage": "50ms"}
            one = {"base_url": f"{gateway.url}/v1", "retry": retry, **(upstream or {})}
            sections["store"] = {**store_section(), **sections.get("store", {})}
            config = load_config({"upstreams": [one], "shutdown_grace": "0s", **sections})
            parts = compose(config)
            await stack.enter_async_context(parts.running())
            serving = listening(
                parts.table,
                "127.0.0.1",
                0,
                client_timeout_s=config.client_timeout,
                max_connections=config.max_connections,
            )
            url = await stack.enter_async_context(serving)
            session = await stack.enter_async_context(
                aiohttp.ClientSession(auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())
            )
            return Client(url, parts, session)

        yield start_proxy


@pytest.fixture
async def proxy(start: Start) -> Client:
    return await start()
