"""Multipart requests, results that are not JSON, and fallbacks: the wire contract, sections 2 and 3."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest

from tests.conftest import Client, Start
from tests.gateway import Gateway, Received, answer, raw

AUDIO = bytes(range(256)) * 40


def form(*parts: tuple[str, str | None, bytes], boundary: str = "b0undary") -> bytes:
    body = b""
    for name, filename, value in parts:
        extra = f'; filename="{filename}"\r\nContent-Type: audio/mpeg' if filename else ""
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode()
            + value
            + b"\r\n"
        )
    return body + f"--{boundary}--\r\n".encode()


MULTIPART = {"Content-Type": "multipart/form-data; boundary=b0undary"}
WHOLE = form(("file", "a.mp3", AUDIO), ("model", None, b"whisper-1"))


async def test_a_form_goes_upstream_as_it_came(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"text": "hello"})
    path = await proxy.submit(WHOLE, "audio/transcriptions", headers=MULTIPART)
    assert (await proxy.outcome(path))["result"] == {"text": "hello"}
    (got,) = gateway.received
    assert (got.body, got.header("Content-Type")) == (WHOLE, MULTIPART["Content-Type"])


@pytest.mark.one_store
@pytest.mark.parametrize(
    ("endpoint", "body", "code", "param"),
    [
        ("audio/transcriptions", form(("file", "a", b"x")), "missing_required_parameter", "model"),
        ("audio/transcriptions", form(("model", None, b"")), "missing_required_parameter", "model"),
        ("audio/transcriptions", form(("model", None, b"m")), "missing_required_parameter", "file"),
        ("images/edits", form(("model", None, b"m")), "missing_required_parameter", "image"),
        ("images/variations", form(("model", None, b"m")), "missing_required_parameter", "image"),
        (
            "audio/transcriptions",
            form(("model", None, b"m"), ("file", "a", b"x"), ("stream", None, b"true")),
            "streaming_not_supported",
            "stream",
        ),
        (
            "audio/transcriptions",
            form(("model", None, b"m"), ("model", None, b"n")),
            "invalid_form",
            "model",
        ),
        ("audio/transcriptions", WHOLE[:-20], "invalid_form", None),
        ("audio/transcriptions", b"", "invalid_form", None),
        ("audio/transcriptions", b"not a form", "invalid_form", None),
        ("audio/transcriptions", WHOLE.replace(b"form-data", b"attachment"), "invalid_form", None),
        ("audio/transcriptions", form(*[("x", None, b"")] * 1001), "invalid_form", None),
    ],
)
async def test_bad_forms(
    proxy: Client, endpoint: str, body: bytes, code: str, param: str | None
) -> None:
    response = await proxy.post(f"/v1/async/{endpoint}", body, headers=MULTIPART)
    assert (response.status, response.code) == (400, code)
    assert response.json()["error"]["param"] == param


@pytest.mark.one_store
async def test_a_bad_form_leaves_no_line_in_the_log(
    proxy: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    for body in (b"s3cret", WHOLE[:-20], WHOLE.replace(b"form-data", b"s3cret:"), b"--b0undaryX\r\n"):
        response = await proxy.post("/v1/async/audio/transcriptions", body, headers=MULTIPART)
        assert response.code == "invalid_form"
    lines = [record for record in caplog.records if record.name.startswith("python_multipart")]
    assert lines == []
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "s3cret" not in caplog.text


@pytest.mark.one_store
async def test_a_form_is_the_same_under_another_boundary(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"text": "hello"})
    key = {"Idempotency-Key": "k"}
    first = await proxy.submit(WHOLE, "audio/transcriptions", headers={**MULTIPART, **key})
    other = {"Content-Type": "multipart/form-data; boundary=other", **key}
    again = WHOLE.replace(b"b0undary", b"other")
    answered = await proxy.post("/v1/async/audio/transcriptions", again, headers=other)
    assert answered.headers["Location"] == first
    answered = await proxy.post(
        "/v1/async/audio/transcriptions", again.replace(b"whisper-1", b"whisper-2"), headers=other
    )
    assert answered.code == "idempotency_key_reused"


@pytest.mark.one_store
async def test_a_form_without_a_boundary(proxy: Client) -> None:
    response = await proxy.post(
        "/v1/async/audio/transcriptions", WHOLE, headers={"Content-Type": "multipart/form-data"}
    )
    assert (response.status, response.code) == (400, "invalid_form")


@pytest.mark.one_store
async def test_images_may_be_several(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer({"data": []})
    body = form(("model", None, b"m"), ("image[]", "a.png", b"1"), ("image[]", "b.png", b"2"))
    await proxy.outcome(await proxy.submit(body, "images/edits", headers=MULTIPART))


@pytest.mark.one_store
async def test_a_large_form_is_measured(start: Start) -> None:
    proxy = await start(jobs={"max_request_bytes": "1MiB"})
    body = form(("model", None, b"m"), ("file", "a", b"x" * 1024**2))
    response = await proxy.post("/v1/async/audio/transcriptions", body, headers=MULTIPART)
    assert (response.status, response.code) == (413, "request_too_large")


async def test_speech_is_base64_in_the_envelope_and_bytes_under_content(
    proxy: Client, gateway: Gateway
) -> None:
    gateway.behaviour = answer(AUDIO, content_type="audio/mpeg")
    path = await proxy.submit({"model": "tts", "input": "hello"}, "audio/speech")
    done = await proxy.outcome(path)
    assert done["result"] == {"content_type": "audio/mpeg", "audio": base64.b64encode(AUDIO).decode()}
    poll = await proxy.get(path)
    assert int(poll.headers["Content-Length"]) == len(poll.body)
    head = await proxy.request("HEAD", path)
    assert head.headers["Content-Length"] == poll.headers["Content-Length"]
    content = await proxy.get(path + "/content")
    assert (content.body, content.headers["Content-Type"]) == (AUDIO, "audio/mpeg")


@pytest.mark.one_store
@pytest.mark.parametrize("size", [0, 1, 2, 3, 48 * 1024 - 1, 48 * 1024, 48 * 1024 + 1, 1_000_003])
async def test_any_length(proxy: Client, gateway: Gateway, size: int) -> None:
    audio = os.urandom(size)
    gateway.behaviour = answer(audio, content_type="audio/ogg")
    done = await proxy.outcome(await proxy.submit({"model": "tts", "input": "x"}, "audio/speech"))
    assert base64.b64decode(done["result"]["audio"], validate=True) == audio


@pytest.mark.one_store
async def test_fifty_megabytes_of_audio(proxy: Client, gateway: Gateway) -> None:
    audio = os.urandom(1024) * 50 * 1024
    gateway.behaviour = answer(audio, content_type="audio/wav")
    path = await proxy.submit({"model": "tts", "input": "x"}, "audio/speech")
    assert base64.b64decode((await proxy.outcome(path))["result"]["audio"]) == audio
    assert (await proxy.get(path + "/content")).body == audio
    assert (await proxy.parts.store.usage()).bytes < len(audio) + 10_000


async def test_text_of_a_transcription(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"1\n00:00 --> 00:01\nhello\n", content_type="text/plain; charset=utf-8")
    path = await proxy.submit(WHOLE, "audio/transcriptions", headers=MULTIPART)
    done = await proxy.outcome(path)
    assert done["result"]["content_type"] == "text/plain"
    assert (await proxy.get(path + "/content")).body.startswith(b"1\n00:00")


@pytest.mark.one_store
async def test_embeddings_have_to_be_json(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = answer(b"<html>", content_type="text/html")
    done = await proxy.outcome(await proxy.submit())
    assert done["error"]["error"]["code"] == "invalid_upstream_response"


# Fallbacks.


def by_model(**behaviours: Any) -> Any:
    async def behave(request: Received, writer: Any) -> None:
        await behaviours[request.json()["model"]](request, writer)

    return behave


@pytest.mark.one_store
async def test_a_prefix_is_taken_off_the_model_before_the_call(start: Start, gateway: Gateway) -> None:
    upstream = {"models": ["openai/*"], "strip_model_prefix": "openai/", "name": "openai"}
    proxy = await start(upstream=upstream)
    gateway.behaviour = by_model(a=answer(b"", status=404), b=answer({"from": "b"}))
    body = b'{ "model":"openai/a", "fallbacks": ["openai/b"], "input":"openai/a" }'
    done = await proxy.outcome(await proxy.submit(body))
    assert done["result"] == {"from": "b"}
    assert done["extra_fields"]["model_requested"] == "openai/b"
    assert [request.body for request in gateway.received] == [
        b'{ "model":"a", "input":"openai/a" }',
        b'{ "model":"b", "input":"openai/a" }',
    ]
    gateway.behaviour = answer({"text": "hello"})
    for model in (b"openai/whisper-1", b"openai/openai/x"):
        whole = WHOLE.replace(b"whisper-1", model)
        await proxy.outcome(await proxy.submit(whole, "audio/transcriptions", headers=MULTIPART))
        assert gateway.received[-1].body == whole.replace(model, model.removeprefix(b"openai/"))
    assert (await proxy.post("/v1/async/embeddings", {"model": "a", "input": "x"})).status == 404


BODY = b'{"model": "a",  "input": [1.50, "x"], "fallbacks": ["b", "c"], "user": 1e2}'


@pytest.mark.one_store
@pytest.mark.parametrize(
    "failure", [answer(b"", status=status) for status in (400, 404, 500, 503)] + [raw(b"")]
)
async def test_fallbacks_are_tried_in_order(proxy: Client, gateway: Gateway, failure: Any) -> None:
    gateway.behaviour = by_model(a=failure, b=answer(b"", status=404), c=answer({"from": "c"}))
    done = await proxy.outcome(await proxy.submit(BODY))
    assert (done["status"], done["result"]) == ("completed", {"from": "c"})
    assert done["extra_fields"] == {
        "provider": "gateway",
        "model_requested": "c",
        "request_type": "embedding",
        "fallback_index": 2,
    }
    sent = [request.json() for request in gateway.received]
    assert all("fallbacks" not in body for body in sent)
    assert list(dict.fromkeys(body["model"] for body in sent)) == ["a", "b", "c"]
    assert gateway.received[-1].body == b'{"model": "c",  "input": [1.50, "x"], "user": 1e2}'


async def test_the_first_model_that_answers_is_the_last(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = by_model(a=answer({"from": "a"}))
    done = await proxy.outcome(await proxy.submit(BODY))
    assert (done["result"], done["extra_fields"]["fallback_index"]) == ({"from": "a"}, 0)


@pytest.mark.one_store
@pytest.mark.parametrize("status", [401, 403])
async def test_a_wrong_credential_does_not_fall_back(
    proxy: Client, gateway: Gateway, status: int
) -> None:
    gateway.behaviour = by_model(a=answer({"error": {"message": "bad key"}}, status=status))
    done = await proxy.outcome(await proxy.submit(BODY))
    assert (done["status_code"], done["error"]["extra_fields"]["fallback_index"]) == (status, 0)
    assert len(gateway.received) == 1


async def test_when_all_fail_the_last_one_is_the_outcome(proxy: Client, gateway: Gateway) -> None:
    failing = {name: answer({"error": {"message": name}}, status=404) for name in "abc"}
    gateway.behaviour = by_model(**failing)
    done = await proxy.outcome(await proxy.submit(BODY))
    assert done["error"]["error"]["message"] == "c"
    assert done["error"]["extra_fields"]["fallback_index"] == 2


@pytest.mark.one_store
@pytest.mark.parametrize("fallbacks", ["b", [1], [""], ["b"] * 11, None])
async def test_bad_fallbacks(proxy: Client, fallbacks: Any) -> None:
    response = await proxy.post(
        "/v1/async/embeddings", {"model": "a", "input": "x", "fallbacks": fallbacks}
    )
    assert (response.status, response.code) == (400, "invalid_type")
    assert response.json()["error"]["param"] == "fallbacks"


async def test_a_fallback_on_another_upstream(start: Start, gateway: Gateway) -> None:
    from tests import gateway as gateways

    gateway.behaviour = answer(b"", status=503)
    async with gateways.running() as other:
        retry = {"attempts": 1, "backoff": "1ms", "max_backoff": "2ms", "outage": "50ms"}
        proxy = await start(
            upstreams=[
                {"name": "one", "base_url": gateway.url, "models": ["a"], "retry": retry},
                {"name": "two", "base_url": other.url, "models": ["b"], "retry": retry},
            ]
        )
        body = {"model": "a", "input": "x", "fallbacks": ["b"]}
        done = await proxy.outcome(await proxy.submit(body))
        assert (done["status"], done["extra_fields"]["provider"]) == ("completed", "two")
        assert json.loads(other.received[0].body) == {"model": "b", "input": "x"}
        refused = await proxy.post("/v1/async/embeddings", {**body, "fallbacks": ["z"]})
        assert refused.code == "model_not_found"


@pytest.mark.one_store
async def test_no_fallbacks_leave_the_envelope_as_it_is(proxy: Client) -> None:
    assert "extra_fields" not in await proxy.outcome(await proxy.submit())


async def test_a_fallback_is_another_request_to_the_upstream(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = by_model(a=answer(b"", status=404), b=answer({"from": "b"}))
    path = await proxy.submit(
        b'{"model":"a","input":"x","fallbacks":["b"]}', headers={"Idempotency-Key": "k"}
    )
    await proxy.outcome(path)
    assert [request.header("Idempotency-Key") for request in gateway.received] == ["k", "k-1"]


@pytest.mark.one_store
@pytest.mark.parametrize(
    "content_type", ["multipart/form-data; boundary=b\u20ac", "multipart/form-data; boundary*=x"]
)
async def test_a_boundary_that_is_none(proxy: Client, content_type: str) -> None:
    response = await proxy.post(
        "/v1/async/audio/transcriptions", WHOLE, headers={"Content-Type": content_type}
    )
    assert (response.status, response.code) == (400, "invalid_form")
