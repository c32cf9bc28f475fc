"""The relay: the wire contract, section 6."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest
from aiohttp import web

from asyncproxy.core.jobs import Outcome
from asyncproxy.web import job_responses
from asyncproxy.web.relay import Relay
from asyncproxy.web.wire_response import WireResponse
from tests.conftest import EMBED, Client, Start
from tests.end_to_end.test_openai_client import sdk_embeddings
from tests.gateway import Gateway, Received, answer, hang
from tests.shell import shell

RELAY = "/v1/relay/embeddings"


class Slow:
    """An upstream that is done when the test says so."""

    def __init__(self, then: Any = None) -> None:
        self.done = asyncio.Event()
        self._then = then or answer({"ok": 1}, headers=[("x-cost", "3")])

    async def __call__(self, request: Received, writer: asyncio.StreamWriter) -> None:
        await self.done.wait()
        await self._then(request, writer)


async def test_done_in_time_is_the_sync_answer(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"ok": 1}, headers=[("x-cost", "3")])
    response = await proxy.post(RELAY + "?api-version=1")
    assert (response.status, response.json(), response.headers["x-cost"]) == (200, {"ok": 1}, "3")
    assert gateway.received[0].target == "/v1/embeddings?api-version=1"


async def test_what_takes_longer_is_redirected_and_held_again(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = slow = Slow()
    proxy = await start(jobs={"relay_hold": "50ms"})
    first = await proxy.post(RELAY)
    assert first.status == 303
    location = first.location
    assert location.startswith(RELAY + "/")
    assert location.endswith("?hop=1")
    second = await proxy.get(location)
    assert (second.status, second.location) == (303, location.replace("hop=1", "hop=2"))
    slow.done.set()
    for method in ("GET", "POST"):
        done = await proxy.request(method, second.location)
        assert (done.status, done.json()) == (200, {"ok": 1})
    assert len(gateway.received) == 1


@pytest.mark.one_store
async def test_a_redirect_is_relative(start: Start, gateway: Gateway) -> None:
    """It holds behind an ingress that strips a prefix: nothing in it is from the root."""
    gateway.behaviour = hang
    proxy = await start(jobs={"relay_hold": "10ms"})
    for path, folder in ((RELAY, "embeddings"), ("/v1/relay/chat/completions", "completions")):
        first = await proxy.post(path, headers={"X-Forwarded-Prefix": "/ai"})
        job_id = first.headers["Location"].removeprefix(f"{folder}/").partition("?")[0]
        assert first.headers["Location"] == f"{folder}/{job_id}?hop=1"
        assert len(job_id) == 36
        second = await proxy.get(f"{path}/{job_id}?hop=1")
        assert second.headers["Location"] == f"{job_id}?hop=2"


async def test_a_result_stays_for_those_who_were_redirected_to_it(
    start: Start, gateway: Gateway
) -> None:
    """Though another equal request, whose hold was not over yet, was the first to get it."""
    gateway.behaviour = slow = Slow()
    proxy = await start(jobs={"relay_hold": "10ms"})
    redirected = await proxy.post(RELAY)
    assert redirected.status == 303
    proxy.parts.relay.hold_s = 20
    other = asyncio.ensure_future(proxy.post(RELAY))
    await proxy.until_waiting(1)
    slow.done.set()
    assert (await other).json() == {"ok": 1}
    for _ in range(2):
        assert (await proxy.get(redirected.location)).json() == {"ok": 1}
    assert len(gateway.received) == 1


@pytest.mark.parametrize(
    ("submitted_at", "first", "keep_s"),
    [
        (90.0, True, 0.0),
        (75.1, True, 0.0),
        (75.0, True, 60.0),
        (99.0, False, 60.0),
        (None, True, 60.0),
    ],
)
async def test_how_long_a_result_stays_after_it_was_delivered(
    *, submitted_at: float | None, first: bool, keep_s: float
) -> None:
    """Nobody was redirected to a job that ended well before the first hold of it could be over."""
    relay = Relay(
        Mock(), Mock(), Mock(), observer=Mock(), hold_s=50.0, max_hops=18, clock=lambda: 100.0
    )
    assert relay._keep_s(submitted_at, first=first) == keep_s
    relay.hold_s = 300.0
    assert relay._keep_s(None, first=True) == 300.0


async def test_after_the_last_hop_a_retry_attaches(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = slow = Slow()
    proxy = await start(jobs={"relay_hold": "10ms", "relay_max_hops": 2})
    response = await proxy.post(RELAY)
    hops = 0
    while response.status == 303:
        hops += 1
        response = await proxy.get(response.location)
    assert (hops, response.status, response.code) == (2, 503, "still_running")
    assert response.headers["Retry-After"] == "1"
    slow.done.set()
    again = await proxy.post(RELAY)
    while again.status == 303:
        again = await proxy.get(again.location)
    assert (again.status, again.json()) == (200, {"ok": 1})
    assert len(gateway.received) == 1


async def test_a_lost_connection_costs_nothing_upstream(start: Start, gateway: Gateway) -> None:
    """Killed while it is held: the job goes on, and the retry gets its result."""
    gateway.behaviour = slow = Slow()
    proxy = await start()
    body = json.dumps(EMBED).encode()
    request = (
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    )
    _, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    writer.write(request % (RELAY.encode(), len(body), body))
    await gateway.until(lambda: gateway.busy == 1)
    writer.transport.abort()
    slow.done.set()
    async with asyncio.timeout(60):
        while (await proxy.parts.store.usage()).live:
            await asyncio.sleep(0.01)
    assert (await proxy.post(RELAY)).json() == {"ok": 1}
    assert len(gateway.received) == 1
    assert (await proxy.post(RELAY)).json() == {"ok": 1}  # that one was delivered: this is a new call
    assert len(gateway.received) == 2


async def test_a_client_that_leaves_in_the_middle_of_its_answer_is_no_error_of_ours(
    start: Start, gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await start()
    gateway.behaviour = answer({"ok": 1})
    prepare = WireResponse.prepare

    async def break_off(self: WireResponse, request: web.BaseRequest) -> Any:
        monkeypatch.setattr(WireResponse, "prepare", prepare)
        assert request.transport is not None
        request.transport.abort()  # and the next write finds it closed
        return await prepare(self, request)

    monkeypatch.setattr(WireResponse, "prepare", break_off)
    with pytest.raises(aiohttp.ClientError):
        await proxy.post(RELAY)
    assert (await proxy.post(RELAY)).json() == {"ok": 1}
    assert len(gateway.received) == 1, "its retry has the same call's answer"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_two_who_wait_for_one_job_both_get_it(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = slow = Slow()
    calls = [asyncio.ensure_future(proxy.post(RELAY)) for _ in range(5)]
    await proxy.until_waiting(5)
    slow.done.set()
    assert [(await call).json() for call in calls] == [{"ok": 1}] * 5
    assert len(gateway.received) == 1


async def test_two_equal_prompts_are_two_samples(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = slow = Slow()
    chat, body = "/v1/relay/chat/completions", {"model": "m", "messages": []}
    calls = [asyncio.ensure_future(proxy.post(chat, body)) for _ in range(2)]
    await gateway.until(lambda: gateway.busy == 2)
    retry = asyncio.ensure_future(proxy.post(chat, body, headers={"x-stainless-retry-count": "1"}))
    keyed = [
        asyncio.ensure_future(proxy.post(chat, body, headers={"Idempotency-Key": "k"}))
        for _ in range(2)
    ]
    await proxy.until_waiting(5)
    slow.done.set()
    for call in (*calls, retry, *keyed):
        assert (await call).status == 200
    assert len(gateway.received) == 3


async def test_jobs_of_others_are_not_attached_to(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = slow = Slow()
    calls = [
        asyncio.ensure_future(proxy.post(RELAY, headers=headers))
        for headers in ({"x-api-key": "sk-alice"}, {"x-api-key": "sk-bob"}, {})
    ]
    calls.append(asyncio.ensure_future(proxy.post(RELAY, {**EMBED, "input": "other"})))
    calls.append(asyncio.ensure_future(proxy.post(RELAY + "?x=1")))
    await gateway.until(lambda: gateway.busy == 5)
    slow.done.set()
    for call in calls:
        assert (await call).status == 200


async def test_only_the_submitter_is_held(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(jobs={"relay_hold": "10ms"})
    location = (await proxy.post(RELAY, headers={"x-api-key": "sk-alice"})).location
    assert (await proxy.get(location, headers={"x-api-key": "sk-bob"})).code == "job_not_found"
    assert (
        await proxy.get(location.replace("embeddings", "rerank"), headers={"x-api-key": "sk-alice"})
    ).status == 404


@pytest.mark.one_store
@pytest.mark.parametrize("hop", ["", "?hop=", "?hop=-1", "?hop=x", "?hop=" + "9" * 50])
async def test_a_hop_that_is_none(start: Start, gateway: Gateway, hop: str) -> None:
    gateway.behaviour = hang
    proxy = await start(jobs={"relay_hold": "10ms"})
    location = (await proxy.post(RELAY)).location.partition("?")[0]
    assert (await proxy.get(location + hop)).location == location + "?hop=1"


@pytest.mark.one_store
async def test_bad_requests_are_refused_as_on_the_async_path(proxy: Client) -> None:
    assert (await proxy.post(RELAY, b"{")).code == "invalid_json"
    assert (await proxy.post(RELAY, {"model": "m"})).code == "missing_required_parameter"


@pytest.mark.one_store
async def test_what_cannot_be_a_job_passes_through(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"passed": True})
    for method, path, target in (
        ("GET", "/v1/relay/models?a=%2F", "/v1/models?a=%2F"),
        ("POST", "/v1/relay/moderations", "/v1/moderations"),
        ("DELETE", "/v1/relay/files/a%2Fb", "/v1/files/a%2Fb"),
        ("GET", "/v1/relay/embeddings", "/v1/embeddings"),
    ):
        assert (await proxy.request(method, path)).json() == {"passed": True}
        assert gateway.received[-1].target == target
    stream = {"model": "m", "messages": [], "stream": True}
    assert (await proxy.post("/v1/relay/chat/completions", stream)).json() == {"passed": True}
    assert gateway.received[-1].target == "/v1/chat/completions"
    assert gateway.received[-1].json() == stream
    odd = {"Content-Encoding": "x-odd"}
    assert (await proxy.post("/v1/relay/embeddings", b"text", headers=odd)).json() == {"passed": True}
    assert gateway.received[-1].body == b"text"
    assert gateway.received[-1].header("Content-Encoding") == "x-odd"
    packed = gzip.compress(json.dumps(stream).encode())
    coding = {"Content-Encoding": "gzip"}
    answered = await proxy.post("/v1/relay/chat/completions", packed, headers=coding)
    assert answered.json() == {"passed": True}
    assert gateway.received[-1].body == packed
    assert gateway.received[-1].header("Content-Encoding") == "gzip"


@pytest.mark.one_store
async def test_a_body_that_cannot_be_decoded_does_not_pass_through(
    proxy: Client, gateway: Gateway
) -> None:
    """It was read: there is nothing left to send on."""
    coding = {"Content-Encoding": "gzip"}
    assert (await proxy.post(RELAY, b"text", headers=coding)).code == "unsupported_media_type"
    assert gateway.received == []


# Unmodified clients, with an upstream that takes longer than they are held.


async def slow_sdk(request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    await sdk_embeddings(request, writer)


@pytest.mark.one_store
async def test_openai_python(start: Start, gateway: Gateway) -> None:
    proxy = await start(jobs={"relay_hold": "50ms"})
    gateway.behaviour = sdk_embeddings
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="sk-mine") as direct:
        expected = await direct.embeddings.create(model="m", input="x")
    gateway.received.clear()
    gateway.behaviour = slow_sdk
    base = proxy.url + "/v1/relay"
    async with openai.AsyncOpenAI(base_url=base, api_key="sk-mine") as sdk:
        assert await sdk.embeddings.create(model="m", input="x") == expected
    with openai.OpenAI(base_url=base, api_key="sk-mine") as sync:
        assert await asyncio.to_thread(sync.embeddings.create, model="m", input="x") == expected
    assert len(gateway.received) == 2


@pytest.mark.one_store
async def test_openai_python_goes_on_past_the_last_hop(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = slow = Slow(sdk_embeddings)
    proxy = await start(jobs={"relay_hold": "50ms", "relay_max_hops": 3})
    async with openai.AsyncOpenAI(base_url=proxy.url + "/v1/relay", api_key="sk-mine") as sdk:
        call = asyncio.ensure_future(sdk.embeddings.create(model="m", input="x"))
        await asyncio.sleep(0.5)  # longer than three hops: it has had its 503 by now
        slow.done.set()
        assert (await call).data[0].index == 0
    assert len(gateway.received) == 1


@pytest.mark.one_store
@pytest.mark.parametrize(
    ("status", "exception"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
    ],
)
async def test_its_exceptions_are_the_usual(
    start: Start, gateway: Gateway, status: int, exception: type[openai.APIStatusError]
) -> None:
    impatient = {"attempts": 1, "outage": 0}
    proxy = await start(upstream={"retry": impatient}, jobs={"relay_hold": "20ms"})

    async def slow_failure(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        await answer({"error": {"message": "what went wrong", "code": "c"}}, status=status)(
            request, writer
        )

    gateway.behaviour = slow_failure
    async with openai.AsyncOpenAI(
        base_url=proxy.url + "/v1/relay", api_key="sk-mine", max_retries=0
    ) as sdk:
        with pytest.raises(exception) as caught:
            await sdk.embeddings.create(model="m", input="x")
    assert caught.value.code == "c"


@pytest.mark.one_store
async def test_curl(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = slow_sdk
    proxy = await start(jobs={"relay_hold": "50ms"})
    body = """-H 'content-type: application/json' -H 'authorization: Bearer sk-mine' -d '{"model":"m","input":"x"}'"""
    for options in ("-sL", "-sL -X POST"):
        out = await shell(f"curl {options} {proxy.url}{RELAY} {body}")
        assert json.loads(out)["model"] == "m"
    assert len(gateway.received) == 2
    assert {request.header("Authorization") for request in gateway.received} == {"Bearer sk-mine"}


@pytest.mark.one_store
async def test_paths_of_the_gateway_below_an_endpoint_pass_through(
    proxy: Client, gateway: Gateway
) -> None:
    gateway.behaviour = answer({"passed": True})
    for method, path in (
        ("GET", "/responses/resp_123"),
        ("GET", "/chat/completions/chatcmpl-1"),
        ("POST", "/responses/input_tokens"),
        ("POST", "/responses/compact"),
    ):
        assert (await proxy.request(method, "/v1/relay" + path)).json() == {"passed": True}
        assert gateway.received[-1].target == "/v1" + path


async def test_what_was_delivered_at_once_takes_no_room(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = answer(b'"' + b"x" * 200_000 + b'"')
    proxy = await start(store={"max_bytes": "2MiB"})
    for number in range(50):
        assert (await proxy.post(RELAY, {"model": "m", "input": str(number)})).status == 200
    async with asyncio.timeout(60):  # the client has its answer a moment before that is noted
        while await proxy.parts.store.usage() != (0, 0, 0):
            await asyncio.sleep(0.01)


async def test_a_look_through_the_relay_leaves_an_async_job_as_it_is(
    proxy: Client, gateway: Gateway
) -> None:
    key = {"Idempotency-Key": "k"}
    path = await proxy.submit(headers=key)
    done = await proxy.outcome(path)
    assert (await proxy.get(path.replace("async", "relay"))).status == 200
    again = await proxy.post("/v1/async/embeddings", headers=key)
    assert again.json() == done
    assert len(gateway.received) == 1


async def test_a_form_is_known_again_by_its_contents(proxy: Client, gateway: Gateway) -> None:
    """An SDK makes a new boundary for each attempt."""
    gateway.behaviour = slow = Slow()

    def form(boundary: str, text: str = "x") -> tuple[bytes, dict[str, str]]:
        parts = [("model", "m"), ("file", text)]
        lines = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'
            for n, v in parts
        ]
        content_type = f"multipart/form-data; boundary={boundary}"
        return f"{''.join(lines)}--{boundary}--\r\n".encode(), {"Content-Type": content_type}

    calls = []
    for boundary, text in (("one", "x"), ("two", "x"), ("three", "other")):
        body, headers = form(boundary, text)
        headers["x-stainless-retry-count"] = "1"
        calls.append(
            asyncio.ensure_future(proxy.post("/v1/relay/audio/transcriptions", body, headers=headers))
        )
    await proxy.until_waiting(3)  # one that comes when the other has its answer is a call of its own
    slow.done.set()
    assert [(await call).status for call in calls] == [200] * 3
    assert len(gateway.received) == 2
    for boundary, text, status in (("a", "x", 202), ("b", "x", 202), ("c", "other", 422)):
        body, headers = form(boundary, text)
        headers["Idempotency-Key"] = "k"
        answered = await proxy.post("/v1/async/audio/transcriptions", body, headers=headers)
        assert answered.status in (status, 200 if status == 202 else status)


async def test_an_old_client_that_is_cut_off_finds_its_answer(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b'"' + b"x" * 20_000_000 + b'"')
    body = json.dumps(EMBED).encode()
    request = b"POST %b HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    port = int(proxy.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request % (RELAY.encode(), len(body), body))
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    assert len((await proxy.post(RELAY)).body) == 20_000_002
    assert len(gateway.received) == 1


async def test_a_held_call_that_ends_within_the_grace_is_delivered(
    start: Start, gateway: Gateway
) -> None:
    gateway.behaviour = slow = Slow()
    proxy = await start()
    call = asyncio.ensure_future(proxy.post(RELAY))
    await gateway.until(lambda: gateway.busy == 1)
    draining = asyncio.ensure_future(proxy.parts.dispatcher.drain(20))
    await asyncio.sleep(0.05)
    slow.done.set()
    assert (await call).json() == {"ok": 1}
    await draining


async def test_an_answer_that_was_not_taken_is_there_for_the_retry(
    proxy: Client, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the client goes in the very round in which its answer is written."""
    gateway.behaviour = slow = Slow()
    body = json.dumps(EMBED).encode()
    head = f"POST {RELAY} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    parts = urlsplit(proxy.url)
    client = socket.create_connection((parts.hostname, parts.port))
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await gateway.until(lambda: bool(gateway.received))
    own_response = job_responses.own_response
    given: list[Outcome] = []

    def reset_before(outcome: Outcome, read: Any) -> WireResponse:
        if not given:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # its reset arrives, and is not read before the answer is written
        given.append(outcome)
        return own_response(outcome, read)

    monkeypatch.setattr(job_responses, "own_response", reset_before)
    slow.done.set()
    async with asyncio.timeout(60):
        while not given:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    retry = await proxy.post(RELAY, headers={"x-stainless-retry-count": "1"})
    assert (retry.status, len(gateway.received)) == (200, 1)
