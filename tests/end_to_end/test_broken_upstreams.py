"""What a gateway can do to a job: each job ends with the right error, in bounded time and memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from collections import Counter
from datetime import datetime
from typing import Any

import pytest

from tests.conftest import Client, Start
from tests.gateway import Behaviour, Gateway, Received, answer, embeddings, hang, in_turn, raw, reset

LARGE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


async def fails(proxy: Client, status: int, code: str | None) -> Any:
    done = await proxy.outcome(await proxy.submit())
    assert (done["status"], done["status_code"]) == ("failed", status)
    assert done["error"]["status_code"] == status
    assert done["error"]["error"]["code"] == code
    assert done["error"]["extra_fields"]["provider"] == "gateway"
    assert "127.0.0.1" not in str(done)
    return done


def coded(body: bytes, *codings: str, status: int = 200) -> Behaviour:
    """Answer with JSON that is said to be compressed so."""
    return answer(body, status=status, headers=[("Content-Encoding", name) for name in codings])


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_nobody_listens(start: Start) -> None:
    proxy = await start(upstream={"base_url": f"http://127.0.0.1:{closed_port()}/v1"})
    await fails(proxy, 502, "upstream_unreachable")
    assert (await proxy.get("/v1/models")).code == "upstream_unreachable"


async def test_a_name_that_does_not_resolve(start: Start) -> None:
    proxy = await start(upstream={"base_url": "http://gateway.invalid/v1"})
    await fails(proxy, 502, "upstream_unreachable")


@pytest.mark.one_store
@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        (reset, 502, "upstream_unreachable"),
        (raw(b""), 502, "upstream_unreachable"),
        (raw(b"what?\r\n\r\n"), 502, "upstream_unreachable"),
        (raw(LARGE + b"Content-Length: 100\r\n\r\n{"), 502, "upstream_unreachable"),
        (raw(LARGE + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"), 502, "upstream_unreachable"),
        (coded(b"\x00\x01", "foo"), 502, "invalid_upstream_response"),
        (coded(b"\x00\x01", "gzip"), 502, "invalid_upstream_response"),
        (coded(gzip.compress(b"{}")[:-1], "gzip"), 502, "invalid_upstream_response"),
        (coded(b"\x00", "gzip", status=400), 400, None),
        (coded(b"\x00", "foo", status=404), 404, None),
        (
            coded(gzip.compress(b'{"error":{"message":"m","code":"c"}}'), "gzip", status=400),
            400,
            "c",
        ),
        (answer(b"{broken"), 502, "invalid_upstream_response"),
        (answer(b'{"a":NaN}'), 502, "invalid_upstream_response"),
        (answer(b'{"a":"\xff"}'), 502, "invalid_upstream_response"),
        (answer(b"["), 502, "invalid_upstream_response"),
        (answer(b"[" * 100_000 + b"]" * 100_000), 502, "invalid_upstream_response"),
        (answer(b"[" + b"0," * 2_500_000 + b"]"), 502, "invalid_upstream_response"),
        (answer(b""), 502, "invalid_upstream_response"),
        (answer(b"<html>", content_type="text/html"), 502, "invalid_upstream_response"),
        (answer(b"moved", status=302, headers=[("Location", "http://127.0.0.1:1/")]), 302, None),
        (answer({"error": {"message": "m", "code": "c"}}, status=400), 400, "c"),
        (answer(b"", status=404), 404, None),
        (answer({"error": {"message": "m", "code": "c"}}, status=429), 429, "c"),
        (answer(b"x", status=500), 500, None),
    ],
)
async def test_what_it_may_answer(
    proxy: Client, gateway: Gateway, behaviour: Behaviour, status: int, code: str | None
) -> None:
    gateway.behaviour = behaviour
    await fails(proxy, status, code)
    retried = status == 500 or code == "upstream_unreachable"
    if status == 429:
        assert len(gateway.received) > 1, "it is asked until the outage is over"
    else:
        assert len(gateway.received) == (3 if retried else 1)


@pytest.mark.one_store
@pytest.mark.parametrize(
    "behaviour",
    [
        answer(b"\xef\xbb\xbf[1]"),
        answer(b"[1]", content_type="text/plain"),
        answer(b"[1]", content_type="application/octet-stream"),
        answer(b"[1]", content_type=None),
        coded(gzip.compress(b"[1]"), "gzip"),
        coded(zlib.compress(b"[1]"), "Deflate"),
        coded(gzip.compress(gzip.compress(b"[1]")), "gzip, gzip"),
        coded(gzip.compress(zlib.compress(b"\xef\xbb\xbf[1]")), "deflate", "gzip"),
        coded(b"[1]", "identity"),
        coded(b"[1]", "gzip"),
        coded(b"[1]", "foo"),
    ],
)
async def test_what_works_when_sync_works_as_a_job(
    proxy: Client, gateway: Gateway, behaviour: Behaviour
) -> None:
    gateway.behaviour = behaviour
    path = await proxy.submit()
    assert (await proxy.outcome(path))["result"] == [1]
    response = await proxy.get(f"{path}/content")
    assert (response.body, response.headers.get("Content-Encoding")) == (b"[1]", None)
    assert len(gateway.received) == 1


@pytest.mark.one_store
async def test_a_large_answer_that_is_compressed_is_a_result(proxy: Client, gateway: Gateway) -> None:
    result = [1.5] * 500_000
    gateway.behaviour = coded(gzip.compress(json.dumps(result).encode()), "gzip")
    assert (await proxy.outcome(await proxy.submit()))["result"] == result


async def test_the_retries_of_a_job_look_alike(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = in_turn(answer(b"", status=503), reset, answer({"ok": 1}))
    done = await proxy.outcome(await proxy.submit())
    assert done["result"] == {"ok": 1}
    keys = {request.header("Idempotency-Key") for request in gateway.received}
    assert (len(gateway.received), keys) == (3, {done["id"]})
    assert len({request.body for request in gateway.received}) == 1


async def test_it_hangs(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(upstream={"timeout": {"total": "100ms"}})
    await fails(proxy, 504, "upstream_timeout")
    await gateway.until(lambda: len(gateway.received) == 3)  # it may read one when its client has left


@pytest.mark.one_store
async def test_it_drips_for_ever(start: Start, gateway: Gateway) -> None:
    async def drip(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(LARGE + b"Content-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await asyncio.sleep(0.005)

    gateway.behaviour = drip
    proxy = await start(upstream={"timeout": {"total": "100ms"}, "retry": {"attempts": 1}})
    await fails(proxy, 504, "upstream_timeout")


async def test_the_deadline_is_counted_over_all_attempts(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(
        jobs={"deadline": "400ms"},
        upstream={
            "retry": {"attempts": 1000, "backoff": "1ms", "outage": "1m"},
            "timeout": {"total": "60ms"},
        },
    )
    done = await fails(proxy, 504, "deadline_exceeded")
    assert 2 <= len(gateway.received) <= 10
    took = datetime.fromisoformat(done["completed_at"]) - datetime.fromisoformat(done["created_at"])
    assert took.total_seconds() >= 0.4


async def test_a_job_that_waits_past_its_deadline_fails(start: Start, gateway: Gateway) -> None:
    """That it is not sent any more is shown where the clock stands still: tests/test_dispatcher.py."""
    gateway.behaviour = hang
    proxy = await start(jobs={"deadline": "300ms"}, upstream={"concurrency": 1})
    first, second = await proxy.submit(), await proxy.submit({"model": "m", "input": "second"})
    for path in (first, second):
        assert (await proxy.outcome(path))["error"]["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("framing", [b"Content-Length: 1073741824\r\n\r\n", b"\r\n"])
async def test_a_gigabyte(start: Start, gateway: Gateway, framing: bytes) -> None:
    sent = 0

    async def flood(_request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(LARGE + framing)
        piece = b" " * 65536
        for _ in range(16384):
            writer.write(piece)
            sent += len(piece)
            await writer.drain()

    gateway.behaviour = flood
    proxy = await start(jobs={"max_result_bytes": "1MiB"})
    await fails(proxy, 502, "result_too_large")
    assert len(gateway.received) == 1
    assert sent < 32 * 1024**2


@pytest.mark.one_store
async def test_a_bomb_is_measured_unpacked(start: Start, gateway: Gateway) -> None:
    bomb = gzip.compress(b'["' + b"x" * 50_000_000 + b'"]')
    gateway.behaviour = answer(bomb, headers=[("Content-Encoding", "gzip")])
    proxy = await start(jobs={"max_result_bytes": "1MiB"})
    await fails(proxy, 502, "result_too_large")


async def test_retry_after_is_honoured(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = in_turn(
        answer(b"", status=429, headers=[("Retry-After", "1")]), answer({"ok": 1})
    )
    done = await proxy.outcome(await proxy.submit())
    took = datetime.fromisoformat(done["completed_at"]) - datetime.fromisoformat(done["created_at"])
    assert took.total_seconds() >= 1


async def test_a_retry_after_past_the_deadline_is_the_end(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = answer(
        {"error": {"message": "no quota", "code": "insufficient_quota"}},
        status=429,
        headers=[("Retry-After", "999999")],
    )
    proxy = await start()
    await fails(proxy, 429, "insufficient_quota")
    assert len(gateway.received) == 1


async def test_a_rate_limit_pauses_its_lane_and_no_other(start: Start, gateway: Gateway) -> None:
    """One 429 for a credential: its other jobs wait, another credential's and another model's do not."""
    all_are_there = asyncio.Event()

    async def limited(request: Received, writer: asyncio.StreamWriter) -> None:
        await all_are_there.wait()
        first = len(gateway.received) == 1
        behave = answer(b"", status=429, headers=[("Retry-After", "1")]) if first else embeddings
        await behave(request, writer)

    gateway.behaviour = limited
    proxy = await start(upstream={"concurrency": 1})
    a, b = {"Authorization": "Bearer sk-alice"}, {"Authorization": "Bearer sk-bob"}
    other = {"model": "other", "input": "x"}
    submitted = [(a, await proxy.submit(headers=a)) for _ in range(5)]
    submitted += [(a, await proxy.submit(other, headers=a)), (b, await proxy.submit(headers=b))]
    all_are_there.set()
    for headers, path in submitted:
        assert (await proxy.outcome(path, headers=headers))["status"] == "completed"
    order = [(r.header("Authorization"), r.json()["model"]) for r in gateway.received]
    lane = ("Bearer sk-alice", "m")
    assert (order[0], order[3:]) == (lane, [lane] * 5)
    assert set(order[1:3]) == {("Bearer sk-alice", "other"), ("Bearer sk-bob", "m")}


async def test_an_upstream_that_serves_one_at_a_time_fails_no_job(
    start: Start, gateway: Gateway
) -> None:
    serving = False

    async def one_at_a_time(request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal serving
        if serving:
            await answer(b"", status=429)(request, writer)
            return
        serving = True
        await asyncio.sleep(0.05)
        serving = False
        await embeddings(request, writer)

    gateway.behaviour = one_at_a_time
    patient = {"backoff": "1ms", "max_backoff": "2ms", "outage": "1m"}
    proxy = await start(upstream={"concurrency": 8, "retry": patient})
    paths = [await proxy.submit() for _ in range(20)]
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"
    calls = Counter(request.header("Idempotency-Key") for request in gateway.received)
    assert max(calls.values()) > 1, "a 429 uses up no attempt"


async def test_a_quota_that_is_used_up_fails_its_jobs_soon(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(
        {"error": {"message": "no quota", "code": "insufficient_quota"}}, status=429
    )
    paths = [await proxy.submit() for _ in range(200)]
    for path in paths:
        assert (await proxy.outcome(path))["status_code"] == 429
    assert len(gateway.received) < 200 * 10


async def test_one_clients_many_jobs_do_not_starve_anothers_one(start: Start, gateway: Gateway) -> None:
    go_on = asyncio.Event()

    async def gated(request: Received, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await embeddings(request, writer)

    gateway.behaviour = gated
    proxy = await start(upstream={"concurrency": 1})
    for number in range(50):
        await proxy.submit({"model": "m", "input": str(number)}, headers={"x-api-key": "sk-many"})
    one = await proxy.submit(headers={"x-api-key": "sk-one"})
    go_on.set()
    await proxy.outcome(one, headers={"x-api-key": "sk-one"})
    await gateway.until(lambda: len(gateway.received) == 51)
    order = [r.header("x-api-key") for r in gateway.received]
    assert order.index("sk-one") == 2 or order.index("sk-one") == 1
    mine = [r.json()["input"] for r in gateway.received if r.header("x-api-key") == "sk-many"]
    assert mine == [str(n) for n in range(50)]


async def test_concurrency_is_what_is_configured(start: Start, gateway: Gateway) -> None:
    go_on = asyncio.Event()

    async def gated(request: Received, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await embeddings(request, writer)

    gateway.behaviour = gated
    proxy = await start(upstream={"concurrency": 7})
    paths = [await proxy.submit() for _ in range(40)]
    await gateway.until(lambda: gateway.busy == 7)
    go_on.set()
    for path in paths:
        await proxy.outcome(path)
    assert gateway.busiest == 7
