"""The streaming proxy: every request that is not ours goes to the upstream, byte for byte.

Both bodies are streamed. The head of the answer is rebuilt from the upstream's raw header fields, in
their order, so that a client sees what it would have seen without us.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from time import monotonic
from typing import Final

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion10, HttpVersion11

from asyncproxy.core.errors import ApiError, InvalidRequest, MethodNotAllowed, UpgradeNotSupported
from asyncproxy.core.events import Observer, RequestPassed
from asyncproxy.loop.write_coalescing import CoalescingTransport
from asyncproxy.observe.tracing import METHOD, NO_SPAN, PATH, UPSTREAM, Tracer
from asyncproxy.upstream.client import Upstream, describe, translate
from asyncproxy.upstream.model_routes import ModelRoutes
from asyncproxy.upstream.target import loggable
from asyncproxy.web.auth import authenticate, upstream_headers
from asyncproxy.web.body_reader import BodyReader
from asyncproxy.wire import body_fields, headers
from asyncproxy.wire.credentials import KeyRing
from asyncproxy.wire.trace_context import carried, trace_id

__all__ = ["PassThrough"]

# A JSON body up to this size is read before it is sent on, to see which model it asks for.
_SMALL_BODY: Final = 1024 * 1024

_BODILESS: Final = frozenset({204, 304})

_FRAMING: Final = frozenset({b"content-length"})


class PassThrough:
    """Handles what no other route did."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        routes: ModelRoutes,
        body_reader: BodyReader,
        keys: KeyRing,
        observer: Observer,
        tracer: Tracer,
        new_id: Callable[[], str],
    ) -> None:
        self._upstreams = upstreams
        self._routes = routes
        self._body_reader = body_reader
        self._keys = keys
        self._observer = observer
        self._tracer = tracer
        self._new_id = new_id
        self._under_way: set[_Exchange] = set()
        self._all_done = asyncio.Event()
        self._all_done.set()

    @property
    def under_way(self) -> int:
        """How many requests are passing through."""
        return len(self._under_way)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Send a request on, and its answer back."""
        path = request.raw_path
        if not path.startswith("/"):  # the absolute form of a request target
            path = request.rel_url.raw_path_qs or "/"
        return await self.send(request, path)

    async def send(
        self, request: web.BaseRequest, path: str, body: list[bytes] | None = None
    ) -> web.StreamResponse:
        """Send a request on under another path, and take its body from ``body`` if that was read."""
        request_id = request.headers.get("X-Request-Id") or self._new_id()
        exchange = _Exchange(request, path, request_id)
        self._under_way.add(exchange)
        self._all_done.clear()
        try:
            return await self._exchange(request, exchange, path, body)
        except ApiError as error:
            exchange.status, exchange.outcome = error.status, error.code
            exchange.detail = error.detail
            error.provider = exchange.upstream
            raise
        except asyncio.CancelledError:
            exchange.outcome = "client_gone"
            raise
        finally:
            self._under_way.discard(exchange)
            if not self._under_way:
                self._all_done.set()
            exchange.end_span()
            self._observer.request_passed(exchange.event())

    async def drain(self, grace_s: float) -> None:
        """Wait for the requests under way, ``grace_s`` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_done.wait()

    async def _exchange(
        self, request: web.BaseRequest, exchange: _Exchange, path: str, body: list[bytes] | None
    ) -> web.StreamResponse:
        found = authenticate(request, self._keys)
        if request.version < HttpVersion10:
            raise InvalidRequest("HTTP/0.9 does not go through this proxy. Use HTTP/1.1.")
        if request.method in ("TRACE", "CONNECT"):
            # TRACE would echo the headers that we add, and the gateway's key is among them.
            raise MethodNotAllowed(
                f"{request.method} does not go through this proxy.",
                allow="GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS",
            )
        if request.headers.get("Upgrade", "").lower() == "websocket":
            raise UpgradeNotSupported("WebSockets do not go through this proxy yet.")
        if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise InvalidRequest("The only Transfer-Encoding that is understood here is chunked.")
        data, upstream = await self._route(request, path, exchange, body)
        sent = upstream_headers(
            request, self._keys, found[0] if found else None, request_id=exchange.request_id
        )
        exchange.span = self._tracer.start(
            "pass-through",
            request.headers.get("traceparent", ""),
            {METHOD: request.method, PATH: loggable(path), UPSTREAM: upstream.name},
            outward=True,
        )
        if exchange.span.traceparent:
            sent = carried(sent, exchange.span.traceparent)
        length = request.headers.get("Content-Length")
        if length is not None:
            sent.append(("Content-Length", length))
        try:
            # Silence, in either direction, and not the length of the exchange is what ends it.
            async with asyncio.timeout(upstream.total_s) as silence:
                exchange.watch(silence, upstream.total_s)
                async with upstream.stream(request.method, path, sent, data) as answer:
                    data = None  # a stream may last long, and does not need it any more
                    with upstream.watching(answer):
                        return await exchange.relay(answer, gather=len(self._under_way) > 1)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            refusal = exchange.refusal
            if exchange.client_gone:
                exchange.outcome = "client_gone"
                return exchange.break_off()
            if exchange.head_sent:
                exchange.outcome = refusal.code if refusal else "upstream_broke"
                exchange.detail = describe(error)
                return exchange.break_off()
            raise (refusal or translate(error, upstream.name)) from error

    async def _route(
        self, request: web.BaseRequest, path: str, exchange: _Exchange, body: list[bytes] | None
    ) -> tuple[bytes | AsyncIterator[bytes] | None, Upstream]:
        """The body to send on, and where to."""
        data: bytes | AsyncIterator[bytes] | None = None
        model: str | None = None
        if body is not None or request.can_read_body:
            if body is not None:
                data = body.pop()
            elif request.content.is_eof():
                data = request.content.read_nowait()
            elif self._routes.needs_model and self._is_small_json(request):
                data = await self._body_reader.read(request)
            else:
                data = exchange.body(self._body_reader)
            if isinstance(data, bytes):
                exchange.received_bytes = len(data)
            if self._routes.needs_model and path.startswith("/v1/") and isinstance(data, bytes):
                model = body_fields.model_of(data)
        # After the last await: the upstreams may be others than when the request began.
        name = self._routes.first if model is None else self._routes.upstream_for(model)
        exchange.upstream = name
        return data, self._upstreams[name]

    def _is_small_json(self, request: web.BaseRequest) -> bool:
        return (
            request.content_type == "application/json"
            and 0 < (request.content_length or 0) <= min(_SMALL_BODY, self._body_reader.max_bytes)
            and "Content-Encoding" not in request.headers
        )


class _Exchange:
    """One request on its way through, and what the log will say of it."""

    def __init__(self, request: web.BaseRequest, path: str, request_id: str) -> None:
        self.path = path
        self.request_id = request_id
        self.upstream = ""
        self.status = 0
        self.outcome = "ok"
        self.detail = ""
        self.head_sent = False
        self.span = NO_SPAN
        self.received_bytes = 0
        self.refusal: ApiError | None = None
        self._request = request
        self._started = monotonic()
        self._sent_bytes = 0
        self._first_byte_s: float | None = None
        self._silence: asyncio.Timeout | None = None
        self._silence_s = 0.0

    def watch(self, silence: asyncio.Timeout, silence_s: float) -> None:
        """Put ``silence`` off by ``silence_s`` whenever something moves."""
        self._silence, self._silence_s = silence, silence_s

    def _moved(self) -> None:
        if self._silence is not None:
            self._silence.reschedule(asyncio.get_running_loop().time() + self._silence_s)

    @property
    def client_gone(self) -> bool:
        transport = self._request.transport
        return transport is None or transport.is_closing()

    async def body(self, body_reader: BodyReader) -> AsyncIterator[bytes]:
        """The client's body, as it arrives. Read by the client library, which hides our errors."""
        try:
            async for piece in body_reader.pieces(self._request):
                self._moved()
                self.received_bytes += len(piece)
                yield piece
        except ApiError as error:
            self.refusal = error
            if self._silence is not None:  # the exchange ends here, whatever the upstream does
                self._silence.reschedule(asyncio.get_running_loop().time())
            raise

    async def relay(self, answer: aiohttp.ClientResponse, *, gather: bool) -> web.StreamResponse:
        """Write an answer to the client as it arrives."""
        if answer.status < 200:
            raise aiohttp.ClientError(f"unexpected status {answer.status}")
        if answer.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise aiohttp.ClientError("unexpected Transfer-Encoding")
        writer, content = self._request.writer, answer.content
        self.status = answer.status
        has_body = self._request.method != "HEAD" and answer.status not in _BODILESS
        pending, chunked, keep_alive = self._head(answer, has_body=has_body)
        self.head_sent = True
        self._first_byte_s = monotonic() - self._started
        transport = self._request.transport
        # A small one waits for those of others, if there are others.
        soon = transport if gather and isinstance(transport, CoalescingTransport) else None
        # What has arrived with the head leaves with the head: a small answer is one write.
        piece = content.read_nowait() if has_body else b""
        while True:
            self._sent_bytes += len(piece)
            if chunked and piece:
                pending += b"%x\r\n%b\r\n" % (len(piece), piece)
            else:
                pending += piece
            at_end = not has_body or content.at_eof()
            if at_end and chunked:
                pending += b"0\r\n\r\n"
            if at_end and soon is not None:
                soon.write_soon(pending)
            else:
                await writer.write(pending)
            await writer.drain()
            if at_end:
                return _Relayed(keep_alive=keep_alive)
            soon = None
            self._moved()
            pending = b""
            piece = await content.readany()

    def _head(self, answer: aiohttp.ClientResponse, *, has_body: bool) -> tuple[bytes, bool, bool]:
        """The head of the answer to the client, whether its body is chunked, and what comes after."""
        request = self._request
        # After an Upgrade that was not taken up, aiohttp reads no further request (RFC 9110, 7.8).
        keep_alive = request.keep_alive and "Upgrade" not in request.headers
        # A message with both is framed by its Transfer-Encoding (RFC 9112, section 6.3).
        length_known = "Content-Length" in answer.headers and "Transfer-Encoding" not in answer.headers
        chunked = has_body and not length_known and request.version == HttpVersion11
        if has_body and not length_known and not chunked:
            keep_alive = False  # HTTP/1.0: the end of the connection is the end of the body
        lines = [
            f"HTTP/1.1 {answer.status} {answer.reason or ''}\r\n".encode("utf-8", "surrogateescape"),
            headers.response_lines(
                answer.raw_headers, without=frozenset() if length_known else _FRAMING
            ),
        ]
        if chunked:
            lines.append(b"Transfer-Encoding: chunked\r\n")
        if not keep_alive:
            lines.append(b"Connection: close\r\n")
        elif request.version != HttpVersion11:
            lines.append(b"Connection: keep-alive\r\n")
        lines.append(b"\r\n")
        return b"".join(lines), chunked, keep_alive

    def break_off(self) -> web.StreamResponse:
        """End the client's connection so that it cannot take what it has for the whole answer."""
        transport = self._request.transport
        if transport is not None:
            if self._request.version == HttpVersion11:
                transport.close()  # the body is framed: what has arrived still gets there
            else:
                # Nothing frames this body: only a reset tells half of it from all of it.
                connection = transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
        return _Relayed(keep_alive=False)

    def end_span(self) -> None:
        """End the span that was started for it, if one was."""
        failed = "" if self.status < 400 else str(self.status)
        self.span.end(failed if self.outcome == "ok" else self.outcome, self.status)

    def event(self) -> RequestPassed:
        return RequestPassed(
            method=self._request.method,
            path=loggable(self.path),
            upstream=self.upstream,
            status=self.status,
            outcome=self.outcome,
            sent_bytes=self._sent_bytes,
            total_s=monotonic() - self._started,
            request_id=self.request_id,
            detail=self.detail,
            received_bytes=self.received_bytes,
            first_byte_s=self._first_byte_s,
            trace_id=trace_id(self.span.traceparent or self._request.headers.get("traceparent")),
        )


class _Relayed(web.StreamResponse):
    """Tells aiohttp that the answer is written already."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None
