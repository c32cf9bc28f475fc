"""One request that passes through: its silence, and its fields for the log."""

from __future__ import annotations

import asyncio
from time import monotonic

from aiohttp import web

from asyncproxy.core.events import RequestPassed
from asyncproxy.observe.tracing import NO_SPAN
from asyncproxy.upstream.target import loggable
from asyncproxy.wire.trace_context import trace_id

__all__ = ["PassedRequest"]


class PassedRequest:
    """The record of a request that passes through.

    ``status`` is the status that the client got, 0 if it got none. ``outcome`` and ``detail`` are for
    the log. ``head_sent``: the response has begun, so an error can only break it off.
    """

    def __init__(self, request: web.BaseRequest, path: str, request_id: str) -> None:
        self.request = request
        self.path = path
        self.request_id = request_id
        self.client = ""
        self.upstream = ""
        self.status = 0
        self.outcome = "ok"
        self.detail = ""
        self.span = NO_SPAN
        self.received_bytes = 0
        self.sent_bytes = 0
        self._started = monotonic()
        self._first_byte_s: float | None = None
        self._silence: asyncio.Timeout | None = None
        self._silence_s = 0.0

    @property
    def head_sent(self) -> bool:
        return self._first_byte_s is not None

    @property
    def client_gone(self) -> bool:
        transport = self.request.transport
        return transport is None or transport.is_closing()

    def begin_response(self, status: int) -> None:
        """Note that the response head is written next."""
        self.status = status
        self._first_byte_s = monotonic() - self._started

    def watch(self, silence: asyncio.Timeout, silence_s: float) -> None:
        """Set ``silence`` to ``silence_s`` from now whenever bytes move."""
        self._silence, self._silence_s = silence, silence_s

    def moved(self) -> None:
        """Note that bytes have moved, in either direction."""
        if self._silence is not None:
            self._silence.reschedule(asyncio.get_running_loop().time() + self._silence_s)

    def end_span(self) -> None:
        """End the span of the request, if one was started."""
        failed = "" if self.status < 400 else str(self.status)
        self.span.end(failed if self.outcome == "ok" else self.outcome, self.status)

    def event(self) -> RequestPassed:
        return RequestPassed(
            method=self.request.method,
            path=loggable(self.path),
            upstream=self.upstream,
            status=self.status,
            outcome=self.outcome,
            sent_bytes=self.sent_bytes,
            total_s=monotonic() - self._started,
            request_id=self.request_id,
            detail=self.detail,
            received_bytes=self.received_bytes,
            first_byte_s=self._first_byte_s,
            client=self.client,
            trace_id=trace_id(self.span.traceparent or self.request.headers.get("traceparent")),
        )
