"""Async by header, on the sync path: the wire contract, section 5."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from tests.conftest import Client
from tests.gateway import Gateway, answer, hang, raw

SYNC = "/v1/embeddings"


async def test_prefer_respond_async(proxy: Client, gateway: Gateway) -> None:
    accepted = await proxy.post(SYNC, headers={"Prefer": "respond-async"})
    assert accepted.status == 202
    assert accepted.headers["Preference-Applied"] == "respond-async"
    assert set(accepted.json()) == {"id", "status", "created_at"}
    done = await proxy.outcome(accepted.headers["Location"])
    assert done["status"] == "completed"
    assert gateway.received[0].all("Prefer") == []


async def test_prefer_with_a_wait_that_is_enough(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"ok": 1}, headers=[("x-cost", "3")])
    response = await proxy.post(SYNC, headers={"Prefer": "respond-async, wait=30"})
    assert (response.status, response.json(), response.headers["x-cost"]) == (200, {"ok": 1}, "3")
    gateway.behaviour = answer({"error": {"message": "no"}}, status=400)
    response = await proxy.post(SYNC, headers={"Prefer": "wait=30, respond-async"})
    assert (response.status, response.json()) == (400, {"error": {"message": "no"}})


@pytest.mark.one_store
async def test_prefer_with_a_wait_that_is_not(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    response = await proxy.post(SYNC, headers={"Prefer": "respond-async, wait=0"})
    assert response.status == 202
    assert response.headers["Preference-Applied"] == "respond-async, wait=0"
    assert (await proxy.get(response.headers["Location"])).status == 202


@pytest.mark.one_store
@pytest.mark.parametrize("prefer", ["return=minimal", "wait=5", "x-respond-async", ""])
async def test_other_preferences_are_the_upstreams(
    proxy: Client, gateway: Gateway, prefer: str
) -> None:
    response = await proxy.post(SYNC, headers={"Prefer": prefer})
    assert response.status == 200
    assert "data" in response.json()
    assert gateway.received[0].header("Prefer") == prefer


@pytest.mark.one_store
@pytest.mark.parametrize("value", ["true", "1", "yes", "TRUE"])
async def test_x_bf_async(proxy: Client, gateway: Gateway, value: str) -> None:
    gateway.behaviour = hang
    response = await proxy.post(SYNC, headers={"x-bf-async": value})
    assert (response.status, response.json()["status"]) == (200, "pending")
    await gateway.until(lambda: gateway.busy == 1)
    assert gateway.received[0].all("x-bf-async") == []


@pytest.mark.one_store
@pytest.mark.parametrize("value", ["", "false", "0", "False"])
async def test_x_bf_async_that_says_no(proxy: Client, value: str) -> None:
    assert "data" in (await proxy.post(SYNC, headers={"x-bf-async": value})).json()


async def test_x_bf_async_id(proxy: Client, gateway: Gateway) -> None:
    go_on = asyncio.Event()

    async def gated(request: object, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await answer({"ok": 1})(request, writer)  # type: ignore[arg-type]

    gateway.behaviour = gated
    mine = {"Authorization": "Bearer sk-mine"}
    job = (await proxy.post(SYNC, headers={**mine, "x-bf-async": "true"})).json()
    poll = await proxy.post(SYNC, b"ignored", headers={**mine, "x-bf-async-id": job["id"]})
    assert (poll.status, set(poll.json())) == (200, {"id", "status", "created_at"})
    go_on.set()
    await proxy.outcome(f"/v1/async/embeddings/{job['id']}", headers=mine)
    done = await proxy.post(SYNC, b"", headers={**mine, "x-bf-async-id": job["id"]})
    assert (done.status, done.json()) == (200, {"ok": 1})
    for headers in ({"x-bf-async-id": job["id"]}, {**mine, "x-bf-async-id": str(uuid.uuid4())}):
        assert (await proxy.post(SYNC, headers=headers)).code == "job_not_found"


async def test_x_bf_async_id_of_a_failed_job(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"plain words", status=403)
    job = (await proxy.post(SYNC, headers={"x-bf-async": "true"})).json()
    await proxy.outcome(f"/v1/async/embeddings/{job['id']}")
    failed = await proxy.post(SYNC, headers={"x-bf-async-id": job["id"]})
    assert (failed.status, failed.json()["error"]["message"]) == (403, "plain words")
    assert failed.json()["is_bifrost_error"] is False


@pytest.mark.one_store
async def test_what_cannot_be_a_job_is_refused(proxy: Client) -> None:
    for headers in ({"Prefer": "respond-async"}, {"x-bf-async": "true"}):
        body = {"model": "m", "messages": [], "stream": True}
        response = await proxy.post("/v1/chat/completions", body, headers=headers)
        assert (response.status, response.code) == (400, "streaming_not_supported")


@pytest.mark.one_store
async def test_preferences_may_stand_in_two_fields(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    body = b'{"model":"m","input":"x"}'
    answered = await proxy.raw(
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nPrefer: wait=0\r\n"
        b"Prefer: respond-async\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    assert answered.startswith(b"HTTP/1.1 202 Accepted")
    assert b"Preference-Applied: respond-async, wait=0\r\n" in answered


async def test_a_status_without_a_body_has_none(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = raw(b"HTTP/1.1 304 Not Modified\r\n\r\n", close=False)
    job = (await proxy.post(SYNC, headers={"x-bf-async": "true"})).json()
    await proxy.outcome(f"/v1/async/embeddings/{job['id']}")
    for _ in range(2):
        done = await proxy.post(SYNC, b"", headers={"x-bf-async-id": job["id"]})
        assert (done.status, done.body) == (304, b"")


@pytest.mark.one_store
async def test_a_switch_of_protocols_is_no_answer(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")
    done = await proxy.outcome(await proxy.submit())
    assert (done["status_code"], done["error"]["error"]["code"]) == (502, "upstream_unreachable")
