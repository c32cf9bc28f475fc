"""Jobs and errors as the bytes that go over the wire. Pure.

The upstream's bytes are spliced into the envelope as they came, and the envelope of a finished job
is built once, at the finish: a poll writes it, ``/content`` is a slice of it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from asyncproxy import jsontext
from asyncproxy.endpoints import ENDPOINTS
from asyncproxy.errors import ApiError, InvalidUpstreamResponse
from asyncproxy.headers import CONTENT_LIMIT, response_lines
from asyncproxy.jobs import Finished, Job, JobStatus, advance

__all__ = ["Answer", "error_body", "failed", "finished", "live", "timestamp"]

# Characters kept of an upstream's error that has no shape, and of a model name in an error.
_MESSAGE_LIMIT: Final = 2000
_MODEL_LIMIT: Final = 256


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What an upstream answered to a call: its status, raw header fields and decoded body."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> str | None:
        """The first value of a field, or None. ``name`` is lower case."""
        for key, value in self.headers:
            if key.lower() == name:
                return value.decode("latin-1")
        return None


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, with milliseconds and a ``Z``."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def live(job: Job) -> bytes:
    """The envelope of a job that has no outcome yet."""
    return (
        f'{{"id":"{job.id}","status":"{job.status.value}","created_at":"{timestamp(job.created_at)}"}}'
    ).encode()


def finished(job: Job, answer: Answer, *, now: float) -> Finished:
    """The outcome of ``job``, given what its upstream answered.

    Raises :class:`InvalidUpstreamResponse` if a 2xx answer is not the JSON that it has to be.
    """
    head = response_lines(
        answer.headers,
        without=frozenset({b"content-length", b"content-encoding", b"date"}),
        limit=CONTENT_LIMIT,
    )
    if not 200 <= answer.status < 300:
        error = _upstream_error(job, answer)
        return _finish(job, JobStatus.FAILED, answer.status, error, now, head, answer.body)
    _check_json(answer)
    return _finish(job, JobStatus.COMPLETED, answer.status, answer.body or b"null", now, head, None)


def failed(job: Job, error: ApiError, *, now: float) -> Finished:
    """The outcome of ``job`` where there is none of the upstream: our own reason."""
    error.provider, error.model = job.upstream, job.model
    body = error_body(error, endpoint=job.endpoint)
    head = b"Content-Type: application/json\r\n"
    return _finish(job, JobStatus.FAILED, error.status, body, now, head, None)


def _finish(
    job: Job,
    status: JobStatus,
    status_code: int,
    spliced: bytes,
    now: float,
    head: bytes,
    content: bytes | None,
) -> Finished:
    advance(job, status)
    expires_at = now + job.ttl_s
    key = "result" if status is JobStatus.COMPLETED else "error"
    prefix = (
        f'{{"id":"{job.id}","status":"{status.value}","created_at":"{timestamp(job.created_at)}",'
        f'"completed_at":"{timestamp(now)}","expires_at":"{timestamp(expires_at)}",'
        f'"status_code":{status_code},"{key}":'
    ).encode()
    start, end = len(prefix), len(prefix) + len(spliced)
    if status is JobStatus.COMPLETED and status_code == 204:
        end = start  # the envelope says null, /content has no body
    return Finished(
        id=job.id,
        endpoint=job.endpoint,
        credential=job.credential,
        status=status,
        status_code=status_code,
        expires_at=expires_at,
        envelope=b"".join((prefix, spliced, b"}")),
        content_head=head,
        start=start,
        end=end,
        content=content,
    )


def _check_json(answer: Answer) -> None:
    if not answer.body and answer.status in (204, 205):
        return
    media_type = (answer.header(b"content-type") or "application/json").partition(";")[0].strip()
    subtype = media_type.lower().rpartition("/")[2]
    if subtype != "json" and not subtype.endswith("+json"):
        raise InvalidUpstreamResponse(
            f"The upstream answered {answer.status} with {media_type[:100]}, "
            "where application/json was expected."
        )
    try:
        jsontext.check(answer.body)
    except jsontext.InvalidText as error:
        raise InvalidUpstreamResponse(
            f"The upstream answered {answer.status} with a body that is not JSON: {error}."
        ) from None


def error_body(error: ApiError, *, endpoint: str | None = None) -> bytes:
    """An error of ours in the one shape of the wire contract, section 8."""
    return _error_body(
        error.status,
        {
            "type": error.type,
            "code": error.code,
            "message": error.message,
            "param": error.param,
        },
        provider=error.provider,
        model=error.model,
        endpoint=endpoint,
    )


def _error_body(
    status: int, error: dict[str, Any], *, provider: str, model: str, endpoint: str | None
) -> bytes:
    return msgspec.json.encode(
        {
            "is_bifrost_error": False,
            "status_code": status,
            "error": error,
            "extra_fields": {
                "provider": provider,
                "model_requested": model[:_MODEL_LIMIT],
                "request_type": ENDPOINTS[endpoint].request_type if endpoint else "",
            },
        }
    )


class _OpenAIError(msgspec.Struct):
    message: str
    type: Any = None
    code: Any = None
    param: Any = None


class _OpenAIErrorBody(msgspec.Struct):
    error: _OpenAIError


_OPENAI_ERROR: Final = msgspec.json.Decoder(_OpenAIErrorBody)


def _upstream_error(job: Job, answer: Answer) -> bytes:
    try:
        given = _OPENAI_ERROR.decode(answer.body).error
        error = {
            "type": given.type,
            "code": given.code,
            "message": given.message,
            "param": given.param,
        }
    except (msgspec.DecodeError, RecursionError):
        text = answer.body[: 4 * _MESSAGE_LIMIT].decode("utf-8", "replace").strip()
        message = text[:_MESSAGE_LIMIT] or f"The upstream answered {answer.status} with no body."
        error = {"type": "upstream_error", "code": None, "message": message, "param": None}
    return _error_body(
        answer.status, error, provider=job.upstream, model=job.model, endpoint=job.endpoint
    )
