"""Our own pages: what they say while a proxy works, stops, or has lost its store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncproxy.core.errors import StartupError, StoreUnavailable
from tests.conftest import EMBED, Client, Start
from tests.gateway import Gateway, answer, hang, in_turn, reset


async def metrics(proxy: Client) -> dict[str, float]:
    """All values, by name and labels as in ``jobs{state="pending"}``."""
    page = await proxy.get("/-/metrics")
    assert page.status == 200
    assert page.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in text_string_to_metric_families(page.body.decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix("asyncproxy_")
            found[name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


async def until(proxy: Client, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The metrics as soon as something holds of them."""
    async with asyncio.timeout(60):
        while not holds(found := await metrics(proxy)):
            await asyncio.sleep(0.01)
    return found


@pytest.mark.one_store
async def test_a_job_moves_its_metrics(proxy: Client) -> None:
    await proxy.outcome(await proxy.submit())
    found = await metrics(proxy)
    one = 'endpoint="embeddings",upstream="gateway"'
    completed = 'endpoint="embeddings",outcome="completed",upstream="gateway"'
    for name in (
        f"jobs_submitted_total{{{one}}}",
        f"jobs_finished_total{{{completed}}}",
        f"job_seconds_count{{{one}}}",
        'queue_wait_seconds_count{upstream="gateway"}',
        'upstream_attempt_seconds_count{outcome="2xx",upstream="gateway"}',
        'store_operation_seconds_count{operation="create"}',
        'store_operation_seconds_count{operation="finish"}',
        "store_results",
        "store_up",
    ):
        assert found[name] == 1, name
    assert found['jobs{state="pending"}'] == found['jobs{state="processing"}'] == 0
    assert 0 < found["store_bytes"] < found["store_limit_bytes"]


async def test_live_jobs_are_counted_by_state(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(upstream={"concurrency": 2})
    paths = [await proxy.submit() for _ in range(5)]
    await gateway.until(lambda: gateway.busy == 2)
    found = await metrics(proxy)
    assert (found['jobs{state="processing"}'], found['jobs{state="pending"}']) == (2, 3)
    assert found['calls_in_flight{upstream="gateway"}'] == found['calls_limit{upstream="gateway"}'] == 2
    for path in reversed(paths):  # those that wait, first
        await proxy.request("DELETE", path)
    found = await until(proxy, lambda found: found['calls_in_flight{upstream="gateway"}'] == 0)
    assert (found['jobs{state="processing"}'], found['jobs{state="pending"}']) == (0, 0)
    assert found['upstream_attempt_seconds_count{outcome="aborted",upstream="gateway"}'] == 2


@pytest.mark.one_store
async def test_failures_are_told_apart(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = in_turn(reset, answer({"no": 1}, status=500), answer({"no": 1}, status=400))
    await proxy.outcome(await proxy.submit())
    found = await metrics(proxy)
    gateway_ = 'upstream="gateway"'
    for name in (
        f'retries_total{{reason="upstream_unreachable",{gateway_}}}',
        f'retries_total{{reason="500",{gateway_}}}',
        f'upstream_attempt_seconds_count{{outcome="upstream_unreachable",{gateway_}}}',
        f'upstream_attempt_seconds_count{{outcome="5xx",{gateway_}}}',
        f'upstream_attempt_seconds_count{{outcome="4xx",{gateway_}}}',
        f'jobs_finished_total{{endpoint="embeddings",outcome="upstream_4xx",{gateway_}}}',
        f"queue_wait_seconds_count{{{gateway_}}}",
    ):
        assert found[name] == 1, name


async def test_pauses_and_fallbacks_are_counted(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = in_turn(answer({}, status=429), answer({}, status=404), answer({}))
    proxy = await start()
    done = await proxy.outcome(await proxy.submit({**EMBED, "fallbacks": ["b"]}))
    assert done["status"] == "completed"
    found = await metrics(proxy)
    assert found['upstream_pauses_total{upstream="gateway"}'] == 1
    assert found['retries_total{reason="429",upstream="gateway"}'] == 1
    assert found['fallbacks_total{upstream="gateway"}'] == 1


@pytest.mark.one_store
@pytest.mark.parametrize("path", ["/v1/async/embeddings", "/v1/relay/embeddings"])
async def test_refused_submits_are_counted_by_their_code(proxy: Client, path: str) -> None:
    await proxy.post(path, {"model": "m"})
    await proxy.post(path, b"{")
    found = await metrics(proxy)
    for code in ("missing_required_parameter", "invalid_json"):
        assert found[f'submits_refused_total{{code="{code}",endpoint="embeddings"}}'] == 1
    assert 'jobs_submitted_total{endpoint="embeddings",upstream="gateway"}' not in found


@pytest.mark.one_store
async def test_what_passes_through_is_counted(proxy: Client, gateway: Gateway) -> None:
    body = b'{"model": "m", "input": "hello"}'
    passed = await proxy.post("/v1/embeddings", body)
    gateway.behaviour = reset
    await proxy.get("/v1/models")
    found = await metrics(proxy)
    ok = 'outcome="ok",status="2xx",upstream="gateway"'
    broken = 'outcome="upstream_unreachable",status="5xx",upstream="gateway"'
    assert found[f"passthrough_requests_total{{{ok}}}"] == 1
    assert found[f"passthrough_requests_total{{{broken}}}"] == 1
    assert found['passthrough_bytes_total{direction="request",upstream="gateway"}'] == len(body)
    assert found['passthrough_bytes_total{direction="response",upstream="gateway"}'] == len(passed.body)
    assert found['passthrough_first_byte_seconds_count{upstream="gateway"}'] == 1


async def test_those_who_wait_are_counted(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(jobs={"relay_hold": "10ms"})
    path = await proxy.submit()
    waiting = asyncio.ensure_future(proxy.get(path + "?wait=60"))
    await gateway.until(lambda: gateway.busy == 1)
    found = await until(proxy, lambda found: found["waiting_clients"] == 1)
    hop = await proxy.post("/v1/relay/embeddings")
    assert hop.status == 303
    await proxy.request("DELETE", path)
    assert (await waiting).status == 404
    found = await metrics(proxy)
    assert found["waiting_clients"] == 0
    assert found['waits_total{endpoint="embeddings",outcome="deleted"}'] == 1
    assert found['waits_total{endpoint="embeddings",outcome="timeout"}'] == 1
    assert found['relay_hops_total{endpoint="embeddings"}'] == 1


@pytest.mark.one_store
async def test_the_lag_of_the_loop_is_measured(proxy: Client) -> None:
    found = await until(proxy, lambda found: found["event_loop_lag_seconds_count"] > 0)
    assert found["event_loop_lag_seconds_sum"] >= 0


@pytest.mark.one_store
async def test_hostile_clients_make_no_series(start: Start, gateway: Gateway) -> None:
    """Over HTTP a sample of each kind of text; test_metrics has ten thousand."""
    proxy = await start()
    gateway.behaviour = answer({"error": "no"}, status=799)

    async def hostile(text: str) -> None:
        mine = {"x-request-id": text, "x-api-key": f"key-of-{text}", "traceparent": text}
        await proxy.outcome(await proxy.submit({**EMBED, "model": text}, headers=mine), headers=mine)
        await proxy.post("/v1/async/embeddings", {"model": text}, headers=mine)
        await proxy.post(f"/v1/async/{text}", {"model": text}, headers=mine)
        await proxy.get(f"/v1/async/embeddings/{text}", headers=mine)
        await proxy.request(text.upper(), f"/v1/{text}?{text}", headers=mine)

    await hostile("model-first")
    await proxy.parts.dispatcher.tidy()  # which comes once a second, and has series of its own
    before = set(await metrics(proxy))
    for number in range(50):
        await hostile(f"model-{number}")
    after = await metrics(proxy)
    assert set(after) == before
    assert not any("model-7" in name.lower() for name in after)


# Ready.


async def test_ready_has_each_check(proxy: Client) -> None:
    ready = await proxy.get("/-/ready")
    assert ready.status == 200
    checks = {"draining": {"status": "ok"}, "store": {"status": "ok"}}
    upstreams = {"gateway": {"status": "ok"}}
    assert ready.json() == {"status": "ok", "checks": checks, "upstreams": upstreams}


def lose_the_store(proxy: Client, monkeypatch: pytest.MonkeyPatch, away: Any) -> None:
    inner: Any = proxy.parts.store
    for operation in ("check", "usage", "states"):
        monkeypatch.setattr(inner._inner, operation, away)


async def unavailable() -> None:
    error = StoreUnavailable("The store is out of reach.")
    error.detail = "redis://internal:6379 refused"
    raise error


async def silent() -> None:
    await asyncio.Event().wait()


@pytest.mark.one_store
@pytest.mark.parametrize(
    ("away", "reason"),
    [(unavailable, "the store is out of reach"), (silent, "the store does not answer")],
)
async def test_a_store_that_is_away_is_said_and_a_scrape_still_answered(
    proxy: Client, monkeypatch: pytest.MonkeyPatch, away: Any, reason: str
) -> None:
    with monkeypatch.context() as patch:
        lose_the_store(proxy, patch, away)
        ready = await proxy.get("/-/ready")
        assert ready.status == 503
        assert ready.json() == {
            "status": "unavailable",
            "reason": reason,
            "checks": {
                "draining": {"status": "ok"},
                "store": {"status": "unavailable", "reason": reason},
            },
            "upstreams": {"gateway": {"status": "ok"}},
        }
        found = await metrics(proxy)
        assert found["store_up"] == 0
        assert 'jobs{state="pending"}' not in found
        assert (await proxy.get("/-/healthy")).status == 200
    assert (await proxy.get("/-/ready")).status == 200
    found = await metrics(proxy)
    assert found["store_up"] == 1
    errors = 'store_errors_total{code="store_unavailable",operation="check"}'
    assert found.get(errors, 0) == (away is unavailable)


async def test_all_reasons_are_given(proxy: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_the_store(proxy, monkeypatch, unavailable)
    await proxy.parts.dispatcher.drain(0)
    ready = (await proxy.get("/-/ready")).json()
    assert ready["reason"] == "shutting down; the store is out of reach"
    assert (await metrics(proxy))["draining"] == 1


# An address of their own.


@pytest.mark.one_store
async def test_the_pages_move_to_an_address_of_their_own(start: Start, gateway: Gateway) -> None:
    """And nothing under /-/ is left on the public one, nor sent to the gateway."""
    proxy = await start(admin_listen="127.0.0.1:0")
    for path in ("/-/healthy", "/-/ready", "/-/metrics", "/-/openapi.json", "/-/x", "/-/"):
        for method in ("GET", "POST", "DELETE"):
            refused = await proxy.request(method, path)
            assert (refused.status, refused.code) == (404, "unknown_endpoint")
    assert not gateway.received
    admin = Client(proxy.parts.admin.url, proxy.parts, proxy.session)
    for path in ("/-/healthy", "/-/ready", "/-/metrics", "/-/openapi.json"):
        assert (await admin.get(path)).status == 200
        assert (await admin.post(path)).code == "method_not_allowed"
    await proxy.outcome(await proxy.submit())
    finished = 'jobs_finished_total{endpoint="embeddings",outcome="completed",upstream="gateway"}'
    assert (await metrics(admin))[finished] == 1
    for path in ("/v1/async/embeddings", "/v1/models", "/", "/-/x"):
        assert (await admin.get(path)).code == "unknown_endpoint"
    assert len(gateway.received) == 1


@pytest.mark.one_store
async def test_the_pages_need_no_key(start: Start) -> None:
    proxy = await start(auth={"keys": ["ours"]})
    for path in ("/-/healthy", "/-/ready", "/-/metrics", "/-/openapi.json"):
        assert (await proxy.get(path)).status == 200
    assert (await proxy.get("/v1/models")).status == 401


async def test_an_address_that_is_taken_is_said_before_anything_listens(
    start: Start, gateway: Gateway
) -> None:
    taken = gateway.url.removeprefix("http://")
    with pytest.raises(StartupError, match=f"cannot listen on {taken}: Address already in use"):
        await start(admin_listen=taken)
