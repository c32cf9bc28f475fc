"""Every form of a request target, in our error shape, whatever it is."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from tests.conftest import Client, Start
from tests.gateway import Gateway, answer


async def asked(proxy: Client, line: str, head: str = "") -> tuple[int, bytes]:
    """The status and the body of the answer to a request line."""
    request = f"{line} HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n{head}\r\n"
    head_bytes, _, body = (await proxy.raw(request.encode())).partition(b"\r\n\r\n")
    assert b"aiohttp" not in (head_bytes + body).lower()
    return int(head_bytes.split(b" ")[1]), body


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        ("OPTIONS *", 400, "invalid_request"),
        ("GET *", 400, "invalid_request"),
        ("CONNECT example.com:443", 405, "method_not_allowed"),
        ("GET /v1/../..", 400, "invalid_request"),
        ("GET /v1/%2e%2e/%2E%2E/x", 400, "invalid_request"),
        ("GET /v1/..%2f..%2fadmin", 400, "invalid_request"),
        ("GET http://proxy/../x", 400, "invalid_request"),
        ("GET http://proxy/v1/async/nothing", 404, "unknown_endpoint"),
        ("GET /v1/../v1/async/nothing", 404, "unknown_endpoint"),
        ("POST http://proxy/-/metrics", 405, "method_not_allowed"),
        ("GET nowhere", 400, "invalid_request"),
        ("GET", 400, "invalid_request"),
        ("GET http://[::1/ ", 400, "invalid_request"),
        ("GET /\x01", 400, "invalid_request"),
    ],
)
async def test_what_is_refused_is_refused_in_our_shape(
    proxy: Client, gateway: Gateway, line: str, status: int, code: str
) -> None:
    got, body = await asked(proxy, line)
    data = json.loads(body)
    assert (got, data["status_code"], data["error"]["code"]) == (status, status, code)
    assert set(data["error"]) == {"type", "code", "message", "param"}
    assert gateway.received == []


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("http://proxy", "/"),
        ("http://proxy?a=1", "/?a=1"),
        ("http://proxy/v1/models?a=%2F", "/v1/models?a=%2F"),
        ("/v1/x/../models?a=../..", "/v1/models?a=../.."),
        ("/x/%2e%2E/v1/./models", "/v1/models"),
        ("/v1/x/../../admin", "/admin"),
        ("/v1/relay/x/../models", "/v1/models"),
        ("/v1//models/", "/v1//models/"),
    ],
)
async def test_dots_are_resolved_before_a_path_goes_upstream(
    proxy: Client, gateway: Gateway, target: str, sent: str
) -> None:
    gateway.behaviour = answer({"passed": True})
    assert (await asked(proxy, f"GET {target}"))[0] == 200
    assert [request.target for request in gateway.received] == [sent]


async def test_dots_do_not_leave_the_path_of_an_upstream(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = answer({"passed": True})
    proxy = await start(upstream={"base_url": f"{gateway.url}/tenants/7/v1"})
    assert (await asked(proxy, "GET /v1/a/../models"))[0] == 200
    assert (await asked(proxy, "GET /v1/../../8/v1/models"))[0] == 400
    assert [request.target for request in gateway.received] == ["/tenants/7/v1/models"]


async def test_a_body_goes_upstream_though_its_target_was_resolved(
    proxy: Client, gateway: Gateway
) -> None:
    gateway.behaviour = answer({"passed": True})
    head = "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    request = f"POST http://proxy/v1/x/../y HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n{head}"
    assert (await proxy.raw(request.encode())).startswith(b"HTTP/1.1 200 ")
    (got,) = gateway.received
    assert (got.method, got.target, got.body) == ("POST", "/v1/y", b"{}")


@pytest.mark.parametrize("before", ["", "GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"])
@pytest.mark.parametrize("method", ["FOO", "GETX", "M-SEARCH", "X.Y!", "V" * 64])
@pytest.mark.parametrize("pieces", [1, 2])
async def test_any_method_passes_through(
    proxy: Client, gateway: Gateway, method: str, before: str, pieces: int
) -> None:
    gateway.behaviour = answer({"passed": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    if before:
        writer.write(before.encode())
        await reader.readuntil(b"}")
    body = b"x" * 500_000
    head = (
        f"{method} /v1/things?a=1 HTTP/1.1\r\nHost: x\r\nX-A: 1\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    if pieces == 1:
        writer.write(head.encode() + body)
    else:
        writer.write(head.encode())
        while not proxy.parts.pass_through.under_way:
            await asyncio.sleep(0)
        writer.write(body)
    await reader.readuntil(b'{"passed": true}')
    if method != "M-SEARCH":  # the parser knows that one, and the connection stays open
        assert await reader.read() == b""
    (got,) = gateway.received
    assert (got.method, got.target, got.header("X-A"), got.body) == (
        method,
        "/v1/things?a=1",
        "1",
        body,
    )
    writer.close()


async def test_another_method_of_a_path_of_ours_is_refused(proxy: Client) -> None:
    assert (await asked(proxy, "FOO /v1/async/embeddings"))[0] == 405


@pytest.mark.parametrize(
    "line", ["FOO", "FOO /", "FOO / HTTP/2.0", "F(O / HTTP/1.1", "V" * 65 + " / HTTP/1.1"]
)
async def test_what_is_no_request_line_is_refused(proxy: Client, gateway: Gateway, line: str) -> None:
    assert (await proxy.raw(f"{line}\r\nHost: x\r\n\r\n".encode())).startswith(b"HTTP/1.0 400 ")
    smuggled = "GET /admin HTTP/1.1\r\nHost: x\r\n\r\n"
    request = f"FOO /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n{smuggled}"
    assert (await proxy.raw(request.encode())).count(b"HTTP/1.1 ") == 1
    twice = "FOO / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"
    assert (await proxy.raw(twice.encode())).startswith(b"HTTP/1.0 400 ")
    assert gateway.received == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-secret-" + b"x" * 40_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nsk-secret-1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization : sk-secret-1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: sk-secret-\x00\r\n\r\n",
        b"GET http://sk-secret-1@[::1/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"sk-(secret-1 / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /sk-secret-\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /?sk-secret-" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_what_cannot_be_read_is_not_quoted(
    proxy: Client, caplog: Any, request_bytes: bytes
) -> None:
    seen = await proxy.raw(request_bytes)
    assert re.match(rb"HTTP/1\.[01] 400 ", seen)
    assert b"sk-secret" not in seen
    assert b"x" * 20 not in seen
    assert "sk-secret" not in caplog.text
