"""The header fields of answers about jobs: where they lead, who may keep them, whether to try again."""

from __future__ import annotations

import pytest

from tests.conftest import Client, Start
from tests.gateway import Gateway, answer, hang

RELAY = "/v1/relay/embeddings"
SUBMIT = "/v1/async/embeddings"

CACHEABLE = [
    ("Cache-Control", "public, max-age=600"),
    ("CDN-Cache-Control", "max-age=600"),
    ("Cloudflare-CDN-Cache-Control", "max-age=600"),
    ("Surrogate-Control", "max-age=600"),
    ("Expires", "Thu, 01 Jan 2099 00:00:00 GMT"),
    ("ETag", '"x"'),
]
AGAIN = [("Retry-After", "3600"), ("retry-after-ms", "9000"), ("X-Should-Retry", "true")]
CACHES = {name.lower() for name, _ in CACHEABLE[1:-1]}


@pytest.mark.one_store
@pytest.mark.parametrize("size", [1, 300_000])
@pytest.mark.parametrize("status", [200, 400])
async def test_no_answer_about_a_job_may_be_kept(
    proxy: Client, gateway: Gateway, size: int, status: int
) -> None:
    gateway.behaviour = answer({"a": "x" * size}, status=status, headers=CACHEABLE)
    path = await proxy.submit()
    await proxy.outcome(path)
    answers = [
        await proxy.post(SUBMIT),
        await proxy.get(path),
        await proxy.get(f"{path}/content"),
        await proxy.request("HEAD", f"{path}/content"),
        await proxy.post(RELAY),
        await proxy.get(path.replace("async", "relay")),
        await proxy.post("/v1/embeddings", headers={"x-bf-async-id": path.rpartition("/")[2]}),
        await proxy.post("/v1/embeddings", headers={"Prefer": "respond-async, wait=20"}),
        await proxy.post("/v1/embeddings", headers={"x-bf-async": "true"}),
        await proxy.request("DELETE", path),
        await proxy.get(path),
        await proxy.get(f"{path}/content"),
    ]
    for each in answers:
        assert each.headers.getall("Cache-Control") == ["no-store"]
        assert not CACHES & {name.lower() for name in each.headers}
    assert answers[2].headers["ETag"] == '"x"'
    passed = await proxy.post("/v1/embeddings")
    assert passed.headers["Cache-Control"] == "public, max-age=600", "the gateway's own answer"


@pytest.mark.one_store
async def test_a_redirect_may_not_be_kept(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(jobs={"relay_hold": "10ms"})
    assert (await proxy.post(RELAY)).headers.getall("Cache-Control") == ["no-store"]


async def test_a_failed_job_is_not_to_be_tried_again(start: Start, gateway: Gateway) -> None:
    """Its retries were made. An SDK that sleeps and repeats it would multiply them."""
    gateway.behaviour = answer({"error": {"message": "no"}}, status=400, headers=AGAIN)
    proxy = await start(upstream={"retry": {"attempts": 1}})
    path = await proxy.submit()
    assert (await proxy.outcome(path))["status"] == "failed"
    for each in (
        await proxy.get(f"{path}/content"),
        await proxy.post(RELAY),
        await proxy.post("/v1/embeddings", headers={"x-bf-async-id": path.rpartition("/")[2]}),
        await proxy.post("/v1/embeddings", headers={"Prefer": "respond-async, wait=20"}),
    ):
        assert each.status == 400
        assert each.headers.getall("x-should-retry") == ["false"]
        assert "Retry-After" not in each.headers
        assert "retry-after-ms" not in each.headers
    again = await proxy.post(RELAY, b"{")
    assert "x-should-retry" not in again.headers, "no job has failed"


async def test_a_completed_job_says_what_the_gateway_said(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"ok": 1}, headers=AGAIN)
    path = await proxy.submit()
    await proxy.outcome(path)
    fields = (await proxy.get(f"{path}/content")).headers
    assert [(name, fields.getall(name)) for name, _ in AGAIN] == [(name, [v]) for name, v in AGAIN]


@pytest.mark.one_store
@pytest.mark.parametrize(
    ("given", "prefix"),
    [("/ai", "/ai"), ("/ai/", "/ai"), ("//evil.example", ""), ("https://evil.example", ""), ("ai", "")],
)
@pytest.mark.parametrize(
    ("path", "headers"), [(SUBMIT, {}), ("/v1/embeddings", {"Prefer": "respond-async"})]
)
async def test_a_location_is_behind_the_prefix_that_was_stripped(
    proxy: Client, given: str, prefix: str, path: str, headers: dict[str, str]
) -> None:
    accepted = await proxy.post(path, headers={**headers, "X-Forwarded-Prefix": given})
    job = accepted.json()["id"]
    assert accepted.headers["Location"] == f"{prefix}{SUBMIT}/{job}"
