"""`Idempotency-Key`: the wire contract, section 2."""

from __future__ import annotations

import asyncio

from tests.conftest import EMBED, Client
from tests.gateway import Gateway, hang

SUBMIT = "/v1/async/embeddings"
KEY = {"Idempotency-Key": "k-1", "x-api-key": "sk-alice"}


async def test_the_same_request_again_is_the_same_job(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    first = await proxy.post(SUBMIT, headers=KEY)
    assert "Idempotency-Replayed" not in first.headers
    await gateway.until(lambda: gateway.busy == 1)
    again = await proxy.post(SUBMIT, headers=KEY)
    assert (again.status, again.json()) == (202, {**first.json(), "status": "processing"})
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert len(gateway.received) == 1
    assert gateway.received[0].header("Idempotency-Key") == "k-1"


async def test_a_finished_job_is_answered_as_a_poll_would(proxy: Client, gateway: Gateway) -> None:
    path = await proxy.submit(headers=KEY)
    done = await proxy.outcome(path, headers={"x-api-key": "sk-alice"})
    again = await proxy.post(SUBMIT, headers={**KEY, "Idempotency-Key": '"k-1"'})
    assert (again.status, again.json()) == (200, done)
    assert again.headers["Idempotency-Replayed"] == "true"


async def test_concurrent_duplicates_are_one_job(proxy: Client, gateway: Gateway) -> None:
    answers = await asyncio.gather(*(proxy.post(SUBMIT, headers=KEY) for _ in range(50)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
    await proxy.outcome(answers[0].headers["Location"], headers={"x-api-key": "sk-alice"})
    assert len(gateway.received) == 1


async def test_another_body_or_query_is_refused(proxy: Client) -> None:
    await proxy.submit(headers=KEY)
    for path, body in ((SUBMIT, {**EMBED, "input": "other"}), (SUBMIT + "?a=1", EMBED)):
        answer = await proxy.post(path, body, headers=KEY)
        assert (answer.status, answer.code) == (422, "idempotency_key_reused")


async def test_it_is_scoped_to_credential_and_endpoint(proxy: Client) -> None:
    body = {"model": "m", "input": "x"}
    ids = set()
    for headers in (KEY, {**KEY, "x-api-key": "sk-bob"}, {"Idempotency-Key": "k-1"}):
        for endpoint in ("embeddings", "rerank"):
            ids.add((await proxy.post(f"/v1/async/{endpoint}", body, headers=headers)).json()["id"])
    assert len(ids) == 6


async def test_it_lives_as_long_as_its_job(proxy: Client) -> None:
    path = await proxy.submit(headers=KEY)
    await proxy.request("DELETE", path, headers={"x-api-key": "sk-alice"})
    assert await proxy.submit({**EMBED, "input": "other"}, headers=KEY) != path


async def test_an_empty_key_is_none(proxy: Client) -> None:
    assert await proxy.submit(headers={"Idempotency-Key": '""'}) != await proxy.submit(
        headers={"Idempotency-Key": '""'}
    )
