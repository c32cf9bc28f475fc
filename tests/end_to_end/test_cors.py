"""Browsers: preflights, and which pages may read which answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncproxy.config.load import load_config
from asyncproxy.core.errors import ConfigError
from tests.conftest import Client, Response, Start
from tests.gateway import Gateway, answer, hang

SUBMIT = "/v1/async/embeddings"
APP = "https://app.example"
PREFLIGHT = {
    "Origin": APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
KEY = {"Authorization": "Bearer sk-operator"}


async def preflight(proxy: Client, path: str, **changed: str) -> Response:
    return await proxy.request("OPTIONS", path, headers={**PREFLIGHT, **changed})


def cors(response: Response) -> dict[str, str]:
    return {k: v for k, v in response.headers.items() if k.lower().startswith("access-control-")}


@pytest.mark.parametrize("keys", [[], ["sk-operator"]])
async def test_a_preflight_of_ours_needs_no_key(
    start: Start, gateway: Gateway, keys: list[str]
) -> None:
    proxy = await start(auth={"keys": keys}, cors={"allow_origins": [APP]})
    for path, methods in (
        (SUBMIT, "POST"),
        (f"{SUBMIT}/x", "GET, HEAD, DELETE"),
        (f"{SUBMIT}/x/content", "GET, HEAD"),
        ("/v1/relay/embeddings", "POST"),
        ("/v1/relay/embeddings/x", "GET, POST"),
    ):
        response = await preflight(proxy, path)
        assert (response.status, response.body) == (204, b"")
        assert cors(response) == {
            "Access-Control-Allow-Origin": APP,
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": "authorization,content-type",
            "Access-Control-Max-Age": "7200",
        }
        assert "Origin" in response.headers.getall("Vary")
    assert gateway.received == []


@pytest.mark.parametrize("keys", [[], ["sk-operator"]])
async def test_without_origins_a_preflight_lets_nobody_in(start: Start, keys: list[str]) -> None:
    proxy = await start(auth={"keys": keys})
    response = await preflight(proxy, SUBMIT)
    assert (response.status, response.headers["Allow"]) == (204, "POST")
    assert "Access-Control-Allow-Origin" not in response.headers
    assert (
        "Access-Control-Allow-Origin" not in (await proxy.post(SUBMIT, headers={"Origin": APP})).headers
    )


async def test_what_is_no_preflight_is_refused_as_ever(start: Start) -> None:
    proxy = await start(auth={"keys": ["sk-operator"]}, cors={"allow_origins": ["*"]})
    assert (await proxy.request("OPTIONS", SUBMIT)).code == "invalid_api_key"
    assert (
        await proxy.request("OPTIONS", SUBMIT, headers={"Origin": APP, **KEY})
    ).code == "method_not_allowed"
    with_body = await proxy.request("OPTIONS", SUBMIT, headers=PREFLIGHT, data=b"{}")
    assert with_body.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ([APP], APP, APP),
        ([APP], "https://other.example", None),
        ([APP], "https://app.example.evil", None),
        ([APP], "null", None),
        (["*"], APP, "*"),
        ([APP, "http://localhost:3000"], "http://localhost:3000", "http://localhost:3000"),
    ],
)
async def test_who_may_read_our_answers(
    start: Start, gateway: Gateway, origins: list[str], origin: str, allowed: str | None
) -> None:
    """The gateway's own word on that is for what passes through."""
    theirs = [
        ("Access-Control-Allow-Origin", "https://gateway.example"),
        ("Access-Control-Max-Age", "1"),
    ]
    gateway.behaviour = answer({"ok": 1}, headers=theirs)
    proxy = await start(cors={"allow_origins": origins})
    mine = {"Origin": origin}
    accepted = await proxy.post(SUBMIT, headers=mine)
    path = accepted.headers["Location"]
    await proxy.outcome(path)
    for response in (
        accepted,
        await proxy.get(path, headers=mine),
        await proxy.get(f"{path}/content", headers=mine),
        await proxy.post("/v1/relay/embeddings", headers=mine),
        await proxy.post("/v1/embeddings", headers={**mine, "x-bf-async": "true"}),
        await proxy.post(SUBMIT, b"{", headers=mine),
        await proxy.get(f"{SUBMIT}/x", headers=mine),
        await proxy.get("/v1/async/nothing", headers=mine),
    ):
        expected = [] if allowed is None else [allowed]
        assert response.headers.getall("Access-Control-Allow-Origin", []) == expected
        assert ("Origin" in response.headers.getall("Vary", [])) is (allowed != "*")
        assert response.headers["Access-Control-Expose-Headers"] == "*"
        assert "Access-Control-Max-Age" not in response.headers
    passed = await proxy.post("/v1/embeddings", headers=mine)
    assert passed.headers.getall("Access-Control-Allow-Origin") == ["https://gateway.example"]


async def test_a_refusal_can_be_read_by_a_page(start: Start) -> None:
    proxy = await start(auth={"keys": ["sk-operator"]}, cors={"allow_origins": [APP]})
    refused = await proxy.post(SUBMIT, headers={"Origin": APP})
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, APP)


@pytest.mark.parametrize("origins", [[], [APP]])
async def test_a_preflight_of_what_passes_through_is_the_gateways(
    start: Start, gateway: Gateway, origins: list[str]
) -> None:
    gateway.behaviour = answer(b"", status=204, headers=[("Access-Control-Allow-Origin", "*")])
    proxy = await start(auth={"keys": ["sk-operator"]}, cors={"allow_origins": origins})
    for path, target in (("/v1/embeddings", "/v1/embeddings"), ("/v1/relay/models", "/v1/models")):
        response = await preflight(proxy, path)
        assert cors(response) == {"Access-Control-Allow-Origin": "*"}
        assert gateway.received[-1].target == target
    if not origins:
        await preflight(proxy, "/v1/relay/embeddings")
        assert gateway.received[-1].target == "/v1/embeddings"


async def test_names_that_are_none_are_not_sent_back(start: Start) -> None:
    proxy = await start(cors={"allow_origins": [APP]})
    response = await preflight(proxy, SUBMIT, **{"Access-Control-Request-Headers": "x; y=<script>"})
    assert "Access-Control-Allow-Headers" not in response.headers


@pytest.mark.parametrize(
    "origin",
    ["app.example", "https://app.example/", "https://APP.example", "https://a b", "", "https://", "**"],
)
def test_an_origin_is_as_browsers_write_it(origin: str) -> None:
    document: dict[str, Any] = {
        "upstreams": [{"base_url": "http://gateway"}],
        "cors": {"allow_origins": [origin]},
    }
    with pytest.raises(ConfigError, match=r"cors\.allow_origins: .*like https://app\.example"):
        load_config(document)
    document["cors"]["allow_origins"] = ["*", "http://localhost:3000", "http://[::1]:8080", "app://-"]
    load_config(document)


async def test_a_held_answer_can_be_read_by_a_page(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(cors={"allow_origins": [APP]}, jobs={"relay_hold": "10ms"})
    async with asyncio.timeout(60):
        redirect = await proxy.post("/v1/relay/embeddings", headers={"Origin": APP})
    assert (redirect.status, redirect.headers["Access-Control-Allow-Origin"]) == (303, APP)
