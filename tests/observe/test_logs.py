"""Log lines: one event, one line, whatever a client has put into it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from asyncproxy.core.events import JobFinished, RequestPassed, Retried, SubmitRefused
from asyncproxy.core.jobs import JobStatus
from asyncproxy.observe.logs import LogObserver, logging_to_stderr
from asyncproxy.wire import multipart

JOB = JobFinished(
    job_id="an-id",
    endpoint="embeddings",
    upstream="gateway",
    model="m",
    status=JobStatus.COMPLETED,
    status_code=200,
    code="",
    attempts=1,
    total_s=1.5,
    call_s=0.25,
    result_bytes=17,
    queued_s=1.125,
    request_id="r-7",
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    calls=2,
    client="0102ff",
    request_bytes=70,
    inputs=3,
)
REQUEST = RequestPassed(
    method="POST",
    path="/v1/embeddings",
    upstream="gateway",
    status=200,
    outcome="ok",
    sent_bytes=17,
    total_s=0.0123,
    request_id="r-1",
)
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

HOSTILE = [
    "m\n2026-01-01T00:00:00.000Z info    forged",
    "m\r\nforged",
    "m status=500",
    'm" status=500 x="',
    "m\\",
    'm","status":500,"x":"',
    "m\x1b[2Jm",
    "m\x00\x85\u2028\u2029\x0b\x0cm",
    "m\u202em",
    "m\ud800m",
    "ü m",
    "m\tstatus=500",
]

Written = Callable[[], str]


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    """The tests leave the levels as they were."""
    loggers = (logging.getLogger(), logging.getLogger("asyncproxy"))
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Written:
    return lambda: capsys.readouterr().err


def fields_of(line: str) -> dict[str, str]:
    """The fields of a text line, read as an operator's tools do. Nothing else may be in it."""
    field = r' (\w+)=("(?:[^"\\]|\\.)*"|[^ "]+)'
    match = re.fullmatch(rf"{TIME} \w+ +(?:job \w+|request)((?:{field})+)", line)
    assert match is not None, line
    pairs = re.findall(field, match[1])
    assert len(pairs) == len(dict(pairs)), "a field is there twice"
    return {key: json.loads(text) if text[0] == '"' else text for key, text in pairs}


def test_a_job_in_text(written: Written) -> None:
    with logging_to_stderr("info", "text"):
        LogObserver().job_finished(JOB)
    line = written()
    assert re.fullmatch(
        TIME
        + r" info    job completed job=an-id request_id=r-7 trace_id=4bf92f3577b34da6a3ce929d0e0e4736"
        r" client=0102ff endpoint=embeddings upstream=gateway model=m status=200"
        r" attempts=1 calls=2 total_ms=1500 queue_ms=1125 call_ms=250"
        r" inputs=3 request_bytes=70 bytes=17\n",
        line,
    )


def test_a_request_in_text(written: Written) -> None:
    with logging_to_stderr("info", "text"):
        LogObserver().request_passed(REQUEST)
    line = written()
    assert re.fullmatch(
        TIME
        + r" info    request method=POST path=/v1/embeddings upstream=gateway status=200 outcome=ok"
        r" request_bytes=0 bytes=17 total_ms=12\.3 request_id=r-1\n",
        line,
    )


def test_events_in_json(written: Written) -> None:
    with logging_to_stderr("info", "json"):
        LogObserver().job_finished(JOB)
        LogObserver().request_passed(REQUEST)
    job, request = map(json.loads, written().splitlines())
    assert re.fullmatch(TIME, job.pop("time"))
    assert job == {
        "level": "info",
        "event": "job completed",
        "job": "an-id",
        "request_id": "r-7",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "endpoint": "embeddings",
        "upstream": "gateway",
        "model": "m",
        "status": 200,
        "client": "0102ff",
        "attempts": 1,
        "calls": 2,
        "inputs": 3,
        "request_bytes": 70,
        "total_ms": 1500,
        "queue_ms": 1125,
        "call_ms": 250,
        "bytes": 17,
    }
    assert (request["event"], request["path"], request["total_ms"]) == (
        "request",
        "/v1/embeddings",
        12.3,
    )


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_nobody_starts_a_line_or_a_field_of_their_own_in_text(hostile: str, written: Written) -> None:
    with logging_to_stderr("info", "text"):
        LogObserver().job_finished(
            msgspec.structs.replace(JOB, model=hostile, detail=hostile, request_id=hostile)
        )
        LogObserver().request_passed(
            msgspec.structs.replace(REQUEST, path=hostile, method=hostile, request_id=hostile)
        )
    text = written()
    assert text.isascii()
    assert text.count("\n") == 2
    job, request = text.splitlines()
    assert {fields_of(job)[key] for key in ("model", "detail", "request_id")} == {hostile}
    assert fields_of(job)["status"] == fields_of(request)["status"] == "200"
    assert {fields_of(request)[key] for key in ("path", "method", "request_id")} == {hostile}


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_nobody_breaks_the_json(hostile: str, written: Written) -> None:
    with logging_to_stderr("info", "json"):
        LogObserver().job_finished(msgspec.structs.replace(JOB, model=hostile))
        LogObserver().request_passed(msgspec.structs.replace(REQUEST, path=hostile))
    text = written()
    assert text.isascii()
    job, request = map(json.loads, text.splitlines())
    assert (job["model"], job["status"]) == (hostile, 200)
    assert (request["path"], request["status"]) == (hostile, 200)


@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_nobody_starts_a_line_by_what_a_message_quotes(
    hostile: str, style: str, written: Written
) -> None:
    with logging_to_stderr("info", style):
        logging.getLogger("asyncproxy.x").warning("cannot read %s", hostile)
    text = written()
    assert text.count("\n") == len(text.splitlines()) == 1
    if style == "json":
        assert json.loads(text)["event"] == f"cannot read {hostile}"


def fail(error: Exception) -> None:
    raise error


def fail_with(message: str) -> None:
    try:
        fail(RuntimeError(message))
    except RuntimeError:
        logging.getLogger("asyncproxy").exception("an error inside the proxy")


def test_tracebacks_are_there(written: Written) -> None:
    with logging_to_stderr("info", "text"):
        fail_with("what broke")
    head, *rest = written().splitlines()
    assert re.fullmatch(TIME + " error   an error inside the proxy", head)
    assert "Traceback (most recent call last):" in rest[0]
    assert "in fail_with" in "\n".join(rest)
    assert rest[-1].endswith("RuntimeError: what broke")


def test_tracebacks_in_json_are_on_the_same_line(written: Written) -> None:
    with logging_to_stderr("info", "json"):
        fail_with("what\nbroke")
    (line,) = written().splitlines()
    data = json.loads(line)
    assert (data["level"], data["event"]) == ("error", "an error inside the proxy")
    assert data["traceback"].startswith("Traceback (most recent call last):")
    assert data["traceback"].endswith("RuntimeError: what\nbroke")


def test_what_an_exception_says_cannot_look_like_a_line_of_the_log(written: Written) -> None:
    with logging_to_stderr("info", "text"):
        fail_with("x\n2026-01-01T00:00:00.000Z info    forged")
    lines = written().splitlines()
    assert [line for line in lines if re.match(TIME, line)] == lines[:1]


@pytest.mark.parametrize("style", ["text", "json"])
def test_long_values_are_cut(style: str, written: Written) -> None:
    with logging_to_stderr("info", style):
        LogObserver().job_finished(msgspec.structs.replace(JOB, model="m" * 100_000))
        LogObserver().job_finished(msgspec.structs.replace(JOB, model="m" * 512))
    lines = written().splitlines()
    values = [
        json.loads(line)["model"] if style == "json" else fields_of(line)["model"] for line in lines
    ]
    assert values == ["m" * 512 + "…", "m" * 512]
    assert len(lines[0]) < 1000


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (JOB, "info"),
        (msgspec.structs.replace(JOB, status=JobStatus.FAILED, status_code=504, code="x"), "warning"),
        (REQUEST, "info"),
        (msgspec.structs.replace(REQUEST, outcome="client_gone"), "info"),
        (msgspec.structs.replace(REQUEST, outcome="upstream_broke"), "warning"),
        (msgspec.structs.replace(REQUEST, outcome="upstream_timeout", status=504), "warning"),
    ],
)
def test_what_went_wrong_is_a_warning(event: Any, level: str, written: Written) -> None:
    with logging_to_stderr("info", "json"):
        if isinstance(event, JobFinished):
            LogObserver().job_finished(event)
        else:
            LogObserver().request_passed(event)
    assert json.loads(written())["level"] == level


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_that_of_our_lines(level: str, expected: list[str], written: Written) -> None:
    with logging_to_stderr(level, "json"):
        for name in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger("asyncproxy.dispatch.dispatcher"), name)("x")
    assert [json.loads(line)["level"] for line in written().splitlines()] == expected


def test_of_libraries_only_warnings_are_written(written: Written) -> None:
    with logging_to_stderr("debug", "json"):
        logging.getLogger("aiohttp.access").info("not this")
        logging.getLogger("aiohttp.server").warning("this")
    (line,) = written().splitlines()
    assert json.loads(line)["event"] == "this"


def test_no_byte_of_a_form_is_written(written: Written) -> None:
    body = b"--x\r\nContent-Disposition: form-data; name=model\r\n\r\nm\r\n--xsecret"
    bodies = [body[:end] + b"S" for end in range(len(body))] + [body + b"--S", b"SECRET", b"--x--\r\nS"]
    with logging_to_stderr("debug", "text"):
        for malformed in bodies:
            with suppress(multipart.InvalidForm):
                multipart.parse("multipart/form-data; boundary=x", malformed)
    assert written() == ""


def test_what_is_empty_is_left_out_and_zero_is_not(written: Written) -> None:
    with logging_to_stderr("info", "json"):
        LogObserver().job_finished(msgspec.structs.replace(JOB, model="", attempts=0))
    data = json.loads(written())
    assert "model" not in data
    assert "detail" not in data
    assert data["attempts"] == 0


@pytest.mark.parametrize("broken", [False, True])
def test_the_handlers_of_the_root_are_put_back(*, broken: bool, written: Written) -> None:
    root = logging.getLogger()
    mine = logging.NullHandler()
    root.addHandler(mine)
    try:
        before = list(root.handlers)
        try:
            with logging_to_stderr("info", "text"):
                assert mine not in root.handlers
                assert len(root.handlers) == 1
                if broken:
                    fail(LookupError())
        except LookupError:
            assert broken
        assert root.handlers == before
        logging.getLogger("asyncproxy").error("after it")
        assert "after it" not in written()
    finally:
        root.removeHandler(mine)


def test_every_line_is_written_when_the_with_ends(written: Written) -> None:
    with logging_to_stderr("info", "json"):
        for number in range(500):
            logging.getLogger("asyncproxy").info("%d", number)
    assert [json.loads(line)["event"] for line in written().splitlines()] == [
        str(n) for n in range(500)
    ]


def test_level_and_style_can_change_while_it_is_written(written: Written) -> None:
    with logging_to_stderr("warning", "text") as log:
        logging.getLogger("asyncproxy").info("not this")
        log.configure("debug", "json")
        logging.getLogger("asyncproxy").debug("this")
    (line,) = written().splitlines()
    assert (json.loads(line)["level"], json.loads(line)["event"]) == ("debug", "this")


def test_what_else_happens_to_a_job_is_there_at_debug(written: Written) -> None:
    with logging_to_stderr("debug", "text"):
        LogObserver().retried(Retried("an-id", "gateway", "503", 1.5))
        LogObserver().submit_refused(SubmitRefused("embeddings", "store_full"))
    retried, refused = written().splitlines()
    assert retried.endswith(" debug   job retried job=an-id upstream=gateway reason=503 delay_ms=1500")
    assert refused.endswith(" debug   submit refused endpoint=embeddings code=store_full")


def test_the_levels_are_put_back() -> None:
    loggers = (logging.getLogger(), logging.getLogger("asyncproxy"))
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with logging_to_stderr("debug", "text"):
        assert loggers[1].isEnabledFor(logging.DEBUG)
    assert [logger.level for logger in loggers] == [logging.CRITICAL, logging.CRITICAL]
