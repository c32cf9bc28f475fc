"""Jobs as HTTP responses: the envelope, and the upstream's own response."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Final, Protocol

from aiohttp import web
from multidict import istr

from asyncproxy.core.jobs import Job, JobStatus, Outcome
from asyncproxy.web.wire_response import JSON, WireResponse, json_response
from asyncproxy.wire import envelope
from asyncproxy.wire.byte_range import byte_range
from asyncproxy.wire.request_target import forwarded_prefix

__all__ = [
    "NO_STORE",
    "REPLAYED",
    "content",
    "error_of",
    "header",
    "location",
    "own_response",
    "pending",
    "terminal",
]

# The header line for a job that an earlier request has made.
REPLAYED: Final = b"Idempotency-Replayed: true\r\n"

# A response about a job is for one client and one moment, whatever the gateway's caching headers say.
NO_STORE: Final = b"Cache-Control: no-store\r\n"

_RANGES: Final = b"Accept-Ranges: bytes\r\n"

# The proxy has already retried the job. An SDK that repeats a final failure would multiply the retries.
_FINAL: Final = b"x-should-retry: false\r\n"

# RFC 9111, RFC 9213 (`CDN-Cache-Control` is stronger than `Cache-Control`), and older fields. And the
# gateway's own `Accept-Ranges`.
_ABOUT_CACHING: Final = re.compile(
    rb"^(?:(?:[a-z0-9]+-){0,3}cache-control|expires|surrogate-control|accept-ranges):[^\n]*\n",
    re.IGNORECASE | re.MULTILINE,
)
_ABOUT_RETRYING: Final = re.compile(
    rb"^(?:retry-after|retry-after-ms|x-should-retry):[^\n]*\n", re.IGNORECASE | re.MULTILINE
)

_FORWARDED_PREFIX: Final = istr("X-Forwarded-Prefix")


class Read(Protocol):
    """Reads the content of an outcome in parts, from the byte ``start`` on: :attr:`JobService.read`."""

    def __call__(self, outcome: Outcome, start: int = 0, /) -> AsyncIterator[bytes]: ...


def header(name: str, value: object) -> bytes:
    """A header line with its CRLF. Name and value must not contain a line break."""
    return f"{name}: {value}\r\n".encode()


def location(request: web.BaseRequest, asked: str, path: str) -> bytes:
    """The ``Location`` line of a 202: ``path``, with the prefix that the client has to put before it.

    ``asked`` is the path of the route of ``request``. In a sub-application, the path of the request has
    the mount path before ``asked``.
    """
    prefix = forwarded_prefix(request.headers.get(_FORWARDED_PREFIX))
    if isinstance(request, web.Request):
        prefix += request.rel_url.raw_path.removesuffix(asked)
    return header("Location", prefix + path)


def pending(job: Job, retry_after_s: int, *, status: int = 202, lines: bytes = b"") -> WireResponse:
    """The envelope of a live job."""
    lines = b"%bRetry-After: %d\r\n%b" % (JSON, retry_after_s, lines)
    return WireResponse(status, lines, envelope.live(job))


def terminal(outcome: Outcome, read: Read, *, lines: bytes = b"") -> WireResponse:
    """The envelope of an outcome, as it was built when the job ended."""
    if not outcome.sizes or not outcome.is_spliced:
        return json_response(200, envelope.whole(outcome), lines=lines)
    response = json_response(200, b"", lines=lines)
    response.stream(envelope.spliced_size(outcome), lambda: _spliced(outcome, read))
    return response


async def _spliced(outcome: Outcome, read: Read) -> AsyncIterator[bytes]:
    parts = read(outcome)
    first = await anext(parts)  # before the envelope begins: an error can still be answered
    yield outcome.envelope[: outcome.start]
    yield envelope.spliced_part(outcome, first)
    async for part in parts:
        yield envelope.spliced_part(outcome, part)
    yield outcome.envelope[outcome.start :]


def own_response(outcome: Outcome, read: Read) -> WireResponse:
    """The upstream's own response: its status, end-to-end headers and bytes."""
    lines = _content_lines(outcome)
    if outcome.sizes:
        response = WireResponse(outcome.status_code, lines, b"")
        response.stream(sum(outcome.sizes), lambda: read(outcome))
        return response
    return WireResponse(outcome.status_code, lines, _body(outcome))


def content(outcome: Outcome, read: Read, asked: str | None) -> WireResponse:
    """The upstream's own response, or the bytes of it that the ``Range`` field ``asked`` names.

    Raises :class:`RangeNotSatisfiable`. Only what the upstream answered with ``200`` has ranges.
    """
    if outcome.status_code != HTTPStatus.OK:
        return own_response(outcome, read)
    size = sum(outcome.sizes) or len(_body(outcome))
    found = byte_range(asked, size)
    if found is None:
        response = own_response(outcome, read)
        response.lines += _RANGES
        return response
    lines = _content_lines(outcome) + _RANGES
    lines += header("Content-Range", f"bytes {found.start}-{found.stop - 1}/{size}")
    if not outcome.sizes:
        return WireResponse(206, lines, memoryview(_body(outcome))[found.start : found.stop])
    response = WireResponse(206, lines, b"")
    response.stream(len(found), lambda: _first(len(found), read(outcome, found.start)))
    return response


def _body(outcome: Outcome) -> bytes | memoryview:
    """The content of an outcome that is in one piece."""
    if outcome.content is None:
        return memoryview(outcome.envelope)[outcome.start : outcome.end]
    return outcome.content


async def _first(size: int, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece[:size]
        size -= len(piece)
        if size <= 0:
            return


def _content_lines(outcome: Outcome) -> bytes:
    """The upstream's header lines, without those about caching and about retries."""
    lines = NO_STORE + _ABOUT_CACHING.sub(b"", outcome.content_head)
    if outcome.status is JobStatus.COMPLETED:
        return lines
    return _FINAL + _ABOUT_RETRYING.sub(b"", lines)


def error_of(outcome: Outcome) -> WireResponse:
    """The ``error`` of a failed job, with its status."""
    error = memoryview(outcome.envelope)[outcome.start : outcome.end]
    return json_response(outcome.status_code, error, lines=_FINAL)
