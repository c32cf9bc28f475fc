"""What the log says of jobs and requests, and what it never does."""

from __future__ import annotations

import logging

import pytest

from tests.conftest import EMBED, Client, Start
from tests.end_to_end.conftest import Watch
from tests.gateway import Gateway, answer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
KEY = "sk-of-a-client"
MINE = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(autouse=True)
def _lines_of_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def fields(caplog: pytest.LogCaptureFixture, event: str) -> dict[str, object]:
    """The fields of the one line of an event."""
    (found,) = [record for record in caplog.records if record.getMessage() == event]
    return dict(vars(found)["fields"])


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
    ("body", "detail"),
    [
        ({"error": {"message": "This model is\nnot loaded."}}, "This model is\nnot loaded."),
        (b"<h1>no</h1>", "<h1>no</h1>"),
        (b"", "The upstream answered 400 with no body."),
    ],
)
async def test_a_failure_says_what_the_upstream_said(
    proxy: Client,
    gateway: Gateway,
    caplog: pytest.LogCaptureFixture,
    body: object,
    detail: str,
) -> None:
    gateway.behaviour = answer(body, status=400)
    await proxy.outcome(await proxy.submit())
    assert fields(caplog, "job failed")["detail"] == detail


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
    proxy = await start(upstream={"headers": {"X-Gateway-Key": "the-gateway-key"}})
    said = f"Bad keys: Bearer {key} and {key}, the-gateway-key, in-the-query; got Bearer other-key-1"
    gateway.behaviour = answer({"error": {"message": said}}, status=401)
    mine = {"Authorization": f"Bearer {key}"}
    path = await proxy.post("/v1/async/embeddings?api-key=in-the-query", EMBED, headers=mine)
    done = await proxy.outcome(path.headers["Location"], headers=mine)
    assert done["error"]["error"]["message"] == said, "the client sees it as it was"
    detail = str(fields(caplog, "job failed")["detail"])
    assert detail == "Bad keys: *** and ***, ***, ***; got Bearer ***"
    assert {key, "in-the-query"} <= watch.secrets
