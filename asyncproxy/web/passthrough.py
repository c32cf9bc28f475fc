"""The streaming proxy: every request that no other route takes goes to the upstream, byte for byte.

Both bodies are streamed. The response head has the upstream's raw header fields in their order, so a
client sees the same response as without the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Final
from urllib.parse import parse_qs

from aiohttp import web
from aiohttp.http import HttpVersion10

from asyncproxy.core.errors import ApiError, CallError, InvalidRequest, MethodNotAllowed
from asyncproxy.core.events import Observer
from asyncproxy.observe.tracing import METHOD, PATH, UPSTREAM, Tracer
from asyncproxy.upstream.client import Upstream
from asyncproxy.upstream.exchange import RequestBody
from asyncproxy.upstream.model_routes import ModelRoutes
from asyncproxy.upstream.target import loggable
from asyncproxy.web.auth import authenticate, upstream_headers
from asyncproxy.web.body_reader import BodyReader
from asyncproxy.web.passed_request import PassedRequest
from asyncproxy.web.passed_response import break_off, relay
from asyncproxy.web.tunnel import UPGRADE, tunnel, wants_tunnel
from asyncproxy.wire import body_fields
from asyncproxy.wire.credentials import KeyRing
from asyncproxy.wire.headers import raw_lines

__all__ = ["PassThrough"]

# A JSON body up to this size, in bytes, is read before it is forwarded, to find its model.
_SMALL_BODY: Final = 1024 * 1024

_NONE: Final = frozenset[str]()
_TRACEPARENT: Final = frozenset({"traceparent"})


class PassThrough:
    """Handles the requests that no other route takes."""

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
        self._under_way: set[PassedRequest] = set()
        self._all_done = asyncio.Event()
        self._all_done.set()

    @property
    def under_way(self) -> int:
        """How many requests are passing through."""
        return len(self._under_way)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Forward a request, and its response back."""
        path = request.raw_path
        if not path.startswith("/"):  # the absolute form of a request target
            path = request.rel_url.raw_path_qs or "/"
        return await self.send(request, path)

    async def send(
        self, request: web.BaseRequest, path: str, body: list[bytes] | None = None
    ) -> web.StreamResponse:
        """Forward a request under another path. A body that was already read is taken from ``body``."""
        request_id = request.headers.get("X-Request-Id") or self._new_id()
        passed = PassedRequest(request, path, request_id)
        self._under_way.add(passed)
        self._all_done.clear()
        try:
            return await self._pass(passed, body)
        except ApiError as error:
            error.provider = passed.upstream
            if passed.head_sent:
                broke = isinstance(error, CallError) and passed.status != 101
                passed.outcome = "upstream_broke" if broke else error.code
            else:
                passed.status, passed.outcome = error.status, error.code
            passed.detail = error.detail
            # aiohttp reads no further request after an Upgrade that was not accepted.
            error.close = error.close or "Upgrade" in request.headers
            if isinstance(error, CallError) and passed.client_gone:
                passed.outcome = "client_gone"
            elif not passed.head_sent:
                raise
            return break_off(request)
        except ConnectionError:  # while the client was written to
            passed.outcome = "client_gone"
            return break_off(request)
        except asyncio.CancelledError:
            if passed.status != 101:  # either side may end a tunnel
                passed.outcome = "client_gone"
            raise
        finally:
            self._under_way.discard(passed)
            if not self._under_way:
                self._all_done.set()
            passed.end_span()
            self._observer.request_passed(passed.event())

    async def drain(self, grace_s: float) -> None:
        """Wait for the requests under way, ``grace_s`` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_done.wait()

    async def _pass(self, passed: PassedRequest, read: list[bytes] | None) -> web.StreamResponse:
        request = passed.request
        found = authenticate(request, self._keys)
        passed.client = self._keys.fingerprint(found)
        _check(request)
        upgrade = wants_tunnel(request)
        body = await self._body(passed, read)
        # After the last await: a reload may have replaced the upstreams since the request began.
        upstream = self._upstream(passed, body)
        length = request.headers.get("Content-Length")
        passed.span = self._tracer.start(
            "pass-through",
            request.headers.get("traceparent", ""),
            {METHOD: request.method, PATH: loggable(passed.path), UPSTREAM: upstream.name},
            outward=True,
        )
        traceparent = passed.span.traceparent
        lines = raw_lines(
            upstream_headers(
                request,
                self._keys,
                found[0] if found else None,
                request_id=passed.request_id,
                without=upstream.overridden | (_TRACEPARENT if traceparent else _NONE),
            )
        )
        if traceparent:
            lines += b"traceparent: %b\r\n" % traceparent.encode()
        exchange = upstream.exchange(
            request.method,
            passed.path,
            lines + UPGRADE if upgrade else lines,
            body,
            length=None if length is None else int(length),
            upgrade=upgrade,
        )
        del body  # a stream may last long and no longer needs the body
        try:
            # The timeout limits the silence in both directions, and not the length of the exchange.
            async with asyncio.timeout(upstream.total_s) as silence:
                passed.watch(silence, upstream.total_s)
                async with exchange:
                    if exchange.status == 101:
                        return await tunnel(passed, exchange)
                    return await relay(passed, exchange, gather=len(self._under_way) > 1)
        except TimeoutError as error:
            raise upstream.timed_out(error) from error

    def _upstream(self, passed: PassedRequest, body: RequestBody) -> Upstream:
        model: str | None = None
        if self._routes.needs_model and passed.path.startswith("/v1/"):
            if isinstance(body, bytes) and body:
                model = body_fields.model_of(body)
            elif wants_tunnel(passed.request):  # the realtime API has the model in the query
                query = parse_qs(passed.path.partition("?")[2], max_num_fields=100)
                model = query.get("model", [None])[0]
        passed.upstream = self._routes.first if model is None else self._routes.upstream_for(model)
        return self._upstreams[passed.upstream]

    async def _body(self, passed: PassedRequest, read: list[bytes] | None) -> RequestBody:
        """The body to forward: bytes if all of it has arrived or has to be read for its model."""
        request = passed.request
        if read is not None:
            body = read.pop()
        elif not request.can_read_body:
            return b""
        elif request.content.is_eof():
            body = request.content.read_nowait()
        elif self._routes.needs_model and passed.path.startswith("/v1/") and _may_be_json(request):
            body, rest = await self._body_reader.begin(request, _SMALL_BODY)
            if rest is not None:
                return _counted(passed, body, rest)
        else:
            return _counted(passed, b"", self._body_reader.pieces(request))
        passed.received_bytes = len(body)
        return body


def _check(request: web.BaseRequest) -> None:
    """Raise an error for a request that must not, or cannot, be forwarded."""
    if request.version < HttpVersion10:
        raise InvalidRequest("HTTP/0.9 does not go through this proxy. Use HTTP/1.1.")
    if request.method in ("TRACE", "CONNECT"):
        # TRACE would echo the headers that the proxy adds. The gateway's key is among them.
        raise MethodNotAllowed(
            f"{request.method} does not go through this proxy.",
            allow="GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS",
        )
    if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
        raise InvalidRequest("The only Transfer-Encoding that is understood here is chunked.")


def _may_be_json(request: web.BaseRequest) -> bool:
    """Whether a body may name a model. The content type does not decide: `curl -d` sends another."""
    return (
        not request.content_type.startswith("multipart/")
        and (request.content_length or 0) <= _SMALL_BODY
        and "Content-Encoding" not in request.headers
    )


async def _counted(
    passed: PassedRequest, beginning: bytes, rest: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """A client's body as it arrives, each piece counted."""
    if beginning:
        passed.received_bytes += len(beginning)
        yield beginning
        del beginning
    async with contextlib.aclosing(rest) as pieces:
        async for piece in pieces:
            passed.moved()
            passed.received_bytes += len(piece)
            yield piece
