"""The official client, through the proxy and directly: same results, same exceptions."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import openai
import pytest
from openai.types import CreateEmbeddingResponse

from tests.conftest import Client, Start
from tests.gateway import Behaviour, Gateway, Received, answer, hang, in_turn, raw


async def sdk_embeddings(request: Received, writer: asyncio.StreamWriter) -> None:
    """As a provider: base64 when asked for, which the client does by default."""
    data = request.json()
    values = [0.1, -2.5, 3.75]
    vector: Any = values
    if data.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack("<3f", *values)).decode()
    body = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "model": data["model"],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
    await answer(body, headers=[("x-request-id", "req_1")])(request, writer)


def client(base_url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="sk-test", **options)


def async_client(base_url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="sk-test", **options)


async def test_embeddings_are_the_same(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = sdk_embeddings
    results = []
    for url in (gateway.url, proxy.url):
        with client(url) as sync:
            results.append(await asyncio.to_thread(sync.embeddings.create, model="m", input="x"))
        async with async_client(url) as other:
            results.append(await other.embeddings.create(model="m", input="x"))
    assert all(result == results[0] for result in results)
    assert results[0]._request_id == "req_1"
    assert [r.json()["encoding_format"] for r in gateway.received] == ["base64"] * 4


async def test_an_async_result_in_the_type_of_the_sync_call(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = sdk_embeddings
    async with async_client(proxy.url) as sdk:
        direct = await sdk.embeddings.create(model="m", input="x", encoding_format="float")
        body = {"model": "m", "input": "x", "encoding_format": "float"}
        job = await sdk.post("/async/embeddings", cast_to=object, body=body)
        assert isinstance(job, dict)
        await proxy.outcome(
            f"/v1/async/embeddings/{job['id']}", headers={"Authorization": "Bearer sk-test"}
        )
        path = f"/async/embeddings/{job['id']}/content"
        assert await sdk.get(path, cast_to=CreateEmbeddingResponse) == direct


@pytest.mark.parametrize(
    ("status", "exception"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
    ],
)
async def test_exceptions_are_the_same(
    proxy: Client, gateway: Gateway, status: int, exception: type[openai.APIStatusError]
) -> None:
    error = {"message": "what went wrong", "type": "t", "code": "c", "param": "p"}
    gateway.behaviour = answer({"error": error}, status=status)
    raised = []
    for url in (gateway.url, proxy.url):
        async with async_client(url, max_retries=0) as sdk:
            with pytest.raises(exception) as caught:
                await sdk.embeddings.create(model="m", input="x")
            raised.append(caught.value)
    # and of a failed job, which polls hand out whole
    mine = {"Authorization": "Bearer sk-test"}
    path = await proxy.submit(headers=mine)
    await proxy.outcome(path, headers=mine)
    async with async_client(proxy.url, max_retries=0) as sdk:
        with pytest.raises(exception) as caught:
            await sdk.get(path.removeprefix("/v1") + "/content", cast_to=CreateEmbeddingResponse)
        raised.append(caught.value)
    for each in raised:
        assert (each.status_code, each.code, each.param, each.type) == (status, "c", "p", "t")
        assert str(each) == str(raised[0])


async def test_our_own_errors_are_read_too(proxy: Client, gateway: Gateway) -> None:
    async with async_client(proxy.url, max_retries=0) as sdk:
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.post("/async/embeddings", cast_to=object, body={"model": "m"})
        assert (caught.value.code, caught.value.param) == ("missing_required_parameter", "input")
        assert "`input` is required" in str(caught.value)
        gateway.behaviour = raw(b"")
        with pytest.raises(openai.InternalServerError) as broken:
            await sdk.embeddings.create(model="m", input="x")
        assert (broken.value.status_code, broken.value.code) == (502, "upstream_unreachable")


async def test_its_retries_go_through(proxy: Client, gateway: Gateway) -> None:
    """Two retries by default, after what Retry-After says: the proxy adds none to a sync call."""
    limited = answer(b"", status=429, headers=[("Retry-After", "0.01"), ("retry-after-ms", "10")])
    gateway.behaviour = in_turn(limited, limited, sdk_embeddings)
    async with async_client(proxy.url) as sdk:
        await sdk.embeddings.create(model="m", input="x")
    assert [r.header("x-stainless-retry-count") for r in gateway.received] == ["0", "1", "2"]


async def test_the_timeout_of_a_client_ends_the_call(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    async with async_client(proxy.url, max_retries=0, timeout=0.3) as sdk:
        with pytest.raises(openai.APITimeoutError):
            await sdk.embeddings.create(model="m", input="x")
    await gateway.until(lambda: gateway.open_connections == 0)


async def test_streaming_chat_arrives_as_it_is_sent(proxy: Client, gateway: Gateway) -> None:
    seen = asyncio.Event()

    async def stream(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for text in ("first", "second"):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            chunk = {
                "id": "1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
            event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await seen.wait()  # the second event is not sent before the first one has arrived
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    gateway.behaviour = stream
    async with async_client(proxy.url) as sdk:
        chunks = await sdk.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        texts = []
        async with asyncio.timeout(60):
            async for chunk in chunks:
                texts.append(chunk.choices[0].delta.content)
                seen.set()
    assert texts == ["first", "second"]


# The npm client sends what follows; the proxy cannot tell it from the Python one but by this.
NODE_HEADERS = {
    "User-Agent": "OpenAI/JS 6.0.0",
    "Accept": "application/json",
    "X-Stainless-Lang": "js",
    "X-Stainless-Retry-Count": "0",
    "Authorization": "Bearer sk-test",
}


async def test_the_npm_clients_wire_behaviour(start: Start, gateway: Gateway) -> None:
    """base64 by default, and retries after 408, 409, 429 and 5xx with a count in a header."""
    gateway.behaviour = in_turn(answer(b"", status=503), sdk_embeddings)
    proxy: Behaviour | Client = await start()
    assert isinstance(proxy, Client)
    body: Any = {"model": "m", "input": "x", "encoding_format": "base64"}
    first = await proxy.post("/v1/embeddings", body, headers=NODE_HEADERS)
    assert first.status == 503
    again = await proxy.post(
        "/v1/embeddings", body, headers={**NODE_HEADERS, "X-Stainless-Retry-Count": "1"}
    )
    vector = base64.b64decode(again.json()["data"][0]["embedding"])
    assert struct.unpack("<3f", vector)[1:] == (-2.5, 3.75)
    path = await proxy.submit(body, headers=NODE_HEADERS)
    done = await proxy.outcome(path, headers=NODE_HEADERS)
    assert done["result"] == again.json()
