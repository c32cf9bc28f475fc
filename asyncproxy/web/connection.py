"""One client connection. Only this module and ``wire_response`` use aiohttp's private server names.

``tests/web/test_aiohttp_names.py`` lists these names, and what each of them buys.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import aiohttp.http_parser
from aiohttp import StreamReader, web
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError, InvalidURLError

from asyncproxy.core.errors import ApiError, InternalError, InvalidRequest, Overloaded
from asyncproxy.loop.write_coalescing import CoalescingTransport, WriteCoalescer
from asyncproxy.web.wire_response import Response, error_response
from asyncproxy.wire.envelope import error_body

__all__ = ["Connection", "EdgeServer", "connection_options", "parser_is_lax"]

logger = logging.getLogger(__name__)

# Responses that may wait for each other: two milliseconds of work for a busy core.
_ANSWERS_AT_ONCE: Final = 64

# Limits of a request head: bytes per line, and lines. A larger head is refused.
_MAX_LINE: Final = 32 * 1024
_MAX_HEADERS: Final = 256

_READ_BUFFER: Final = 64 * 1024

# A load balancer that keeps idle connections for `client_timeout` must close them first. If the proxy
# closed them, the load balancer would answer 502 to a request that crosses the close on the wire.
_KEEPALIVE_FACTOR: Final = 1.25

# Seconds for a refused client to send its request and to read the response.
_PATIENCE_S: Final = 2.0

# A method that is any token (RFC 9110, section 9.1), and a target. Both have limits elsewhere too.
_REQUEST_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}) [^\s]+ HTTP/1\.[01]\r\n")

# The part of a parser's message that quotes the client. A quoted 'Host' is a field's name, and stays.
_QUOTED: Final = re.compile(r"[:\s]+(?:bytearray\()?b?['\"](?!Host').*", re.DOTALL)


def connection_options(client_timeout_s: float) -> dict[str, Any]:
    """The options of aiohttp for client connections, in our own server and in an application."""
    return {
        "access_log": None,  # the proxy's log has one line per job and per request passed through
        "auto_decompress": False,  # a compressed body passes through unchanged
        "keepalive_timeout": client_timeout_s * _KEEPALIVE_FACTOR,
        "max_line_size": _MAX_LINE,
        "max_field_size": _MAX_LINE,
        "max_headers": _MAX_HEADERS,
        "read_bufsize": _READ_BUFFER,
    }


def parser_is_lax() -> bool:
    """Whether aiohttp uses its Python parser, which accepts messages that a strict parser refuses."""
    parsers = aiohttp.http_parser
    return parsers.HttpRequestParser is parsers.HttpRequestParserPy


class EdgeServer(web.Server):
    """A server that makes a :class:`Connection` for each client, and limits their number.

    ``answer`` handles each request. A client may send nothing of a request, or take nothing of its
    response, for ``client_timeout_s``. A connection beyond ``max_connections`` gets a 503 and closes.
    """

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[Response]],
        *,
        client_timeout_s: float,
        max_connections: int,
    ) -> None:
        super().__init__(
            # A connection needs no more of a response than a WireResponse has.
            cast("Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]", answer),
            request_factory=self._request,
            handler_cancellation=True,  # the upstream call ends when its client leaves
        )
        self.client_timeout_s = client_timeout_s
        self.coalescer = WriteCoalescer(_ANSWERS_AT_ONCE)
        self.loop = asyncio.get_running_loop()
        self._options = connection_options(client_timeout_s)
        self._max_connections = max_connections
        self._open = 0
        self._turned_away = 0

    def __call__(self) -> Connection:
        return Connection(self, loop=self.loop, **self._options)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        self._open += 1
        super().connection_made(handler, transport)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self._open -= 1
        super().connection_lost(handler, exc)

    def turn_away(self, transport: asyncio.Transport) -> bool:
        """Refuse a connection beyond ``max_connections``. False: the connection is accepted."""
        if self._open < self._max_connections:
            return False
        if self._turned_away >= self._max_connections:
            transport.set_protocol(asyncio.Protocol())
            transport.abort()  # a flood: even a refusal costs too much
            return True
        if not self._turned_away:
            logger.warning("new connections are refused: there are %d", self._open)
        self._turned_away += 1
        refusal = _Refusal(self._turned_back)
        transport.set_protocol(refusal)
        refusal.connection_made(transport)
        return True

    def _turned_back(self) -> None:
        self._turned_away -= 1

    def _request(
        self, message: Any, payload: StreamReader, protocol: Any, writer: Any, task: Any
    ) -> web.BaseRequest:
        kind = _LastRequest if message.chunked or protocol.other_method else web.BaseRequest
        return kind(message, payload, protocol, writer, task, self.loop)


class _LastRequest(web.BaseRequest):
    """A request after which the connection closes.

    aiohttp 3.14 takes the last field of a trailer for the first field of the next request on the
    connection, which may be another client's. So no request may follow.
    """

    @property
    def keep_alive(self) -> bool:
        return False

    @property
    def method(self) -> str:
        connection = self.protocol
        assert isinstance(connection, Connection)
        return connection.other_method or super().method


class Connection(web.RequestHandler):
    """One client connection.

    A request that cannot be parsed gets an error in the shape of the wire contract. The kernel cuts off
    a client that does not read its response for ``client_timeout_s``. Otherwise the response would stay
    in memory for ever, outside of all limits, and a close would not reach the client either.
    ``last_head`` belongs to :class:`~asyncproxy.web.request_heads.RequestHeads`.
    """

    __slots__ = ("_options", "_server", "_unwanted", "last_head", "other_method")

    def __init__(self, server: EdgeServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._options = options
        self.other_method = ""  # a method that aiohttp's parser does not know
        self._unwanted: StreamReader | None = None  # the body of a request that was already answered
        self.last_head: object = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server, inner = self._server, cast("asyncio.Transport", transport)
        if server.turn_away(inner):
            return
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            milliseconds = max(1, int(server.client_timeout_s * 1000))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        super().connection_made(CoalescingTransport(inner, server.coalescer))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._unwanted is not None:
            self._drop_unwanted()
        queue = self._messages
        if queue and isinstance(error := getattr(queue[-1][0], "exc", None), BadHttpMethod):
            self._read_other_method(data, error)

    def eof_received(self) -> None:
        # The transport closes itself next, even if the client has only closed its sending side.
        if isinstance(self.transport, CoalescingTransport):
            self.transport.flush()
        super().eof_received()

    def _read_other_method(self, data: bytes, error: BadHttpMethod) -> None:
        """Parse a request whose method the parser does not know: as a POST, with a new parser.

        The head has to be in ``data``, and no other request may be under way. The connection closes
        after the request.
        """
        line = _REQUEST_LINE.match(data)
        if line is None or len(self._messages) > 1 or self._current_request is not None:
            return
        parser, options = self._parser, self._options
        self._parser = aiohttp.http_parser.HttpRequestParser(
            self,
            options["loop"],
            options["read_bufsize"],
            max_line_size=options["max_line_size"],
            max_field_size=options["max_field_size"],
            max_headers=options["max_headers"],
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
        )
        refusal = self._messages.pop()
        with contextlib.suppress(HttpProcessingError):
            messages, _, _ = self._parser.feed_data(b"POST" + data[line.end(1) :])
            self._messages.extend(messages[:1])
        if self._messages:
            self.other_method = line[1].decode()
        else:
            self._parser = parser
            self._messages.append(refusal)

    def finish_response(self, request: web.BaseRequest, resp: Any, start_time: float | None) -> Any:
        # aiohttp reads the rest of a body after the response, for ten seconds: a reset would overtake
        # the response. The bytes of thousands of clients must not wait in memory for that reading.
        if not request.content.is_eof():
            self._unwanted = request.content
            self._drop_unwanted()
        return super().finish_response(request, resp, start_time)

    def _drop_unwanted(self) -> None:
        body = self._unwanted
        assert body is not None
        if body.is_eof():
            self._unwanted = None
        if body._buffer and body.exception() is None:  # noqa: SLF001  read_nowait() raises for a reader that waits
            body.read_nowait()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> Any:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, it can only be broken off")
        error: ApiError
        if status == 400:
            reason = _reason(exc, message or "")
            error = InvalidRequest(f"This is not HTTP as it should be: {reason}.")
            logger.debug("a request from %s cannot be read: %s", request.remote, reason)
        else:
            error = InternalError("An error inside the proxy. Its log says more.")
            logger.error("an error inside the proxy", exc_info=exc)
        return error_response(error, error_body(error), close=True)


def _reason(exc: BaseException | None, message: str) -> str:
    """A parser's error message, without its quotes of the request: a credential may be in them."""
    if isinstance(exc, InvalidURLError):
        return "its target is no URL"
    return _QUOTED.sub("", message.strip(" :").partition("\n")[0]).strip(" :.")[:200] or "unreadable"


class _Refusal(asyncio.Protocol):
    """Answers 503 to a client that sends something, and closes. ``gone`` is called at the end."""

    def __init__(self, gone: Callable[[], None]) -> None:
        self._gone = gone
        self._answered = False
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return  # a close now would overtake the response
        self._answered = True
        error = Overloaded("There are too many connections. Try again in a moment.", retry_after_s=1)
        body = error_body(error)
        head = error_response(error, body, close=True).head()
        self._transport.write(head if data.startswith(b"HEAD ") else head + body)
        self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._gone()
