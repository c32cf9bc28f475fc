"""Jobs and errors as bytes of response bodies. Pure.

The upstream's bytes are spliced into the envelope unchanged. The envelope of a finished job is built
once, at the finish: a poll writes the envelope, and ``/content`` writes a slice of it.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from codecs import BOM_UTF8
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import msgspec

from asyncproxy.core.endpoints import ENDPOINTS
from asyncproxy.core.errors import ApiError, InvalidUpstreamResponse
from asyncproxy.core.jobs import Job, JobStatus, Outcome, UpstreamResponse, check_step
from asyncproxy.wire import json_text
from asyncproxy.wire.headers import CONTENT_LIMIT, response_lines

__all__ = [
    "error_body",
    "error_in",
    "failed",
    "finished",
    "live",
    "spliced_part",
    "spliced_size",
    "timestamp",
    "whole",
]

# Characters kept of an upstream's error that is not in OpenAI's shape, and of a model name in an error.
_MESSAGE_LIMIT: Final = 2000
_MODEL_LIMIT: Final = 256

_BODILESS: Final = frozenset({204, 205})

_FRACTIONS: Final = tuple(f".{milliseconds:03}Z" for milliseconds in range(1000))

# Response header fields that /content writes itself. A Content-Encoding that is still there was not
# undone, and belongs to the body.
_NOT_KEPT: Final = frozenset({"content-length", "date"})
_NOT_KEPT_OF_JSON: Final = _NOT_KEPT | {"content-encoding"}

# A result of this size is kept in parts and not copied into its envelope. The pieces in which the
# result came are its parts. A result of one piece, or of pieces below the second size, is cut anew.
_KEPT_APART: Final = 256 * 1024
_SMALLEST_PART: Final = 32 * 1024

# The size of a part that is cut anew. A multiple of 3, so that the Base64 of the parts can be joined.
_PART: Final = 192 * 1024


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, with milliseconds and a ``Z``."""
    milliseconds = round(seconds * 1000)
    return _second(milliseconds // 1000) + _FRACTIONS[milliseconds % 1000]


@lru_cache(maxsize=256)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def live(job: Job) -> bytes:
    """The envelope of a job that has no outcome yet."""
    return (
        f'{{"id":"{job.id}","status":"{job.status}","created_at":"{timestamp(job.created_at)}"}}'
    ).encode()


def finished(job: Job, answer: UpstreamResponse, *, now: float) -> Outcome:
    """The outcome of ``job``, given the response of its upstream.

    Raises :class:`InvalidUpstreamResponse` if a 2xx response has to be JSON and is not.
    """
    if not 200 <= answer.status < 300:
        error = _upstream_error(job, answer)
        head = response_lines(answer.headers, without=_NOT_KEPT, limit=CONTENT_LIMIT)
        return _finish(job, JobStatus.FAILED, answer.status, error, now, head, *_kept(answer.body))
    pieces = _json_pieces(job, answer)
    if pieces is not None:
        # A body that is JSON text has no content coding, whatever its header fields say.
        head = response_lines(answer.headers, without=_NOT_KEPT_OF_JSON, limit=CONTENT_LIMIT)
        size = sum(map(len, pieces))
        if size >= _KEPT_APART:
            parts = _parts(pieces)
            return _finish(job, JobStatus.COMPLETED, answer.status, b"", now, head, None, parts)
        if size:
            return _finish(job, JobStatus.COMPLETED, answer.status, b"".join(pieces), now, head)
        # Without a body, the result in the envelope is null, and /content is empty.
        return _finish(job, JobStatus.COMPLETED, answer.status, b"null", now, head, b"")
    frame = msgspec.json.encode({"content_type": _media_type(answer), "audio": ""})
    head = response_lines(answer.headers, without=_NOT_KEPT, limit=CONTENT_LIMIT)
    finished = _finish(job, JobStatus.COMPLETED, answer.status, frame, now, head, *_kept(answer.body))
    middle = finished.start + len(frame) - len(b'"}')
    return msgspec.structs.replace(finished, start=middle, end=middle, encoded=True)


def _kept(content: bytes) -> tuple[bytes | None, tuple[bytes, ...]]:
    """The ``content`` and ``parts`` of an outcome: one of them is set, by the size."""
    return (content, ()) if len(content) < _KEPT_APART else (None, _parts((content,)))


def _parts(pieces: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The parts of a large result that arrived in ``pieces``."""
    size = sum(map(len, pieces))
    if len(pieces) > 1 and size >= len(pieces) * _SMALLEST_PART:
        return pieces
    whole = b"".join(pieces)
    return tuple(whole[start : start + _PART] for start in range(0, size, _PART))


def whole(outcome: Outcome) -> bytes:
    """The envelope of an outcome that has no parts, or whose parts are not spliced into it."""
    if not outcome.encoded:
        return outcome.envelope
    middle = b2a_base64(outcome.content or b"", newline=False)
    return outcome.envelope[: outcome.start] + middle + outcome.envelope[outcome.start :]


def spliced_size(outcome: Outcome) -> int:
    """The size of the envelope of an outcome in bytes, with its parts."""
    size = sum(outcome.sizes)
    return len(outcome.envelope) + (4 * ((size + 2) // 3) if outcome.encoded else size)


def spliced_part(outcome: Outcome, part: bytes) -> bytes:
    """A part of an outcome in the form that the envelope has: Base64 if the outcome is ``encoded``."""
    return b2a_base64(part, newline=False) if outcome.encoded else part


def failed(job: Job, error: ApiError, *, now: float) -> Outcome:
    """The failed outcome of ``job`` for an error of the proxy's own."""
    body = _shaped(error.status, _fields(error), _extra_of(job))
    head = b"Content-Type: application/json\r\n"
    return _finish(job, JobStatus.FAILED, error.status, body, now, head)


def _finish(
    job: Job,
    status: JobStatus,
    status_code: int,
    spliced: bytes,
    now: float,
    head: bytes,
    content: bytes | None = None,
    parts: tuple[bytes, ...] = (),
) -> Outcome:
    check_step(job, status)
    expires_at = now + job.ttl_s
    key = "result" if status is JobStatus.COMPLETED else "error"
    extra = b""
    if job.fallback_index is not None:
        extra = b'"extra_fields":%b,' % msgspec.json.encode(_extra_of(job))
    prefix = b"".join(
        (
            f'{{"id":"{job.id}","status":"{status}","created_at":"{timestamp(job.created_at)}",'
            f'"completed_at":"{timestamp(now)}","expires_at":"{timestamp(expires_at)}",'
            f'"status_code":{status_code},'.encode(),
            extra,
            f'"{key}":'.encode(),
        )
    )
    whole = b"".join((prefix, spliced, b"}"))
    return Outcome(
        id=job.id,
        endpoint=job.endpoint,
        credential=job.credential,
        status=status,
        status_code=status_code,
        expires_at=expires_at,
        envelope=whole,
        content_head=head,
        start=len(prefix),
        end=len(whole) - 1,
        content=content,
        parts=parts,
    )


def _media_type(answer: UpstreamResponse) -> str:
    return (answer.header(b"content-type") or "application/json").partition(";")[0].strip().lower()


def _json_pieces(job: Job, answer: UpstreamResponse) -> tuple[bytes, ...] | None:
    """The JSON text of a 2xx response, without a byte order mark. None if the response is media.

    For an endpoint without media the body decides, and not its content type: some gateways send all
    responses as ``text/plain``. Raises :class:`InvalidUpstreamResponse`.
    """
    if answer.status in _BODILESS and not answer.size:
        return ()
    media_type = _media_type(answer)
    subtype = media_type.rpartition("/")[2]
    says_json = subtype == "json" or subtype.endswith("+json")
    if not says_json and ENDPOINTS[job.endpoint].media:
        return None
    pieces = answer.pieces
    if pieces and pieces[0].startswith(BOM_UTF8):
        pieces = (pieces[0].removeprefix(BOM_UTF8), *pieces[1:])
    if answer.checked:
        return pieces
    text = _joined(pieces)
    try:
        json_text.check(text)
    except json_text.InvalidText as error:
        raise InvalidUpstreamResponse(
            f"The upstream answered {answer.status} with a body that is not JSON: {error}."
            if says_json
            else f"The upstream answered {answer.status} with {media_type[:100]}, "
            "where application/json was expected."
        ) from None
    return (text,)


def _joined(pieces: tuple[bytes, ...]) -> bytes:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def error_body(error: ApiError, *, endpoint: str | None = None) -> bytes:
    """The body of an error response, in the shape of the wire contract, section 8."""
    request_type = ENDPOINTS[endpoint].request_type if endpoint else ""
    return _shaped(error.status, _fields(error), _extra(error.provider, error.model, request_type))


def _shaped(status: int, error: dict[str, Any], extra_fields: dict[str, Any]) -> bytes:
    return msgspec.json.encode(
        {
            "is_bifrost_error": False,
            "status_code": status,
            "error": error,
            "extra_fields": extra_fields,
        }
    )


def _fields(error: ApiError) -> dict[str, Any]:
    return {"type": error.type, "code": error.code, "message": error.message, "param": error.param}


def _extra(provider: str, model: str, request_type: str) -> dict[str, Any]:
    return {
        "provider": provider,
        "model_requested": model[:_MODEL_LIMIT],
        "request_type": request_type,
    }


def _extra_of(job: Job) -> dict[str, Any]:
    extra = _extra(job.upstream, job.model, ENDPOINTS[job.endpoint].request_type)
    return extra if job.fallback_index is None else {**extra, "fallback_index": job.fallback_index}


class _OpenAIError(msgspec.Struct):
    message: str
    type: Any = None
    code: Any = None
    param: Any = None


class _OpenAIErrorBody(msgspec.Struct):
    error: _OpenAIError


_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPENAI_ERROR: Final = msgspec.json.Decoder(_OpenAIErrorBody)


def error_in(answer: UpstreamResponse) -> tuple[str, str]:
    """The code and the message of an upstream's error. The code is empty unless it is a short word."""
    given = _given_error(answer)
    code = given.code if isinstance(given.code, str | int) else ""
    return str(code) if _CODE.fullmatch(str(code)) else "", given.message


def _given_error(answer: UpstreamResponse) -> _OpenAIError:
    body = answer.body.removeprefix(BOM_UTF8)
    try:
        return json_text.parse(body, _OPENAI_ERROR).error
    except (json_text.InvalidText, msgspec.ValidationError):
        text = body[: 4 * _MESSAGE_LIMIT].decode("utf-8", "replace").strip()
        message = text[:_MESSAGE_LIMIT] or f"The upstream answered {answer.status} with no body."
        return _OpenAIError(message, type="upstream_error")


def _upstream_error(job: Job, answer: UpstreamResponse) -> bytes:
    given = _given_error(answer)
    error = {
        "type": given.type,
        "code": given.code,
        "message": given.message,
        "param": given.param,
    }
    return _shaped(answer.status, error, _extra_of(job))
