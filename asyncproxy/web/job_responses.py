"""Jobs as HTTP answers: the envelope, and the upstream's own response."""

from __future__ import annotations

from typing import Final

from asyncproxy.core.jobs import Job, Outcome
from asyncproxy.web.wire_response import JSON, WireResponse, json_response
from asyncproxy.wire import envelope

__all__ = ["REPLAYED", "error_of", "header", "own_response", "pending", "terminal"]

# The header line that tells a job that was there already from a new one.
REPLAYED: Final = b"Idempotency-Replayed: true\r\n"


def header(name: str, value: object) -> bytes:
    """A header line. Neither may come from a client."""
    return f"{name}: {value}\r\n".encode()


def pending(job: Job, retry_after_s: int, *, status: int = 202, lines: bytes = b"") -> WireResponse:
    """The envelope of a job that has no outcome yet."""
    lines = b"%bRetry-After: %d\r\n%b" % (JSON, retry_after_s, lines)
    return WireResponse(status, lines, envelope.live(job))


def terminal(outcome: Outcome, *, lines: bytes = b"") -> WireResponse:
    """The envelope of an outcome, as it was built when the job ended."""
    response = json_response(200, outcome.envelope, lines=lines)
    if outcome.encoded or outcome.pieces:
        response.stream(envelope.size(outcome), lambda: envelope.pieces(outcome))
    return response


def own_response(outcome: Outcome) -> WireResponse:
    """The upstream's own response: its status, end-to-end headers and bytes."""
    if outcome.pieces:
        response = WireResponse(outcome.status_code, outcome.content_head, b"")
        response.stream(outcome.pieces_size, lambda: outcome.pieces)
        return response
    spliced = memoryview(outcome.envelope)[outcome.start : outcome.end]
    body = spliced if outcome.content is None else outcome.content
    return WireResponse(outcome.status_code, outcome.content_head, body)


def error_of(outcome: Outcome) -> WireResponse:
    """The ``error`` of a failed job, with its status."""
    return json_response(outcome.status_code, memoryview(outcome.envelope)[outcome.start : outcome.end])
