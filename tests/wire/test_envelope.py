"""The bytes of jobs and errors: spliced exactly, in the shapes of the wire contract."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncproxy.core.errors import (
    ApiError,
    DeadlineExceeded,
    IllegalTransition,
    Interrupted,
    InvalidJson,
    InvalidUpstreamResponse,
    ResultTooLarge,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from asyncproxy.core.jobs import Job, JobStatus, Outcome, UpstreamResponse
from asyncproxy.wire import envelope
from asyncproxy.wire.envelope import timestamp

CREATED = 1771488617.831
NOW = CREATED + 2
ID = "0b0f9b3c-1a5e-4c7e-9b1f-0123456789ab"
JSON = ((b"Content-Type", b"application/json"),)
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def job(
    *,
    endpoint: str = "embeddings",
    model: str = "m",
    status: JobStatus = JobStatus.PROCESSING,
    fallback_index: int | None = None,
) -> Job:
    return Job(
        ID,
        endpoint,
        b"tenant",
        "gateway",
        model,
        CREATED,
        60,
        status,
        fallback_index=fallback_index,
    )


def answer(
    body: bytes, *, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = JSON
) -> UpstreamResponse:
    return UpstreamResponse(status, headers, (body,))


def content(outcome: Outcome) -> bytes:
    """What ``/content`` answers with."""
    if outcome.content is not None:
        return outcome.content
    return outcome.envelope[outcome.start : outcome.end]


def error_of(outcome: Outcome) -> Any:
    """The error in the envelope of a failed job, after a check of its shape."""
    data = json.loads(outcome.envelope)
    assert list(data) == [
        "id",
        "status",
        "created_at",
        "completed_at",
        "expires_at",
        "status_code",
        "error",
    ]
    assert data["status"] == "failed"
    assert outcome.status is JobStatus.FAILED
    assert data["status_code"] == outcome.status_code == data["error"]["status_code"]
    assert list(data["error"]) == ["is_bifrost_error", "status_code", "error", "extra_fields"]
    assert data["error"]["is_bifrost_error"] is False
    assert list(data["error"]["error"]) == ["type", "code", "message", "param"]
    return data["error"]["error"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1771488617.831, "2026-02-19T08:10:17.831Z"),
        (1771488617, "2026-02-19T08:10:17.000Z"),
        (1771488617.0005, "2026-02-19T08:10:17.000Z"),
        (1771488617.9999, "2026-02-19T08:10:18.000Z"),
        (1771545599.9996, "2026-02-20T00:00:00.000Z"),
        (951782400.05, "2000-02-29T00:00:00.050Z"),
        (253402300799, "9999-12-31T23:59:59.000Z"),
    ],
)
def test_a_timestamp_is_rfc_3339_in_utc_with_milliseconds(seconds: float, text: str) -> None:
    assert timestamp(seconds) == text


@given(st.integers(0, 4_000_000_000_000))
@settings(max_examples=200, deadline=None)
def test_a_timestamp_keeps_every_millisecond(milliseconds: int) -> None:
    text = timestamp(milliseconds / 1000)
    assert RFC_3339.fullmatch(text)
    moment = datetime.fromisoformat(text)
    assert moment.tzinfo == UTC
    assert round(moment.timestamp() * 1000) == milliseconds


@given(st.floats(0, 4e9), st.floats(0, 1e6))
@settings(max_examples=100, deadline=None)
def test_timestamps_sort_as_their_moments_do(seconds: float, later: float) -> None:
    assert timestamp(seconds) <= timestamp(seconds + later)


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.PROCESSING])
def test_a_live_job_has_three_fields(status: JobStatus) -> None:
    data = json.loads(envelope.live(job(status=status)))
    assert data == {"id": ID, "status": status.value, "created_at": "2026-02-19T08:10:17.831Z"}


def test_a_completed_job_has_the_shape_of_the_contract() -> None:
    outcome = envelope.finished(job(), answer(b'{"data":[]}'), now=NOW)
    assert list(json.loads(outcome.envelope).items()) == [
        ("id", ID),
        ("status", "completed"),
        ("created_at", "2026-02-19T08:10:17.831Z"),
        ("completed_at", "2026-02-19T08:10:19.831Z"),
        ("expires_at", "2026-02-19T08:11:19.831Z"),
        ("status_code", 200),
        ("result", {"data": []}),
    ]
    assert outcome.id == ID
    assert outcome.endpoint == "embeddings"
    assert outcome.credential == b"tenant"
    assert outcome.status is JobStatus.COMPLETED
    assert outcome.status_code == 200
    assert outcome.expires_at == NOW + 60


BODIES = [
    b'{"a":1.0,"b":1e2,"c":0.10000000000000000555,"d":-0,"e":12345678901234567890123}',
    b'  {"a" : 1 ,\r\n "a":2 }\n',
    b'"\\u00e9\\ud83d\\ude00 half \\ud83d \\/"',
    '{"é":"😀"}'.encode(),
    b"[]",
    b"null",
    b"1e999",
    b'"}"',
]


@pytest.mark.parametrize("body", BODIES)
def test_the_body_is_spliced_byte_for_byte(body: bytes) -> None:
    outcome = envelope.finished(job(), answer(body), now=NOW)
    assert outcome.envelope.endswith(b'"status_code":200,"result":' + body + b"}")
    assert outcome.envelope[outcome.start : outcome.end] == body
    assert outcome.content is None
    assert content(outcome) == body


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=10,
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_json_value_comes_back_as_it_was(value: Any, ascii_only: bool) -> None:  # noqa: FBT001
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    outcome = envelope.finished(job(), answer(body), now=NOW)
    assert outcome.envelope[outcome.start : outcome.end] == body
    assert json.loads(outcome.envelope)["result"] == value


@pytest.mark.parametrize("status", [200, 201, 202, 206, 299])
def test_every_2xx_is_completed(status: int) -> None:
    outcome = envelope.finished(job(), answer(b"{}", status=status), now=NOW)
    assert outcome.status is JobStatus.COMPLETED
    assert json.loads(outcome.envelope)["status_code"] == outcome.status_code == status


@pytest.mark.parametrize("status", [301, 302, 304, 307, 400, 401, 404, 418, 429, 500, 503, 599])
def test_everything_else_is_failed_redirects_included(status: int) -> None:
    outcome = envelope.finished(job(), answer(b"{}", status=status), now=NOW)
    assert outcome.status is JobStatus.FAILED
    assert outcome.status_code == status
    error_of(outcome)


@pytest.mark.parametrize("status", [204, 205])
@pytest.mark.parametrize("headers", [(), JSON, ((b"Content-Type", b"text/plain"),)])
def test_an_answer_that_has_no_body_is_null_in_the_envelope_and_nothing_as_content(
    status: int, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    outcome = envelope.finished(job(), answer(b"", status=status, headers=headers), now=NOW)
    assert outcome.status is JobStatus.COMPLETED
    assert json.loads(outcome.envelope)["result"] is None
    assert json.loads(outcome.envelope)["status_code"] == status
    assert content(outcome) == b""


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"<html>",
        b"NaN",
        b'{"a":NaN}',
        b"{} {}",
        b'"\xff"',
        b"\xef\xbb\xbf",
        b"\xef\xbb{}",
    ],
)
def test_a_2xx_that_says_json_and_is_not_is_an_error(body: bytes) -> None:
    for headers in (JSON, ()):  # what has no type is taken for JSON
        with pytest.raises(InvalidUpstreamResponse) as caught:
            envelope.finished(job(), answer(body, headers=headers), now=NOW)
        assert caught.value.status == 502
        assert caught.value.code == "invalid_upstream_response"


def test_ten_thousand_nested_brackets_are_an_error() -> None:
    with pytest.raises(InvalidUpstreamResponse):
        envelope.finished(job(), answer(b"[" * 10_000 + b"]" * 10_000), now=NOW)


@pytest.mark.parametrize(
    "media_type", [b"text/html", b"text/plain; charset=utf-8", b"application/jsonl"]
)
def test_a_2xx_of_another_type_is_an_error_where_json_is_expected(media_type: bytes) -> None:
    headers = ((b"content-type", media_type),)
    with pytest.raises(InvalidUpstreamResponse, match=media_type.split(b";")[0].decode()):
        envelope.finished(job(), answer(b'{"a":1}\n{"a":2}', headers=headers), now=NOW)


@pytest.mark.parametrize("media_type", [b"text/plain", b"application/octet-stream", b"text/html", b"x"])
@pytest.mark.parametrize("pieces", [(b"[1]",), (b"\xef\xbb\xbf[1", b"]"), (b"\xef\xbb\xbf[1]",)])
def test_json_of_another_type_is_a_result_where_only_json_can_be(
    media_type: bytes, pieces: tuple[bytes, ...]
) -> None:
    response = UpstreamResponse(200, ((b"Content-Type", media_type),), pieces)
    outcome = envelope.finished(job(), response, now=NOW)
    assert json.loads(outcome.envelope)["result"] == [1]
    assert content(outcome) == b"[1]"


def test_text_is_media_where_media_can_be_even_if_it_would_be_json() -> None:
    headers = ((b"Content-Type", b"text/plain"),)
    outcome = envelope.finished(
        job(endpoint="audio/transcriptions"), answer(b"\xef\xbb\xbf1", headers=headers), now=NOW
    )
    assert (outcome.encoded, content(outcome)) == (True, b"\xef\xbb\xbf1")


def test_a_byte_order_mark_is_not_in_a_result_that_was_checked_as_it_arrived() -> None:
    pieces = (b"\xef\xbb\xbf[" + b"1," * 200_000, b"1," * 200_000 + b"1]")
    outcome = envelope.finished(job(), UpstreamResponse(200, JSON, pieces, checked=True), now=NOW)
    assert json.loads(spliced(outcome))["status"] == "completed"


def test_a_byte_order_mark_does_not_hide_the_error_of_an_upstream() -> None:
    body = b'\xef\xbb\xbf{"error":{"message":"m","code":"c"}}'
    outcome = envelope.finished(job(), answer(body, status=400), now=NOW)
    assert json.loads(outcome.envelope)["error"]["error"]["code"] == "c"
    assert content(outcome) == body


def test_a_coding_that_was_not_undone_stays_with_its_bytes() -> None:
    """As when sync. JSON that is readable as it is has no coding, whatever its fields say."""
    headers = ((b"Content-Type", b"application/json"), (b"Content-Encoding", b"x"))
    failed = envelope.finished(job(), answer(b"\x00\x01", status=400, headers=headers), now=NOW)
    assert b"Content-Encoding: x" in failed.content_head
    completed = envelope.finished(job(), answer(b"{}", headers=headers), now=NOW)
    assert b"Content-Encoding" not in completed.content_head


@pytest.mark.parametrize(
    "media_type",
    [
        b"application/json; charset=utf-8",
        b"Application/JSON",
        b"application/problem+json",
        b"text/json",
    ],
)
def test_json_by_any_of_its_names_is_json(media_type: bytes) -> None:
    outcome = envelope.finished(job(), answer(b"{}", headers=((b"CONTENT-TYPE", media_type),)), now=NOW)
    assert json.loads(outcome.envelope)["result"] == {}


def spliced(outcome: Outcome) -> bytes:
    """The envelope of an outcome as it is written, and its size as it is announced."""
    if not outcome.sizes:
        return envelope.whole(outcome)
    parts = b"".join(envelope.spliced_part(outcome, part) for part in outcome.parts)
    written = outcome.envelope[: outcome.start] + parts + outcome.envelope[outcome.start :]
    assert envelope.spliced_size(outcome) == len(written)
    return written


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 200_000, 256 * 1024, 400_000, 400_001, 400_002])
def test_speech_is_base64_in_the_envelope_and_raw_as_content(length: int) -> None:
    audio = bytes(i * 7 % 256 for i in range(length))
    headers = ((b"Content-Type", b"audio/mpeg; x=y"),)
    outcome = envelope.finished(job(endpoint="audio/speech"), answer(audio, headers=headers), now=NOW)
    data = json.loads(spliced(outcome))
    assert data["status"] == "completed"
    assert data["result"] == {"content_type": "audio/mpeg", "audio": base64.b64encode(audio).decode()}
    assert (b"".join(outcome.parts) or content(outcome)) == audio
    assert outcome.encoded
    assert bool(outcome.parts) is (length >= 256 * 1024)


@pytest.mark.parametrize(
    ("count", "checked", "kept"), [(1, True, 3), (3, True, 3), (3, False, 3), (4000, True, 3)]
)
def test_a_large_result_is_not_copied_into_its_envelope(
    count: int, *, checked: bool, kept: int
) -> None:
    """Nor are many small pieces kept, or one large one: parts are of a size that can be read at once."""
    body = b'["' + b"x" * 400_000 + b'"]'
    step = -(-len(body) // count)
    pieces = tuple(body[start : start + step] for start in range(0, len(body), step))
    outcome = envelope.finished(job(), UpstreamResponse(200, JSON, pieces, checked), now=NOW)
    written = spliced(outcome)
    assert written.endswith(b'"status_code":200,"result":' + body + b"}")
    assert json.loads(written)["status"] == "completed"
    assert len(outcome.envelope) < 1000
    assert b"".join(outcome.parts) == body
    assert len(outcome.parts) == kept
    assert len(written) < outcome.size < len(written) + 2000


def test_a_type_with_quotes_does_not_break_the_envelope() -> None:
    headers = ((b"Content-Type", b'audio/"x\\y\xe9"'),)
    outcome = envelope.finished(job(endpoint="audio/speech"), answer(b"abc", headers=headers), now=NOW)
    result = json.loads(envelope.whole(outcome))["result"]
    assert result == {"content_type": 'audio/"x\\yé"', "audio": "YWJj"}


def test_an_upstreams_openai_error_is_kept() -> None:
    body = json.dumps(
        {
            "error": {
                "message": "slow “down”",
                "type": "tokens",
                "code": "rate_limit_exceeded",
                "param": "input",
                "more": [1],
            },
            "request_id": 1,
        }
    ).encode()
    outcome = envelope.finished(job(), answer(body, status=429), now=NOW)
    assert error_of(outcome) == {
        "type": "tokens",
        "code": "rate_limit_exceeded",
        "message": "slow “down”",
        "param": "input",
    }
    assert json.loads(outcome.envelope)["error"]["extra_fields"] == {
        "provider": "gateway",
        "model_requested": "m",
        "request_type": "embedding",
    }
    assert content(outcome) == body


def test_what_an_openai_error_lacks_is_null_and_a_number_stays_a_number() -> None:
    body = b'{"error":{"message":"no","code":1234}}'
    outcome = envelope.finished(job(), answer(body, status=400), now=NOW)
    assert error_of(outcome) == {"type": None, "code": 1234, "message": "no", "param": None}


def test_an_openai_error_with_half_a_surrogate_pair_is_kept() -> None:
    body = b'{"error":{"message":"cut \\ud83d","type":"t","code":"c","param":"p"}}'
    outcome = envelope.finished(job(), answer(body, status=400), now=NOW)
    assert error_of(outcome) == {"type": "t", "code": "c", "message": "cut �", "param": "p"}


SHAPELESS = [
    b"<html>Bad Gateway</html>",
    b'{"error":"no"}',
    b'{"error":{"message":null}}',
    b'{"error":{"code":"c"}}',
    b'{"detail":"no"}',
    b'{"error":{"message":"cut',
    b"[1]",
    '"é"'.encode(),
]


@pytest.mark.parametrize("body", SHAPELESS)
def test_any_other_body_becomes_the_message(body: bytes) -> None:
    outcome = envelope.finished(job(), answer(body, status=500), now=NOW)
    error = error_of(outcome)
    assert error["message"] == body.decode()
    assert error["type"] == "upstream_error"
    assert content(outcome) == body


def test_an_error_without_a_body_says_so() -> None:
    for body in (b"", b" \r\n"):
        outcome = envelope.finished(job(), answer(body, status=503), now=NOW)
        assert "503" in error_of(outcome)["message"]
        assert content(outcome) == body


@pytest.mark.parametrize("letter", ["x", "é", "€", "😀"])
def test_a_long_message_is_cut_after_two_thousand_characters(letter: str) -> None:
    body = (letter * 2001).encode()
    outcome = envelope.finished(job(), answer(body, status=500), now=NOW)
    assert error_of(outcome)["message"] == letter * 2000
    exact = envelope.finished(job(), answer(body[: -len(letter.encode())], status=500), now=NOW)
    assert error_of(exact)["message"] == letter * 2000
    assert content(outcome) == body


def test_an_error_that_is_not_utf_8_is_readable_all_the_same() -> None:
    outcome = envelope.finished(job(), answer(b"caf\xe9 \xff", status=500), now=NOW)
    assert error_of(outcome)["message"] == "caf� �"
    outcome = envelope.finished(job(), answer(b'{"error":{"message":"\xff"}}', status=500), now=NOW)
    assert "�" in error_of(outcome)["message"]


@given(
    st.binary(max_size=200)
    | st.text().map(lambda text: json.dumps({"error": {"message": text}}).encode())
)
@settings(max_examples=300, deadline=None)
def test_whatever_the_body_of_an_error_the_envelope_is_json(body: bytes) -> None:
    outcome = envelope.finished(job(), answer(body, status=500), now=NOW)
    error_of(outcome)
    assert content(outcome) == body


@pytest.mark.parametrize("field", ["code", "param", "type", "more"])
def test_no_depth_of_nesting_in_an_error_is_an_error_of_ours(field: str) -> None:
    for depth in [*range(880, 1010, 3), 10_000]:
        nested = b"[" * depth + b"]" * depth
        body = b'{"error":{"message":"no","' + field.encode() + b'":' + nested + b"}}"
        outcome = envelope.finished(job(), answer(body, status=500), now=NOW)
        assert outcome.status is JobStatus.FAILED


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UpstreamUnreachable, 502, "upstream_unreachable"),
        (UpstreamTimeout, 504, "upstream_timeout"),
        (InvalidUpstreamResponse, 502, "invalid_upstream_response"),
        (ResultTooLarge, 502, "result_too_large"),
        (DeadlineExceeded, 504, "deadline_exceeded"),
        (Interrupted, 500, "interrupted"),
    ],
)
def test_a_job_that_failed_for_a_reason_of_ours_says_so(
    error: type[ApiError], status: int, code: str
) -> None:
    outcome = envelope.failed(job(model="x"), error("What was wrong."), now=NOW)
    assert error_of(outcome) == {
        "type": "server_error",
        "code": code,
        "message": "What was wrong.",
        "param": None,
    }
    assert outcome.status_code == status
    assert outcome.expires_at == NOW + 60
    data = json.loads(outcome.envelope)
    assert data["completed_at"] == "2026-02-19T08:10:19.831Z"
    assert data["error"]["extra_fields"] == {
        "provider": "gateway",
        "model_requested": "x",
        "request_type": "embedding",
    }
    assert json.loads(content(outcome)) == data["error"]
    assert outcome.content_head == b"Content-Type: application/json\r\n"


def test_a_job_with_fallbacks_says_which_model_it_was() -> None:
    expected = {
        "provider": "gateway",
        "model_requested": "m",
        "request_type": "embedding",
        "fallback_index": 1,
    }
    of = job(fallback_index=1)
    completed = envelope.finished(of, answer(b"[1.0]"), now=NOW)
    assert json.loads(completed.envelope)["extra_fields"] == expected
    assert content(completed) == b"[1.0]"
    failed = envelope.finished(of, answer(b"no", status=500), now=NOW)
    assert json.loads(failed.envelope)["error"]["extra_fields"] == expected


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.COMPLETED, JobStatus.FAILED])
def test_only_a_job_that_is_being_processed_can_end(status: JobStatus) -> None:
    with pytest.raises(IllegalTransition):
        envelope.finished(job(status=status), answer(b"{}"), now=NOW)
    with pytest.raises(IllegalTransition):
        envelope.failed(job(status=status), Interrupted("x"), now=NOW)


def test_an_outcome_holds_nothing_of_the_request() -> None:
    for outcome in (
        envelope.finished(job(), answer(b"{}"), now=NOW),
        envelope.finished(job(), answer(b"no", status=500), now=NOW),
        envelope.failed(job(), Interrupted("x"), now=NOW),
    ):
        kept = [getattr(outcome, name) for name in type(outcome).__struct_fields__]
        assert "s3cret" not in repr(kept)


def test_the_end_to_end_fields_of_the_answer_are_kept() -> None:
    headers = (
        (b"Date", b"today"),
        (b"Content-Type", b"application/json"),
        (b"Content-Length", b"2"),
        (b"Connection", b"close, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"x-ratelimit-remaining", b"5"),
        (b"Set-Cookie", b"a=1"),
        (b"Set-Cookie", b"b=2"),
        (b"X-Bad", b"1\r\nX-Worse: 1"),
    )
    kept = (
        b"Content-Type: application/json\r\nx-ratelimit-remaining: 5\r\n"
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
    )
    for status in (200, 500):
        outcome = envelope.finished(job(), answer(b"{}", status=status, headers=headers), now=NOW)
        assert outcome.content_head == kept


def test_at_most_16_kib_of_fields_are_kept() -> None:
    headers = (*JSON, *((b"X-%03d" % i, b"v" * 100) for i in range(500)))
    head = envelope.finished(job(), answer(b"{}", headers=headers), now=NOW).content_head
    assert 16 * 1024 - 200 < len(head) <= 16 * 1024
    assert head.endswith(b": " + b"v" * 100 + b"\r\n")


def test_an_error_of_ours_has_one_shape() -> None:
    error = InvalidJson("It is “wrong”.\n", param="model")
    assert json.loads(envelope.error_body(error)) == {
        "is_bifrost_error": False,
        "status_code": 400,
        "error": {
            "type": "invalid_request_error",
            "code": "invalid_json",
            "message": "It is “wrong”.\n",
            "param": "model",
        },
        "extra_fields": {"provider": "", "model_requested": "", "request_type": ""},
    }
    error.provider, error.model = "gateway", "m"
    assert json.loads(envelope.error_body(error, endpoint="chat/completions"))["extra_fields"] == {
        "provider": "gateway",
        "model_requested": "m",
        "request_type": "chat_completion",
    }


def test_a_long_model_is_cut_in_an_error() -> None:
    error = InvalidJson("x")
    error.model = "é" * 1000
    body = json.loads(envelope.error_body(error))
    assert body["extra_fields"]["model_requested"] == "é" * 256
    outcome = envelope.failed(job(model="é" * 1000), Interrupted("x"), now=NOW)
    fields = json.loads(outcome.envelope)["error"]["extra_fields"]
    assert fields["model_requested"] == "é" * 256


def test_the_first_field_of_a_name_is_the_one_that_is_read() -> None:
    given_answer = answer(
        b"", headers=((b"Retry-After", b"1"), (b"retry-after", b"2"), (b"X", b"\xe9"))
    )
    assert given_answer.header(b"retry-after") == "1"
    assert given_answer.header(b"x") == "é"
    assert given_answer.header(b"missing") is None
