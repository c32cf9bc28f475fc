"""The plugin: asyncproxy in an application that has a life of its own."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

import asyncproxy
from asyncproxy.app import PROXY
from asyncproxy.config.model import Config
from asyncproxy.core.errors import StartupError
from tests.conftest import EMBED
from tests.gateway import Gateway

AiohttpClient = Callable[..., Any]


def config_for(gateway: Gateway) -> Config:
    return asyncproxy.load_config({"upstreams": [{"base_url": f"{gateway.url}/v1"}]})


async def outcome(client: TestClient[Any, Any], path: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            response = await client.get(path)
            if response.status != 202:
                return await response.json()
            await asyncio.sleep(0.01)


async def test_in_a_host_application(aiohttp_client: AiohttpClient, gateway: Gateway) -> None:
    """The host keeps its routes, its handler of /v1/embeddings, its middleware, its signals and its errors."""
    seen = []

    @web.middleware
    async def host_middleware(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        seen.append(request.path)
        try:
            response: web.StreamResponse = await handler(request)
        except web.HTTPNotFound:
            return web.Response(status=404, text="the host's own 404")
        response.headers["X-Host"] = "yes"
        return response

    async def on_prepare(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Signal"] = "yes"

    async def embeddings(_request: web.Request) -> web.Response:
        return web.json_response({"from": "the host"})

    async def broken(_request: web.Request) -> web.Response:
        raise web.HTTPGone

    app = web.Application(middlewares=[host_middleware])
    app.on_response_prepare.append(on_prepare)
    app.router.add_post("/v1/embeddings", embeddings)
    app.router.add_get("/broken", broken)
    keys_before = set(app)
    asyncproxy.setup(app, config_for(gateway))
    assert set(app) - keys_before == {PROXY}
    assert list(app.middlewares) == [host_middleware]

    client = await aiohttp_client(app)
    response = await client.post("/v1/embeddings", json=EMBED)
    assert await response.json() == {"from": "the host"}
    assert (await client.get("/broken")).status == 410
    missing = await client.get("/nowhere")
    assert (missing.status, await missing.text()) == (404, "the host's own 404")

    response = await client.post("/v1/async/embeddings", json=EMBED)
    assert response.status == 202
    assert (response.headers["X-Host"], response.headers["X-Signal"]) == ("yes", "yes")
    assert response.headers["Content-Type"] == "application/json"
    done = await outcome(client, response.headers["Location"])
    assert done["status"] == "completed"
    assert len(gateway.received) == 1
    response = await client.get(response.headers["Location"])
    assert (response.headers["X-Host"], response.headers["X-Signal"]) == ("yes", "yes")
    refused = await client.post("/v1/async/embeddings", json={})
    assert (refused.status, (await refused.json())["error"]["code"]) == (
        400,
        "missing_required_parameter",
    )
    assert (await client.get("/-/ready")).status == 200
    assert "/v1/async/embeddings" in seen


async def test_with_its_aiohttp_defaults(aiohttp_client: AiohttpClient, gateway: Gateway) -> None:
    """A host's limit of 1 MiB for its own bodies is not ours."""
    app = web.Application()
    asyncproxy.setup(app, config_for(gateway))
    client = await aiohttp_client(app)
    body = b'{"model":"m","input":"' + b"x" * 2_000_000 + b'"}'
    headers = {"Content-Type": "application/json"}

    async def pieces() -> Any:
        yield body

    response = await client.post("/v1/async/embeddings", data=pieces(), headers=headers)
    assert response.status == 202
    assert (await outcome(client, response.headers["Location"]))["status"] == "completed"
    assert gateway.received[0].body == body


async def test_under_a_prefix_by_a_sub_application(
    aiohttp_client: AiohttpClient, gateway: Gateway
) -> None:
    inner = web.Application()
    asyncproxy.setup(inner, config_for(gateway))
    outer = web.Application()
    outer.add_subapp("/ai", inner)
    client = await aiohttp_client(outer)
    for given, prefix in (({}, "/ai"), ({"X-Forwarded-Prefix": "/team"}, "/team/ai")):
        response = await client.post("/ai/v1/async/embeddings", json=EMBED, headers=given)
        assert response.status == 202
        location = response.headers["Location"]
        assert location.startswith(f"{prefix}/v1/async/embeddings/")
        assert (await outcome(client, location.removeprefix("/team")))["status"] == "completed"


async def test_it_ends_with_its_host(aiohttp_client: AiohttpClient, gateway: Gateway) -> None:
    before = asyncio.all_tasks()
    app = web.Application()
    asyncproxy.setup(app, config_for(gateway))
    client = await aiohttp_client(app)
    assert len(asyncio.all_tasks() - before) > 64
    await client.close()
    left = {task for task in asyncio.all_tasks() - before if "asyncproxy" in task.get_name()}
    assert not left


async def test_build_app_is_the_whole_proxy(aiohttp_client: AiohttpClient, gateway: Gateway) -> None:
    client = await aiohttp_client(asyncproxy.build_app(config_for(gateway)))
    assert (await client.post("/v1/embeddings", json=EMBED)).status == 200
    assert (await client.post("/v1/async/embeddings", json=EMBED)).status == 202


def test_the_public_names() -> None:
    assert asyncproxy.__all__ == ["__version__", "build_app", "load_config", "setup"]
    for name in ("build_app", "load_config", "setup"):
        assert inspect.getdoc(getattr(asyncproxy, name))


def test_a_store_whose_library_is_missing_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(sys.modules):
        if name.startswith("asyncproxy.stores.redis"):
            monkeypatch.delitem(sys.modules, name)
        elif name.partition(".")[0] == "redis":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "redis", None)
    store = {
        "url": "redis://127.0.0.1:1/0",
        "encryption_key": "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=",
    }
    config = asyncproxy.load_config({"upstreams": [{"base_url": "http://gateway"}], "store": store})
    with pytest.raises(StartupError, match=r"asyncproxy\[redis\]"):
        asyncproxy.build_app(config)
