"""What the log says of jobs and requests, and what it never does."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import pytest

from tests.conftest import EMBED, Client, Start
from tests.end_to_end.conftest import Watch
from tests.gateway import Gateway, Received, answer, raw

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
KEY = "sk-of-a-client"
MINE = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(autouse=True)
def _lines_of_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def lines(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    """The fields of each line of an event."""
    found = [
        r for r in caplog.records if hasattr(r, "fields") and r.getMessage().startswith(f"{event} ")
    ]
    return [dict(vars(record)["fields"]) for record in found]


def fields(caplog: pytest.LogCaptureFixture, event: str) -> dict[str, object]:
    """The fields of the one line of an event."""
    (found,) = lines(caplog, event)
    return found


async def test_the_search_finds_what_is_there(watch: Watch, proxy: Client) -> None:
    await proxy.get("/v1/models?api_key=sk-in-the-query", headers=MINE)
    watch.check()
    assert watch.secrets == {KEY, f"Bearer {KEY}", "sk-in-the-query"}
    assert any("/v1/models" in line for line in watch.written)
    for secret in (KEY, "sk-in-the-query"):
        before = list(watch.written)
        logging.getLogger("asyncproxy").debug("that is %s", secret)
        with pytest.raises(AssertionError, match=secret):
            watch.check()
        watch.written = before


async def test_ids_of_a_client_are_in_the_lines_and_go_upstream(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"X-Request-Id": "r-1", "traceparent": TRACEPARENT}
    await proxy.outcome(await proxy.submit(headers=ids))
    await proxy.post("/v1/embeddings", headers=ids)
    for line in (fields(caplog, "job completed"), fields(caplog, "request")):
        assert (line["request_id"], line["trace_id"]) == ("r-1", TRACE)
    for got in gateway.received:
        assert (got.header("X-Request-Id"), got.header("traceparent")) == ("r-1", TRACEPARENT)


async def test_a_job_without_an_id_of_its_client_has_its_own(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    job = (await proxy.outcome(await proxy.submit(headers={"traceparent": "rubbish"})))["id"]
    line = fields(caplog, "job completed")
    assert line["request_id"] == line["job"] == job == gateway.received[0].header("X-Request-Id")
    assert "trace_id" not in line


async def test_ids_are_cut_and_what_cannot_be_encoded_is_escaped(
    proxy: Client, caplog: pytest.LogCaptureFixture
) -> None:
    await proxy.outcome(await proxy.submit(headers={"X-Request-Id": "r" * 9000}))
    assert fields(caplog, "job completed")["request_id"] == "r" * 256


async def test_durations_and_attempts_are_there(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    await proxy.outcome(await proxy.submit())
    line = fields(caplog, "job completed")
    assert {"queue_ms", "call_ms", "total_ms"} < line.keys()
    assert (line["attempts"], line["upstream"], line["status"]) == (1, "gateway", 200)


async def test_bytes_are_those_of_the_upstream_s_answer(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.behaviour = answer(b"RIFF" * 25, content_type="audio/wav")
    await proxy.outcome(await proxy.submit(endpoint="audio/speech"))
    assert fields(caplog, "job completed")["bytes"] == 100
    gateway.behaviour = answer(b"no", status=400, content_type="text/plain")
    await proxy.outcome(await proxy.submit())
    assert fields(caplog, "job failed")["bytes"] == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "This model is\nnot loaded."}}, "This model is\nnot loaded."),
        (b"<h1>no</h1>", "<h1>no</h1>"),
        (b"", "The upstream answered 400 with no body."),
    ],
)
async def test_at_debug_a_failure_says_what_the_upstream_said(
    proxy: Client,
    gateway: Gateway,
    caplog: pytest.LogCaptureFixture,
    body: object,
    message: str,
) -> None:
    caplog.set_level(logging.DEBUG, "asyncproxy")
    gateway.behaviour = answer(body, status=400)
    await proxy.outcome(await proxy.submit())
    assert fields(caplog, "job failed")["upstream_message"] == message


@pytest.mark.parametrize("status", [400, 500])
async def test_the_input_that_an_upstream_quotes_is_in_no_line(
    proxy: Client, gateway: Gateway, watch: Watch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """FastAPI's gateways answer with the value that they refuse."""
    caplog.set_level(logging.INFO, "asyncproxy")
    text = "the text of a client"
    detail = [{"type": "string_type", "loc": ["body", "input"], "msg": "no string", "input": text}]
    said = {"detail": detail, "error": {"message": f"{text} is too long", "code": "too_long"}}
    gateway.behaviour = answer(said, status=status)
    await proxy.outcome(await proxy.submit({"model": "m", "input": text}))
    line = fields(caplog, "job failed")
    assert (line["status"], line["upstream_code"]) == (status, "too_long")
    assert text not in "\n".join(watch.written)


@pytest.mark.parametrize("code", ["a text of the client", ["x"], {"a": 1}, 1.5, "x" * 65, None, ""])
async def test_a_code_that_is_no_word_is_not_in_the_line(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture, code: object
) -> None:
    gateway.behaviour = answer({"error": {"message": "no", "code": code}}, status=400)
    await proxy.outcome(await proxy.submit())
    assert "upstream_code" not in fields(caplog, "job failed")


async def test_calls_are_counted_and_so_are_attempts(
    start: Start, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate limit takes calls, and no attempt."""
    proxy = await start()
    statuses = iter([429, 429, 500, 200])

    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        status = next(statuses)
        body: object = {"data": []} if status == 200 else {"error": {"message": "no"}}
        await answer(body, status=status)(request, writer)

    gateway.behaviour = behave
    await proxy.outcome(await proxy.submit())
    line = fields(caplog, "job completed")
    assert (line["calls"], line["attempts"]) == (4, 2) == (len(gateway.received), 2)


async def test_a_line_says_who_and_how_large(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """The same credential has the same six digits, in whichever header and whatever it does."""
    body = {"model": "m", "input": ["a", "b", "c"]}
    for headers in (MINE, {"x-api-key": KEY}, {"Authorization": "Bearer sk-of-another"}, {}):
        await proxy.outcome(await proxy.submit(body, headers=headers), headers=headers)
        await proxy.post("/v1/embeddings", body, headers=headers)
    jobs, requests = lines(caplog, "job completed"), lines(caplog, "request")
    who = [line.get("client") for line in jobs]
    assert who == [line.get("client") for line in requests]
    assert who[0] == who[1] != who[2]
    assert who[3] is None
    assert all(re.fullmatch("[0-9a-f]{6}", str(name)) for name in who[:3])
    size = len(json.dumps(body))
    assert {(line["request_bytes"], line["inputs"]) for line in jobs} == {(size, 3)}
    assert {line["request_bytes"] for line in requests} == {size}


async def test_a_404_of_the_upstream_says_where_that_is(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be the path of `base_url` that is wrong. Of other answers it says nothing."""
    for status in (404, 400):
        gateway.behaviour = answer({"detail": "Not Found"}, status=status)
        await proxy.outcome(await proxy.submit())
        await proxy.post("/v1/embeddings")
    await proxy.post("/v1/async/embeddings", b"{")
    for event in ("job failed", "request"):
        first, second = lines(caplog, event)
        assert (first["status"], first["base_url"]) == (404, f"{gateway.url}/v1")
        assert "base_url" not in second


@pytest.mark.parametrize("escaped", [False, True])
async def test_a_key_in_a_path_is_masked(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture, *, escaped: bool
) -> None:
    key = "%73k-of-somebody" if escaped else "sk-of-somebody"
    await proxy.get(f"/v1/key/{key}/info")
    assert gateway.received[0].target == f"/v1/key/{key}/info"
    assert fields(caplog, "request")["path"] == "/v1/key/***/info"


async def test_a_host_application_s_formatter_has_the_fields_too(
    proxy: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """As a plugin the lines go to ordinary handlers, that write `%(message)s`."""
    await proxy.outcome(await proxy.submit({"model": "a\nb", "input": "x"}))
    (record,) = [r for r in caplog.records if r.getMessage().startswith("job ")]
    line = logging.Formatter("%(levelname)s %(message)s").format(record)
    assert line.startswith("INFO job completed job=")
    assert ' model="a\\nb" status=200 ' in line


async def test_a_failure_of_ours_says_why(
    proxy: Client, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.behaviour = answer(b"{", status=200)
    await proxy.outcome(await proxy.submit())
    line = fields(caplog, "job failed")
    assert line["code"] == "invalid_upstream_response"
    assert "not JSON" in str(line["detail"])


@pytest.mark.parametrize("key", ["sk-of-a-client", "0a1b2c3d4e5f", "pässword-of-a-client"])
async def test_an_upstream_that_quotes_credentials_does_not_bring_them_into_the_log(
    start: Start, gateway: Gateway, caplog: pytest.LogCaptureFixture, watch: Watch, key: str
) -> None:
    """Some quote the key that they refuse."""
    caplog.set_level(logging.DEBUG, "asyncproxy")
    proxy = await start(upstream={"headers": {"X-Gateway-Key": "the-gateway-key"}})
    said = f"Bad keys: Bearer {key} and {key}, the-gateway-key, in-the-query; got Bearer other-key-1"
    gateway.behaviour = answer({"error": {"message": said}}, status=401)
    mine = {"Authorization": f"Bearer {key}"}
    path = await proxy.post("/v1/async/embeddings?api-key=in-the-query", EMBED, headers=mine)
    done = await proxy.outcome(path.headers["Location"], headers=mine)
    assert done["error"]["error"]["message"] == said, "the client sees it as it was"
    shown = fields(caplog, "job failed")["upstream_message"]
    assert shown == "Bad keys: *** and ***, ***, ***; got Bearer ***"
    assert {key, "in-the-query"} <= watch.secrets


@pytest.mark.parametrize(
    "head",
    [
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}-{'x' * 40_000}\r\n\r\n",
        f"GET /{KEY}{'x' * 40_000} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\n{KEY}{'x' * 40_000}: x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization {KEY}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\0\r\n\r\n",
        f"GET {KEY} HTTP/9.9\r\nHost: x\r\n\r\n",
        f"{KEY}\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_quoted_nowhere(proxy: Client, watch: Watch, head: str) -> None:
    answered = await proxy.raw(head.encode())
    assert answered.split()[1] == b"400"
    assert KEY not in answered.decode() + "\n".join(watch.written)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX-Key: sk-quoted" + b"x" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nsk-quoted" + b"x" * 70_000 + b": x\r\n\r\n",
        b"HTTP/1.1 200 " + b"sk-quoted" * 10_000 + b"\r\n\r\n",
        b"HTTP/1.1 2x0 sk-quoted\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nsk-quoted\r\n\r\n",
        b"sk-quoted\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nsk-quoted\r\n",
    ],
    ids=range(7),
)
async def test_what_is_no_answer_is_quoted_nowhere(
    proxy: Client, gateway: Gateway, watch: Watch, head: bytes
) -> None:
    gateway.behaviour = raw(head)
    await proxy.outcome(await proxy.submit())
    await proxy.post("/v1/embeddings")
    assert "quoted" not in "\n".join(watch.written)
