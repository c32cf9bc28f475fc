"""Routes as data: what is found for which request, and that each way of writing a path leads to the same."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

import asyncproxy
from asyncproxy.app import compose
from asyncproxy.config.load import load_config
from asyncproxy.core.errors import UnknownEndpoint
from asyncproxy.web.routes import Route, RouteTable
from tests.conftest import EMBED, Client, Start
from tests.gateway import Gateway, answer

SUBMIT = "/v1/async/embeddings"
JOB = f"{SUBMIT}/{uuid.UUID(int=1)}"


@pytest.fixture(scope="module")
def table() -> RouteTable:
    return compose(load_config({"upstreams": [{"base_url": "http://127.0.0.1:1"}]}, environ={})).table


@pytest.mark.parametrize(
    ("method", "path", "template"),
    [
        ("POST", SUBMIT, SUBMIT),
        ("GET", SUBMIT, SUBMIT),
        ("GET", JOB, f"{SUBMIT}/{{id}}"),
        ("DELETE", f"{SUBMIT}/x", f"{SUBMIT}/{{id}}"),
        ("PUT", f"{SUBMIT}/x", f"{SUBMIT}/{{id}}"),
        ("HEAD", f"{JOB}/content", f"{SUBMIT}/{{id}}/content"),
        ("GET", f"{JOB}/content/x", "/v1/async/{rest}"),
        ("GET", f"{SUBMIT}/", "/v1/async/{rest}"),
        ("GET", f"{SUBMIT}//content", "/v1/async/{rest}"),
        ("POST", "/v1/async/nothing", "/v1/async/{rest}"),
        ("GET", "/v1/async/", "/v1/async/{rest}"),
        ("GET", "/v1/async", "/v1/async"),
        ("GET", "/v1/asynchronous", "/{rest}"),
        ("POST", "/v1/embeddings", "/v1/embeddings"),
        ("GET", "/v1/embeddings", "/{rest}"),
        ("POST", "/v1/relay/chat/completions", "/v1/relay/chat/completions"),
        ("GET", "/v1/relay/chat/completions", "/v1/relay/chat/completions"),
        ("GET", "/v1/relay/models", "/v1/relay/{rest}"),
        ("GET", f"/v1/relay/embeddings/{uuid.UUID(int=1)}", "/v1/relay/embeddings/{id}"),
        ("DELETE", f"/v1/relay/embeddings/{uuid.UUID(int=1)}", "/v1/relay/embeddings/{id}"),
        ("GET", "/-/metrics", "/-/metrics"),
        ("GET", "/-/nothing", "/-/{rest}"),
        ("GET", "/%2D/metrics", "/{rest}"),
        ("GET", "/", "/{rest}"),
        ("GET", "//-/metrics", "/{rest}"),
    ],
)
def test_a_request_finds_the_route_of_its_path(
    table: RouteTable, method: str, path: str, template: str
) -> None:
    handlers = {r.method: r.handler for r in table.routes if r.path == template}
    assert table.find(method, path)[0] is (handlers.get(method) or handlers["*"])


def test_an_id_may_be_of_either_case() -> None:
    async def handler(request: web.BaseRequest, job_id: str) -> Any:
        raise AssertionError

    table = RouteTable([Route("GET", "/a/{id}", handler), Route("GET", "/a/{id}/content", handler)])
    job = str(uuid.uuid4())
    assert table.find("GET", f"/a/{job}") == (handler, (job,))
    assert table.find("GET", f"/a/{job.upper()}") == (handler, (job,))
    assert table.find("GET", f"/a/{job.upper()}/content") == (handler, (job,))
    with pytest.raises(UnknownEndpoint):
        table.find("GET", "/b")


def test_a_long_path_is_looked_at_once_for_each_template(table: RouteTable) -> None:
    """The work does not grow with the segments of a path."""
    assert len(list(table._templates("/v1/async" + "/a" * 10_000))) <= 3 + len(table._prefixes)


async def test_each_way_to_write_a_path_answers_alike(start: Start) -> None:
    proxy = await start()
    direct = await proxy.post(SUBMIT, b"[]")
    routed = await proxy.post(f"{SUBMIT}?a=1", b"[]")
    assert (direct.status, direct.body) == (routed.status, routed.body)
    assert {**direct.headers, "Date": ""} == {**routed.headers, "Date": ""}
    job = await proxy.submit()
    await proxy.outcome(job)
    found = await proxy.get(job)
    assert found.status == 200
    assert (await proxy.get(f"{job}?a=1")).body == found.body
    upper = job.rpartition("/")[2].upper()
    assert (await proxy.get(f"{SUBMIT}/{upper}")).body == found.body


async def test_an_old_client_is_answered_in_its_own_version(proxy: Client) -> None:
    body = json.dumps(EMBED).encode()
    head = f"POST {SUBMIT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answered = await proxy.raw(head.encode() + body)
    assert answered.startswith(b"HTTP/1.0 202 Accepted\r\n")
    assert b'"status":"pending"' in answered


async def test_a_path_in_disguise_is_none_of_our_pages(
    proxy: Client, gateway: Gateway, aiohttp_client: Any
) -> None:
    """A rule in front of us that keeps `/-/` away does not know `/%2D/`."""
    gateway.behaviour = answer({"passed": True})
    assert (await proxy.get("/%2D/metrics")).json() == {"passed": True}
    assert gateway.received[-1].target == "/%2D/metrics"
    app = web.Application()
    asyncproxy.setup(app, load_config({"upstreams": [{"base_url": gateway.url}]}))
    client = await aiohttp_client(app)
    async with client.get("/-/metrics") as page:
        assert page.status == 200
    disguised = URL(f"http://127.0.0.1:{client.port}/%2D/metrics", encoded=True)
    async with client.session.get(disguised) as refused:
        assert (refused.status, (await refused.json())["error"]["code"]) == (404, "unknown_endpoint")
