"""Submit, poll, content, delete: the wire contract, sections 2 to 4 and 7."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from datetime import datetime, timedelta
from typing import Any

import pytest

from asyncproxy.core.endpoints import ENDPOINTS
from tests.conftest import EMBED, Client, Start
from tests.gateway import Gateway, Received, answer, chunked, hang, in_turn, raw

ALICE = {"Authorization": "Bearer sk-alice"}
BOB = {"Authorization": "Bearer sk-bob"}
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def test_a_submit_answers_at_once_with_the_job(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    answer = await proxy.post("/v1/async/embeddings")
    assert answer.status == 202
    job = answer.json()
    assert set(job) == {"id", "status", "created_at"}
    assert job["status"] == "pending"
    assert uuid.UUID(job["id"]).version == 4
    assert RFC3339.fullmatch(job["created_at"])
    assert answer.headers["Location"] == f"/v1/async/embeddings/{job['id']}"
    assert 1 <= int(answer.headers["Retry-After"]) <= 120
    assert answer.headers["Content-Type"] == "application/json"


async def test_a_poll_shows_the_job_on_its_way(proxy: Client, gateway: Gateway) -> None:
    go_on = asyncio.Event()

    async def slow(request: Received, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await answer({"ok": 1})(request, writer)

    gateway.behaviour = slow
    path = await proxy.submit()
    await gateway.until(lambda: gateway.busy == 1)
    poll = await proxy.get(path)
    assert (poll.status, poll.json()["status"]) == (202, "processing")
    assert set(poll.json()) == {"id", "status", "created_at"}
    assert 1 <= int(poll.headers["Retry-After"]) <= 120
    content = await proxy.get(path + "/content")
    assert (content.status, content.json()) == (202, poll.json())
    go_on.set()
    done = await proxy.outcome(path)
    assert list(done) == [
        "id",
        "status",
        "created_at",
        "completed_at",
        "expires_at",
        "status_code",
        "result",
    ]
    assert (done["status"], done["status_code"], done["result"]) == ("completed", 200, {"ok": 1})
    lifetime = datetime.fromisoformat(done["expires_at"]) - datetime.fromisoformat(done["completed_at"])
    assert lifetime == timedelta(hours=1)


@pytest.mark.one_store
@pytest.mark.parametrize("endpoint", sorted(ENDPOINTS))
async def test_every_endpoint_has_its_async_twin(
    proxy: Client, gateway: Gateway, endpoint: str
) -> None:
    gateway.behaviour = answer({"endpoint": endpoint})
    path = await proxy.submit({"model": "m", "input": "x"}, endpoint + "?api-version=1&x=%2F")
    assert path.startswith(f"/v1/async/{endpoint}/")
    assert (await proxy.outcome(path))["result"] == {"endpoint": endpoint}
    assert gateway.received[0].target == f"/v1/{endpoint}?api-version=1&x=%2F"


NUMBERS = b'{ "a" : 1.0e5,"b":0.1000000000000000055511151231257827, "c":\t12345678901234567890123, "c":"\\u00e9" }'


async def test_the_result_is_the_upstreams_bytes(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(NUMBERS)
    path = await proxy.submit()
    await proxy.outcome(path)
    assert b'"result":' + NUMBERS + b"}" in (await proxy.get(path)).body
    content = await proxy.get(path + "/content")
    assert (content.status, content.body) == (200, NUMBERS)


async def test_content_is_the_upstreams_own_response(proxy: Client, gateway: Gateway) -> None:
    headers = [
        ("X-RateLimit-Remaining", "7"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("Connection", "x-hop"),
        ("x-hop", "1"),
    ]
    gateway.behaviour = answer(
        {"error": {"message": "slow down", "type": "t", "code": "c", "param": None}},
        status=402,
        headers=headers,
    )
    path = await proxy.submit()
    await proxy.outcome(path)
    content = await proxy.get(path + "/content")
    assert content.status == 402
    assert content.json()["error"]["message"] == "slow down"
    assert content.headers["X-RateLimit-Remaining"] == "7"
    assert content.headers.getall("Set-Cookie") == ["a=1", "b=2"]
    assert "x-hop" not in content.headers


@pytest.mark.one_store
async def test_content_headers_are_bounded(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({}, headers=[(f"x-{i}", "v" * 1000) for i in range(40)])
    path = await proxy.submit()
    await proxy.outcome(path)
    content = await proxy.get(path + "/content")
    assert (
        14_000
        < sum(len(k) + len(v) + 4 for k, v in content.headers.items() if k.startswith("x-"))
        <= 16 * 1024
    )


@pytest.mark.one_store
async def test_a_compressed_result_is_kept_decoded(proxy: Client, gateway: Gateway) -> None:
    import gzip

    gateway.behaviour = answer(gzip.compress(b'{"a":1}'), headers=[("Content-Encoding", "gzip")])
    path = await proxy.submit()
    assert (await proxy.outcome(path))["result"] == {"a": 1}
    content = await proxy.get(path + "/content")
    assert content.body == b'{"a":1}'
    assert "Content-Encoding" not in content.headers


def _embeddings(texts: int) -> bytes:
    """An answer of some 11 KB for each text."""
    vectors = [{"index": i, "embedding": [i + 0.123456789] * 1000} for i in range(texts)]
    return json.dumps({"object": "list", "data": vectors, "usage": {"total_tokens": 1}}).encode()


LARGE = [
    _embeddings(100),
    json.dumps({"choices": [{"message": {"content": '"a, \\ b", ' * 50_000}}]}).encode(),
    json.dumps([{"é": "ü, " * 100}] * 2000, ensure_ascii=False).encode(),
]


@pytest.mark.parametrize(
    ("body", "size"),
    list(zip(LARGE, (100_000, None, 1000), strict=True)),
    ids=["numbers in chunks", "escapes at once", "utf-8 in crumbs"],
)
async def test_a_large_result_is_the_upstream_s_to_the_byte(
    proxy: Client, gateway: Gateway, body: bytes, size: int | None
) -> None:
    gateway.behaviour = answer(body) if size is None else chunked(body, size)
    path = await proxy.submit()
    await proxy.outcome(path)
    poll, content = await proxy.get(path), await proxy.get(path + "/content")
    assert content.body == body
    assert b'"result":' + body + b"}" == poll.body[poll.body.index(b'"result":') :]
    assert poll.json()["status"] == "completed"
    for suffix, whole in (("", poll), ("/content", content)):
        head = await proxy.request("HEAD", path + suffix)
        assert (head.status, head.body) == (200, b"")
        assert int(head.headers["Content-Length"]) == len(whole.body)


@pytest.mark.one_store
@pytest.mark.parametrize("size", [None, 100_000], ids=["at once", "in chunks"])
@pytest.mark.parametrize("at", [0.01, 0.5, 0.999])
async def test_a_large_answer_that_is_not_json_is_a_failure_that_says_where(
    proxy: Client, gateway: Gateway, at: float, size: int | None
) -> None:
    body = bytearray(LARGE[0])
    broken = body.index(b",", int(at * len(body)))
    body[broken : broken + 1] = b"]"
    gateway.behaviour = answer(bytes(body)) if size is None else chunked(bytes(body), size)
    done = await proxy.outcome(await proxy.submit())
    assert (done["status"], done["status_code"]) == ("failed", 502)
    error = done["error"]["error"]
    assert error["code"] == "invalid_upstream_response"
    position = int(re.search(r"byte ([0-9]+)", error["message"])[1])  # type: ignore[index]
    assert abs(position - broken) < 10


async def test_an_empty_success_is_null(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = raw(b"HTTP/1.1 204 No Content\r\n\r\n", close=False)
    path = await proxy.submit()
    done = await proxy.outcome(path)
    assert (done["status"], done["status_code"], done["result"]) == ("completed", 204, None)
    content = await proxy.get(path + "/content")
    assert (content.status, content.body) == (204, b"")


async def test_half_a_surrogate_pair_is_json(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b'{"text":"cut \\ud83d"}')
    path = await proxy.submit(b'{"model":"m","input":"cut \\ud83d"}')
    await proxy.outcome(path)
    assert (await proxy.get(path + "/content")).body == b'{"text":"cut \\ud83d"}'
    assert gateway.received[0].body == b'{"model":"m","input":"cut \\ud83d"}'


@pytest.mark.one_store
async def test_what_the_upstream_gets(proxy: Client, gateway: Gateway) -> None:
    body = b'{"model": "m",  "input": "caf\xc3\xa9", "user": 1.50}'
    path = await proxy.submit(
        body,
        headers={
            **ALICE,
            "X-Custom": "kept",
            "Prefer": "x",
            "x-bf-async-job-result-ttl": "60",
            "x-bf-async-webhook": "http://x",
            "Connection": "X-Hop",
            "X-Hop": "1",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        },
    )
    await proxy.outcome(path, headers=ALICE)
    (got,) = gateway.received
    assert (got.method, got.target, got.body) == ("POST", "/v1/embeddings", body)
    job_id = path.rpartition("/")[2]
    assert got.header("Authorization") == "Bearer sk-alice"
    assert got.header("X-Custom") == "kept"
    assert got.header("Content-Type") == "application/json"
    assert got.header("Content-Length") == str(len(body))
    assert got.header("Host") == gateway.url.removeprefix("http://")
    assert got.header("X-Forwarded-For") == "127.0.0.1"
    assert got.header("X-Forwarded-Proto") == "http"
    assert got.header("X-Forwarded-Host") == proxy.url.removeprefix("http://")
    assert got.header("X-Request-Id") == job_id
    assert got.header("Idempotency-Key") == job_id
    assert got.header("traceparent") == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for gone in ("Prefer", "x-bf-async-job-result-ttl", "x-bf-async-webhook", "X-Hop", "Expect"):
        assert got.all(gone) == []


@pytest.mark.one_store
@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (None, 3600),
        ("60", 60),
        ("0", 3600),
        ("-5", 3600),
        ("1.5", 3600),
        ("soon", 3600),
        ("", 3600),
        ("86400", 86400),
        ("86401", 86400),
        ("9" * 30, 86400),
        ("\u0661", 3600),  # a digit, but not one of ours
    ],
)
async def test_the_lifetime_of_a_result(proxy: Client, asked: str | None, seconds: int) -> None:
    headers = {} if asked is None else {"x-bf-async-job-result-ttl": asked}
    done = await proxy.outcome(await proxy.submit(headers=headers))
    lifetime = datetime.fromisoformat(done["expires_at"]) - datetime.fromisoformat(done["completed_at"])
    assert lifetime == timedelta(seconds=seconds)


async def test_only_the_submitter_sees_a_job(proxy: Client, gateway: Gateway) -> None:
    path = await proxy.submit(headers=ALICE)
    await proxy.outcome(path, headers=ALICE)
    unknown = f"/v1/async/embeddings/{uuid.uuid4()}"
    refused = [await proxy.get(unknown, headers=ALICE)]
    for other in (BOB, {}, {"x-api-key": "sk-bob"}, {"Authorization": "Basic sk-alice"}):
        refused.append(await proxy.get(path, headers=other))
        refused.append(await proxy.get(path + "/content", headers=other))
        refused.append(await proxy.request("DELETE", path, headers=other))
    # of another endpoint, and what is no id at all
    refused.append(await proxy.get(path.replace("embeddings", "rerank"), headers=ALICE))
    refused.append(await proxy.get("/v1/async/embeddings/x%2f..etc", headers=ALICE))
    for other_answer in refused:
        assert (other_answer.status, other_answer.code) == (404, "job_not_found")
    assert len({re.sub(b"rerank", b"embedding", a.body) for a in refused}) == 1
    assert {tuple(sorted(set(a.headers) - {"Date"})) for a in refused} == {
        ("Cache-Control", "Content-Length", "Content-Type")
    }
    assert (await proxy.get(path, headers=ALICE)).status == 200


@pytest.mark.one_store
@pytest.mark.parametrize("header", ["x-bf-vk", "x-api-key", "api-key", "x-goog-api-key"])
async def test_the_same_key_is_the_same_credential(proxy: Client, header: str) -> None:
    path = await proxy.submit(headers=ALICE)
    for same in (
        {header: "sk-alice"},
        {header.upper(): "sk-alice"},
        {"Authorization": "bearer  sk-alice"},
    ):
        await proxy.outcome(path, headers=same)
    assert (await proxy.get(path, headers={"x-bf-vk": "sk-bob", **ALICE})).status == 404


async def test_a_job_without_credential_is_open_to_its_id(proxy: Client) -> None:
    path = await proxy.submit()
    await proxy.outcome(path)
    assert (await proxy.get(path, headers=BOB)).status == 200


async def test_delete_before_it_was_sent(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(upstream={"concurrency": 1})
    await proxy.submit()
    await gateway.until(lambda: gateway.busy == 1)
    path = await proxy.submit({"model": "m", "input": "second"})
    deleted = await proxy.request("DELETE", path)
    assert (deleted.status, deleted.body) == (204, b"")
    assert (await proxy.get(path)).code == "job_not_found"
    assert (await proxy.request("DELETE", path)).code == "job_not_found"
    assert [r.json()["input"] for r in gateway.received] == ["hello"]


async def test_delete_aborts_the_call_and_frees_its_place(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = in_turn(hang, answer({"ok": 1}))
    proxy = await start(upstream={"concurrency": 1})
    path = await proxy.submit()
    await gateway.until(lambda: gateway.busy == 1)
    waiting = await proxy.submit()
    assert (await proxy.request("DELETE", path)).status == 204
    await gateway.until(lambda: gateway.open_connections == 0 or len(gateway.received) == 2)
    assert (await proxy.outcome(waiting))["result"] == {"ok": 1}
    assert (await proxy.get(path)).status == 404


async def test_delete_drops_a_result(proxy: Client) -> None:
    path = await proxy.submit()
    await proxy.outcome(path)
    assert (await proxy.request("DELETE", path)).status == 204
    assert (await proxy.get(path)).status == 404
    assert await proxy.parts.store.usage() == (0, 0, 0)


async def test_head_is_a_poll_without_the_body(proxy: Client) -> None:
    path = await proxy.submit()
    await proxy.outcome(path)
    for suffix in ("", "/content"):
        head, get = await proxy.request("HEAD", path + suffix), await proxy.get(path + suffix)
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Length"] == get.headers["Content-Length"]


async def test_a_result_expires(start: Start) -> None:
    proxy = await start(jobs={"result_ttl": "1s"})
    path = await proxy.submit()
    done = await proxy.outcome(path)
    expiry = datetime.fromisoformat(done["expires_at"])
    while (poll := await proxy.get(path)).status == 200:
        assert datetime.now(expiry.tzinfo) < expiry + timedelta(seconds=5)
        await asyncio.sleep(0.05)
    assert poll.code == "job_not_found"
    assert datetime.now(expiry.tzinfo) >= expiry


async def test_a_large_result_arrives_whole(proxy: Client, gateway: Gateway) -> None:
    big = b'["' + b"x" * 5_000_000 + b'"]'
    gateway.behaviour = answer(big)
    path = await proxy.submit()
    await proxy.outcome(path)
    assert (await proxy.get(path + "/content")).body == big


async def test_openai_errors_keep_their_parts(proxy: Client, gateway: Gateway) -> None:
    error: dict[str, Any] = {
        "message": "no such model",
        "type": "t",
        "code": "model_not_found",
        "param": "model",
    }
    gateway.behaviour = answer({"error": error}, status=404)
    done = await proxy.outcome(await proxy.submit({"model": "gone", "input": "x"}))
    assert (done["status"], done["status_code"]) == ("failed", 404)
    assert "result" not in done
    assert done["error"]["error"] == error
    assert done["error"]["extra_fields"] == {
        "provider": "gateway",
        "model_requested": "gone",
        "request_type": "embedding",
    }


@pytest.mark.parametrize("body", [b"<html>oh no</html>", b'{"detail":"oh no"}', b'{"error":"oh no"}'])
async def test_other_errors_become_the_message(proxy: Client, gateway: Gateway, body: bytes) -> None:
    gateway.behaviour = answer(body, status=403)
    done = await proxy.outcome(await proxy.submit())
    assert done["error"]["error"]["message"] == body.decode()
    gateway.behaviour = answer(b"x" * 5000, status=403, content_type="text/plain")
    done = await proxy.outcome(await proxy.submit(EMBED))
    assert done["error"]["error"]["message"] == "x" * 2000
