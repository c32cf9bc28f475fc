"""The table of steps, and what jobs and their outcomes may hold and show."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from asyncproxy.core.errors import IllegalTransition, UpstreamTimeout
from asyncproxy.core.jobs import (
    TERMINAL,
    TRANSITIONS,
    Call,
    Job,
    JobStatus,
    Lane,
    Outcome,
    UpstreamResponse,
    advance,
    head_of,
)
from asyncproxy.wire import envelope

PENDING, PROCESSING = JobStatus.PENDING, JobStatus.PROCESSING
COMPLETED, FAILED = JobStatus.COMPLETED, JobStatus.FAILED

# Written out a second time on purpose: the table in jobs.py is what is tested.
LEGAL = {
    (PENDING, PROCESSING),
    (PROCESSING, PENDING),
    (PROCESSING, COMPLETED),
    (PROCESSING, FAILED),
}

BODY = b'{"model":"m","input":"the-body-of-the-client"}'
SECRET = "sk-the-key-of-the-client"
HASH = b"the-keyed-hash-of-it"
RESULT = b'{"data":"the-body-of-the-upstream"}'


CALL = Call(
    endpoint="embeddings",
    target=f"/v1/embeddings?key={SECRET}",
    head=f"Authorization\nBearer {SECRET}\nContent-Type\napplication/json",
    body=BODY,
)


def job_in(status: JobStatus = PENDING, attempts: int = 0) -> Job:
    return Job(
        id="an-id",
        endpoint="embeddings",
        credential=HASH,
        upstream="gateway",
        model="m",
        created_at=1_700_000_000.0,
        ttl_s=60,
        status=status,
        attempts=attempts,
    )


def completed() -> Outcome:
    headers = ((b"Content-Type", b"application/json"), (b"Content-Length", b"35"))
    answer = UpstreamResponse(status=200, headers=headers, pieces=(RESULT,))
    return envelope.finished(job_in(PROCESSING), answer, now=1_700_000_001.0)


def failed() -> Outcome:
    error = UpstreamTimeout("The upstream took too long.")
    return envelope.failed(job_in(PROCESSING), error, now=1_700_000_001.0)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(JobStatus, repeat=2)))
def test_a_job_takes_the_legal_steps_and_no_other(before: JobStatus, after: JobStatus) -> None:
    job = job_in(before, attempts=1)
    if (before, after) in LEGAL:
        moved = advance(job, after)
        claims = 1 if after is PROCESSING else 0
        assert moved == msgspec.structs.replace(job, status=after, claims=claims)
    else:
        with pytest.raises(IllegalTransition, match=f"job an-id: {before.value} → {after.value}"):
            advance(job, after)
    assert job == job_in(before, attempts=1), "a step changes nothing in the job before it"


def test_the_table_covers_every_status_and_terminal_ones_lead_nowhere() -> None:
    assert set(TRANSITIONS) == set(JobStatus)
    assert frozenset({COMPLETED, FAILED}) == TERMINAL
    assert {status for status, onward in TRANSITIONS.items() if not onward} == TERMINAL


def test_the_statuses_are_the_words_of_the_wire() -> None:
    assert [status.value for status in JobStatus] == ["pending", "processing", "completed", "failed"]


def test_a_step_keeps_the_attempts_unless_it_is_told_their_number() -> None:
    job = job_in(PROCESSING, attempts=2)
    assert advance(job, PENDING).attempts == 2
    assert advance(job, PENDING, attempts=3).attempts == 3
    assert advance(job, PENDING, attempts=0).attempts == 0


def test_jobs_cannot_be_changed() -> None:
    finished = completed()
    for struct, field in ((job_in(), "status"), (CALL, "body"), (finished, "status")):
        with pytest.raises(AttributeError):
            setattr(struct, field, FAILED)
    with pytest.raises(AttributeError):
        finished.body = BODY  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["job", "call", "finished"])
def test_no_repr_shows_a_body_or_a_credential(what: str) -> None:
    things = {"job": job_in(), "call": CALL, "finished": completed()}
    text = f"{things[what]!r} {things[what]}"
    assert SECRET not in text
    for hidden in (BODY, HASH, RESULT):
        assert hidden.decode() not in text
    assert "the-body" not in text


def test_the_repr_of_a_job_says_which_one_it_is() -> None:
    assert repr(job_in(PROCESSING)) == "Job('an-id', 'embeddings', processing)"
    assert repr(CALL) == f"Call('embeddings', {len(BODY)} bytes)"


def test_an_illegal_step_shows_no_credential() -> None:
    with pytest.raises(IllegalTransition) as caught:
        advance(job_in(COMPLETED), PENDING)
    for hidden in (SECRET, HASH.decode(), "the-body"):
        assert hidden not in str(caught.value)


def test_an_outcome_has_no_field_for_a_request_body_or_a_credential() -> None:
    """``credential`` is the keyed hash. Whoever adds a field here says why it can hold neither."""
    assert set(Outcome.__struct_fields__) == {
        "id",
        "endpoint",
        "credential",
        "status",
        "status_code",
        "expires_at",
        "envelope",
        "content_head",
        "start",
        "end",
        "content",
        "encoded",
        "parts",
        "part_sizes",
    }
    assert not hasattr(completed(), "__dict__")


@pytest.mark.parametrize("finish", [completed, failed])
def test_neither_the_request_nor_its_headers_outlive_the_job(finish: Callable[[], Outcome]) -> None:
    kept = b"\n".join(
        value if isinstance(value, bytes) else repr(value).encode()
        for value in msgspec.structs.asdict(finish()).values()
    )
    assert SECRET.encode() not in kept
    assert BODY not in kept
    assert b"the-body-of-the-client" not in kept
    assert b"Authorization" not in kept


@pytest.mark.parametrize("headers", [[], [("A", "")], [("A", "1"), ("a", "2: 3"), ("B", "")]])
def test_header_fields_stay_what_they_are(headers: list[tuple[str, str]]) -> None:
    assert msgspec.structs.replace(CALL, head=head_of(headers)).headers == headers


@pytest.mark.parametrize("field", [("A", "1\nB"), ("A\nB", "1"), ("A", "\n")])
def test_no_field_of_a_call_makes_another(field: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="several lines"):
        head_of([("X", "y"), field])


def test_sizes_count_what_a_store_has_to_keep() -> None:
    """Contents to the byte, and what the objects around them take: a thousand tiny ones are not tiny."""
    contents = len(BODY) + len(CALL.head) + len(CALL.target)
    assert contents + 512 < job_in().size + CALL.size < contents + 2048
    longer = msgspec.structs.replace(CALL, body=BODY + b"12345", target=CALL.target + "?a=1")
    assert longer.size == CALL.size + 9
    assert msgspec.structs.replace(job_in(), model="model").size == job_in().size + 4
    finished = completed()
    assert finished.content is None
    contents = len(finished.envelope) + len(finished.content_head)
    assert contents + 512 < finished.size < contents + 2048
    with_content = msgspec.structs.replace(finished, content=b"12345")
    assert with_content.size == finished.size + 5


def test_jobs_share_a_lane_when_a_rate_limit_hits_them_together() -> None:
    job = job_in()
    assert job.lane == Lane("gateway", HASH, "m")
    assert job.lane == msgspec.structs.replace(job, id="another", attempts=2).lane
    others: list[dict[str, Any]] = [{"upstream": "other"}, {"credential": b"other"}, {"model": "other"}]
    lanes = {msgspec.structs.replace(job, **other).lane for other in others}
    assert len(lanes) == 3
    assert job.lane not in lanes


@pytest.mark.parametrize("kind", [Job, Call, Lane, Outcome])
def test_the_garbage_collector_walks_none_of_a_million_jobs(kind: type) -> None:
    job = job_in()
    (instance,) = [thing for thing in (job, CALL, job.lane, completed()) if type(thing) is kind]
    assert not gc.is_tracked(instance)
    assert not instance.__struct_config__.gc, "nor will it, whatever its fields come to hold"
