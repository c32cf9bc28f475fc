"""Requests that go round aiohttp's application: which ones, and that it makes no difference to them."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from asyncproxy.app import PROXY, build_app
from asyncproxy.config.load import load_config
from asyncproxy.web.fast_path import DIRECTORY
from asyncproxy.web.server import listening
from tests.conftest import EMBED, Client, Start

SUBMIT = "/v1/async/embeddings"
JOB = f"{SUBMIT}/{uuid.UUID(int=1)}"


@pytest.fixture
def app() -> web.Application:
    return build_app(load_config({"upstreams": [{"base_url": "http://127.0.0.1:1"}]}, environ={}))


@pytest.mark.parametrize(
    ("method", "target", "known"),
    [
        ("POST", SUBMIT, True),
        ("GET", JOB, True),
        ("POST", "/v1/embeddings", True),
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/embeddings?a=1", False),
        ("POST", "/v1/models", False),
        ("GET", "/v1/embeddings", False),
        ("POST", f"{SUBMIT}?a=1", False),
        ("POST", f"{SUBMIT}/", False),
        ("POST", "/v1/async/embedding%73", False),
        ("POST", f"http://proxy{SUBMIT}", False),
        ("POST", "/v1/async/nothing", False),
        ("POST", JOB, False),
        ("GET", SUBMIT, False),
        ("GET", f"{JOB}?wait=1", False),
        ("GET", f"{JOB}/content", False),
        ("GET", f"{JOB}/", False),
        ("GET", JOB.replace("-", "%2D"), False),
        ("HEAD", JOB, False),
        ("DELETE", JOB, False),
        ("GET", "/", False),
    ],
)
def test_what_is_known_is_a_submit_or_a_poll_as_clients_write_it(
    app: web.Application, method: str, target: str, *, known: bool
) -> None:
    assert (app[DIRECTORY].find(method, target) is not None) is known


@pytest.fixture
async def url(app: web.Application) -> AsyncIterator[str]:
    """A proxy without the routes of its application."""

    async def refuse(request: web.Request) -> web.StreamResponse:
        raise web.HTTPNotImplemented

    bare = web.Application()
    bare[DIRECTORY] = app[DIRECTORY]
    bare.router.add_route("*", "/{path:.*}", refuse)
    bare.cleanup_ctx.append(app[PROXY].running)
    async with listening(bare, "127.0.0.1", 0) as url:
        yield url


async def test_a_known_request_does_not_reach_the_application(url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        async with session.post(SUBMIT, json=EMBED) as answer:
            assert answer.status == 202
            location = answer.headers["Location"]
        async with session.get(location) as answer:
            assert answer.status in (200, 202)
        async with session.get(JOB) as answer:
            assert (answer.status, (await answer.json())["status_code"]) == (404, 404)
        async with session.get(f"{location}?wait=0") as answer:
            assert answer.status == 501


async def test_both_ways_answer_alike(start: Start) -> None:
    proxy = await start()
    direct = await proxy.post(SUBMIT, b"[]")
    routed = await proxy.post(f"{SUBMIT}?a=1", b"[]")
    assert (direct.status, direct.body) == (routed.status, routed.body)
    assert {**direct.headers, "Date": ""} == {**routed.headers, "Date": ""}
    job = await proxy.submit()
    await proxy.outcome(job)
    assert (await proxy.get(job)).body == (await proxy.get(f"{job}?a=1")).body


async def test_an_old_client_is_answered_in_its_own_version(proxy: Client) -> None:
    body = json.dumps(EMBED).encode()
    head = f"POST {SUBMIT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = await proxy.raw(head.encode() + body)
    assert answer.startswith(b"HTTP/1.0 202 Accepted\r\n")
    assert b'"status":"pending"' in answer
