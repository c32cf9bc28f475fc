"""What a client can get wrong, each with the exact error of the wire contract, section 8."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import io
import json
import re
import resource
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pytest

from asyncproxy.loop.heavy_work import HeavyWork
from tests.conftest import EMBED, JSON, Client, Start
from tests.gateway import Gateway, answer, hang

SUBMIT = "/v1/async/embeddings"


async def refused(
    proxy: Client, body: Any, status: int, code: str, param: str | None = None, **kwargs: Any
) -> None:
    endpoint = kwargs.pop("endpoint", "embeddings")
    answer = await proxy.post(f"/v1/async/{endpoint}", body, **kwargs)
    assert (answer.status, answer.code) == (status, code)
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert (await proxy.parts.store.usage()).live == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \n",
        b"{",
        b'{"model":"m","input":"x"',
        b'{"model":"m","input":"x"} x',
        b'{"model":"m","input":"x\xff"}',
        b'{"model":"m","input":"x","other":"\xc3("}',
        b'{"model":"m","input":NaN}',
        b'{"model":"m","input":[1,]}',
        b'{"model":"m","input":01}',
        b'{"model":"m","input":"\x01"}',
        b'\xef\xbb\xbf\xef\xbb\xbf{"model":"m","input":"x"}',
        json.dumps(EMBED).encode("utf-16"),
        b"[" * 10_000 + b"]" * 10_000,
        b'{"model":"m","input":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"model":"m","input":' + b'{"a":' * 10_000,
    ],
)
async def test_what_is_not_json(proxy: Client, body: bytes) -> None:
    await refused(proxy, body, 400, "invalid_json")


@pytest.mark.parametrize("body", [[], "model", 1, None, True])
async def test_json_that_is_no_object(proxy: Client, body: Any) -> None:
    await refused(proxy, body, 400, "invalid_type")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": "x"}, "missing_required_parameter", "model"),
        ({"model": "", "input": "x"}, "missing_required_parameter", "model"),
        ({"model": None, "input": "x"}, "missing_required_parameter", "model"),
        ({"model": 1, "input": "x"}, "invalid_type", "model"),
        ({"model": ["m"], "input": "x"}, "invalid_type", "model"),
        ({"model": "m"}, "missing_required_parameter", "input"),
        ({"model": "m", "input": None}, "missing_required_parameter", "input"),
        ({"model": "m", "input": ""}, "missing_required_parameter", "input"),
        ({"model": "m", "input": []}, "missing_required_parameter", "input"),
    ],
)
async def test_fields(proxy: Client, body: Any, code: str, param: str) -> None:
    await refused(proxy, body, 400, code, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"cheap","model":"dear","input":"x"}', "model"),
        (b'{"model":"m","input":"x","stream":false,"str\\u0065am":true}', "stream"),
    ],
)
async def test_a_field_of_ours_that_is_there_twice(proxy: Client, body: bytes, param: str) -> None:
    await refused(proxy, body, 400, "invalid_json", param)


async def test_other_endpoints_need_a_model_only(proxy: Client) -> None:
    await refused(proxy, {"input": "x"}, 400, "missing_required_parameter", "model", endpoint="rerank")
    await refused(
        proxy,
        {"model": "m", "stream_format": "sse"},
        400,
        "streaming_not_supported",
        "stream_format",
        endpoint="audio/speech",
    )
    stream = {"model": "m", "stream": True}
    await refused(proxy, stream, 400, "streaming_not_supported", "stream", endpoint="chat/completions")
    await proxy.submit({"model": "m", "stream": False, "anything": [1]}, "chat/completions")


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "", "application/xml"],
)
async def test_another_content_type_is_read_as_json_and_sent_as_json(
    proxy: Client, gateway: Gateway, content_type: str
) -> None:
    headers = {"Content-Type": content_type}
    await refused(proxy, b"model=m&input=x", 400, "invalid_json", headers=headers)
    await proxy.outcome(await proxy.submit(headers=headers))
    sent = gateway.received[-1]
    assert [value for name, value in sent.headers if name.lower() == "content-type"] == [
        "application/json"
    ]
    assert sent.json() == EMBED


zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
    "deflate, gzip": lambda body: gzip.compress(zlib.compress(body)),
}


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_compressed_body_is_sent_on_as_it_was(
    proxy: Client, gateway: Gateway, coding: str
) -> None:
    body, headers = json.dumps(EMBED).encode(), {"Content-Encoding": coding}
    packed = CODINGS[coding](body)
    await proxy.outcome(await proxy.submit(packed, headers=headers))
    sent = gateway.received[-1]
    assert (sent.body, sent.header("Content-Encoding")) == (body, None)
    await refused(proxy, packed[:-1], 415, "unsupported_media_type", headers=headers)
    await refused(proxy, b"x" + packed, 415, "unsupported_media_type", headers=headers)


async def test_a_coding_of_the_body_that_is_not_known(proxy: Client) -> None:
    answer = await proxy.post(SUBMIT, headers={"Content-Encoding": "snappy"})
    assert (answer.status, answer.code) == (415, "unsupported_media_type")
    assert answer.headers["Accept-Encoding"] == "gzip, x-gzip, deflate, br, zstd"


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_body_is_undone_no_further_than_its_limit(start: Start, coding: str) -> None:
    proxy = await start(jobs={"max_request_bytes": "1MiB"})
    packed = CODINGS[coding](bytes(16 * 1024**2))
    tracemalloc.start()
    try:
        await refused(proxy, packed, 413, "request_too_large", headers={"Content-Encoding": coding})
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024**2
    finally:
        tracemalloc.stop()


async def test_a_byte_order_mark(proxy: Client, gateway: Gateway) -> None:
    body = json.dumps(EMBED).encode()
    await proxy.outcome(await proxy.submit(b"\xef\xbb\xbf" + body))
    assert gateway.received[-1].body == body


async def test_paths_and_methods(proxy: Client) -> None:
    for path in (
        "/v1/async",
        "/v1/async/",
        "/v1/async/nope",
        "/v1/async/nope/x",
        "/v1/async/embeddings/a/b",
        "/v1/async/embeddings/a/content/x",
    ):
        answer = await proxy.post(path)
        assert (answer.status, answer.code) == (404, "unknown_endpoint")
    path = await proxy.submit()
    for method, target, allow in (
        ("GET", SUBMIT, "POST"),
        ("PUT", SUBMIT, "POST"),
        ("POST", path, "GET, HEAD, DELETE"),
        ("DELETE", path + "/content", "GET, HEAD"),
    ):
        answer = await proxy.request(method, target)
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert answer.headers["Allow"] == allow


async def test_an_endpoint_that_is_not_configured(start: Start) -> None:
    proxy = await start(jobs={"endpoints": ["rerank"]})
    answer = await proxy.post(SUBMIT)
    assert (answer.status, answer.code) == (404, "unknown_endpoint")


def body_of(size: int) -> bytes:
    frame = b'{"model":"m","input":""}'
    return frame[:-2] + b"x" * (size - len(frame)) + frame[-2:]


async def test_one_byte_over_the_limit(start: Start) -> None:
    proxy = await start(jobs={"max_request_bytes": "1MiB"})
    data = io.BytesIO(body_of(1024**2))
    assert (await proxy.request("POST", SUBMIT, data=data, headers=JSON)).status == 202

    async def chunks(size: int) -> Any:
        yield body_of(size)

    assert (await proxy.request("POST", SUBMIT, data=chunks(1024**2), headers=JSON)).status == 202
    for data in (io.BytesIO(body_of(1024**2 + 1)), chunks(1024**2 + 1)):
        answer = await proxy.request("POST", SUBMIT, data=data, headers=JSON)
        assert (answer.status, answer.code) == (413, "request_too_large")
        assert answer.headers["Connection"] == "close"


async def test_too_large_is_said_before_the_body_is_sent(start: Start) -> None:
    proxy = await start(jobs={"max_request_bytes": "1KiB"})
    head = b"POST /v1/async/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2000\r\n"
    for extra in (b"", b"Expect: 100-continue\r\n"):
        answer = await proxy.raw(head + extra + b"\r\n", until_eof=False)
        assert answer.startswith(b"HTTP/1.1 413 ")


async def test_expect_100_continue(proxy: Client) -> None:
    body = json.dumps(EMBED).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    writer.write(
        b"POST /v1/async/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await reader.read()).startswith(b"HTTP/1.1 202 Accepted\r\n")
    writer.close()


async def test_a_slow_body(start: Start) -> None:
    proxy = await start(client_timeout="100ms")
    head = (
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    )
    for path in (b"/v1/async/embeddings", b"/v1/embeddings"):
        answer = await proxy.raw(head % path, until_eof=False)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"Connection: close" in answer


async def test_a_head_that_never_ends(start: Start) -> None:
    proxy = await start(client_timeout="100ms")
    assert await proxy.raw(b"") == b""
    assert await proxy.raw(b"GET / HTTP/1.1\r\nHost:") == b""


async def test_half_a_body_is_no_job(proxy: Client) -> None:
    head = b"POST /v1/async/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    writer.write(head + b'{"model":')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await proxy.submit()
    usage = await proxy.parts.store.usage()  # one look: the job may end between two
    assert usage.live + usage.results == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Y : z\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"v" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"p" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 400 + b"\r\n",
    ],
)
async def test_what_no_parser_should_accept(
    proxy: Client, gateway: Gateway, request_bytes: bytes
) -> None:
    answer = await proxy.raw(request_bytes)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/\d\.\d 400 ", head), answer
    assert json.loads(body)["error"]["code"] == "invalid_request"
    assert gateway.received == []


async def test_smuggling_by_a_bad_chunk(proxy: Client, gateway: Gateway) -> None:
    answer = await proxy.raw(
        b"POST /v1/async/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nGET /admin HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    assert re.match(rb"HTTP/1\.[01] 400 ", answer)
    assert answer.count(b"HTTP/1.") == 1
    assert gateway.received == []


async def test_header_injection(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = _echo
    answer = await proxy.raw(
        b"GET /v1/models%0d%0aX-Evil:%20yes?q=%0d%0a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"X-Request-Id: a%0d%0aX-Evil: yes\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    (got,) = gateway.received
    assert got.target == "/v1/models%0d%0aX-Evil:%20yes?q=%0d%0a"
    assert got.all("X-Evil") == []
    job = await proxy.raw(
        b"GET /v1/async/embeddings/x%0d%0aX-Evil:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    assert job.startswith(b"HTTP/1.1 404 ")
    assert b"Evil" not in job


async def _echo(_request: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


async def test_a_job_cannot_keep_a_header_that_is_not_utf8(proxy: Client, gateway: Gateway) -> None:
    body = json.dumps(EMBED).encode()
    answer = await proxy.raw(
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Name: caf\xe9\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (SUBMIT.encode(), len(body), body)
    )
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_request" in answer
    assert gateway.received == []


async def test_a_model_that_no_upstream_has(start: Start, gateway: Gateway) -> None:
    proxy = await start(upstream={"models": ["text-*", "bge-m3"]})
    await proxy.submit({"model": "bge-m3", "input": "x"})
    for path in (SUBMIT, "/v1/embeddings"):
        answer = await proxy.post(path, {"model": "gpt", "input": "x"})
        assert (answer.status, answer.code) == (404, "model_not_found")
    assert answer.json()["error"]["param"] == "model"


async def test_a_name_that_stands_deeper_is_not_ours(proxy: Client, gateway: Gateway) -> None:
    """A tool's schema may well have a `model`, an `input` and a `stream`."""
    gateway.behaviour = answer({"ok": 1})
    schema = {"properties": {"model": {"type": "string"}, "input": [{"model": 1, "stream": True}]}}
    body = {"model": "m", "input": '"model": 1', "tools": [schema, schema], "n": "N"}
    text = json.dumps(body).encode().replace(b'"N"', b"9" * 5000)
    await refused(proxy, text[:-1] + b',"model":"n"}', 400, "invalid_json", "model")
    assert (await proxy.outcome(await proxy.submit(text)))["status"] == "completed"


async def test_a_large_body_with_many_names_is_read_without_being_built(
    proxy: Client, gateway: Gateway
) -> None:
    gateway.behaviour = answer({"ok": 1})
    body = b'{"model":"m","input":[' + b'{"model":1},' * 1_000_000 + b"0]}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (await proxy.outcome(await proxy.submit(body)))["status"] == "completed"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250 * 1024


async def test_a_large_body_gives_way_to_others(
    proxy: Client, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is read: it is checked in steps, and hashed in steps."""
    gateway.behaviour = hang
    turns = 0
    inner = HeavyWork.next

    async def counted(heavy_work: HeavyWork) -> None:
        nonlocal turns
        turns += 1
        await inner(heavy_work)

    monkeypatch.setattr(HeavyWork, "next", counted)
    deep = b'{"model":"m","input":[' + b"[[[[[1]]]]]," * 120_000 + b"1]}"
    await proxy.submit(deep)
    checked = turns
    assert checked >= len(deep) // (128 * 1024)
    await proxy.submit(deep, headers={"Idempotency-Key": "k"})
    assert turns - checked >= checked + len(deep) // 1024**2
    turns = 0
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"\r\n--c" * 300_000
    )
    coding = {"Content-Type": "multipart/form-data; boundary=b"}
    answered = await proxy.post("/v1/async/audio/transcriptions", form, headers=coding)
    assert answered.code == "invalid_form"
    assert turns >= len(form) // (256 * 1024)


async def test_a_large_escaped_text_costs_no_more_than_its_size(
    proxy: Client, gateway: Gateway
) -> None:
    """Names are looked for in it, for one of its letters is escaped: nothing is kept per character."""
    gateway.behaviour = answer({"ok": 1})
    body = b'{"model":"m","input":"\\u0061' + b"a" * 20_000_000 + b'"}'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (await proxy.outcome(await proxy.submit(body)))["status"] == "completed"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 350 * 1024


async def test_a_model_has_a_length(proxy: Client) -> None:
    await refused(proxy, {"model": "m" * 513, "input": "x"}, 400, "invalid_type", "model")


async def test_a_coding_that_is_not_understood(proxy: Client, gateway: Gateway) -> None:
    answer_bytes = await proxy.raw(
        b"POST /v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\nConnection: close\r\n\r\n0\r\n\r\n"
    )
    assert answer_bytes.startswith(b"HTTP/1.1 400 ")
    assert gateway.received == []


async def test_a_host_that_is_not_utf_8_is_refused(proxy: Client) -> None:
    body = json.dumps(EMBED).encode()
    answer = await proxy.raw(
        b"POST %b HTTP/1.1\r\nHost: \xff\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (SUBMIT.encode(), len(body), body)
    )
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"Host is not UTF-8" in answer
