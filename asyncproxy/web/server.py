"""Listens: aiohttp's server, with our error shape for what is not even HTTP."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from asyncproxy.core.errors import ApiError, InternalError, InvalidRequest, StartupError
from asyncproxy.loop.write_coalescing import CoalescingTransport, WriteCoalescer
from asyncproxy.web.fast_path import DIRECTORY, install_fast_path
from asyncproxy.web.request_heads import HeadCachingConnection
from asyncproxy.web.wire_response import error_response
from asyncproxy.wire.credentials import without_quotes
from asyncproxy.wire.envelope import error_body

__all__ = ["connections", "listening"]

logger = logging.getLogger(__name__)

# Connections that may wait to be accepted: a fleet of workers that starts at once.
_BACKLOG = 4096

# Answers that may wait for each other: two milliseconds of a busy core.
_ANSWERS_AT_ONCE = 64


class _Connection(HeadCachingConnection):
    """One client connection.

    Answers a request that cannot be parsed in our error shape. A client that does not take what it
    asked for is cut off after ``send_timeout_s``, by the kernel: its answer would be kept for ever
    otherwise, outside of all limits, and no close of ours would get through to it either.
    """

    __slots__ = ("_cork", "_send_timeout_s")

    def __init__(
        self, manager: web.Server, *, send_timeout_s: float, cork: WriteCoalescer, **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._send_timeout_s = send_timeout_s
        self._cork = cork

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            milliseconds = max(1, int(self._send_timeout_s * 1000))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        super().connection_made(CoalescingTransport(cast("asyncio.Transport", transport), self._cork))

    def eof_received(self) -> None:
        # The transport closes itself next, also if the client only has nothing more to say.
        if isinstance(self.transport, CoalescingTransport):
            self.transport.flush()
        super().eof_received()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, it can only be broken off")
        error: ApiError
        if status == 400:
            reason = without_quotes(message or "")
            error = InvalidRequest(f"This is not HTTP as it should be: {reason or 'unreadable'}.")
            logger.debug("a request from %s cannot be read: %r", request.remote, reason)
        else:
            error = InternalError("An error inside the proxy. Its log says more.")
            logger.error("an error inside the proxy", exc_info=exc)
        return error_response(error, error_body(error), close=True)


class _Site(web.BaseSite):
    """A TCP site whose connections are ours."""

    def __init__(
        self,
        runner: web.AppRunner,
        host: str | None,
        port: int,
        connection: Callable[[], RequestHandler],
        *,
        reuse_port: bool,
    ) -> None:
        super().__init__(runner, backlog=_BACKLOG)
        self._reuse_port = reuse_port
        self._connection = connection
        self._host = host
        self._port = port

    @property
    def name(self) -> str:
        return f"http://{self._host or '0.0.0.0'}:{self._port}"  # noqa: S104  a label

    async def start(self) -> None:
        await super().start()
        self._server = await asyncio.get_running_loop().create_server(
            self._connection,
            self._host,
            self._port,
            backlog=self._backlog,
            reuse_address=True,
            reuse_port=self._reuse_port or None,
        )


def connections(runner: web.AppRunner, *, send_timeout_s: float) -> Callable[[], RequestHandler]:
    """What makes a connection to the application of ``runner``, which is set up."""
    server = runner.server
    assert server is not None
    if (directory := runner.app.get(DIRECTORY)) is not None:
        install_fast_path(server, directory)
    return functools.partial(
        _Connection,
        server,
        loop=asyncio.get_running_loop(),
        send_timeout_s=send_timeout_s,
        cork=WriteCoalescer(_ANSWERS_AT_ONCE),
        **server._kwargs,  # noqa: SLF001  as Server.__call__ does
    )


@asynccontextmanager
async def listening(
    app: web.Application,
    host: str | None,
    port: int,
    *,
    send_timeout_s: float = 60.0,
    reuse_port: bool = False,
) -> AsyncIterator[str]:
    """Serve ``app`` for the length of a ``with``, which gets the URL that it listens on.

    ``send_timeout_s``: how long a client may take nothing of an answer that is ready for it.
    ``reuse_port``: other processes listen on this address too, and want to.
    Raises :class:`StartupError` if the address cannot be listened on.
    """
    # Handlers get their grace while we still listen; what is left after it is cut off.
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0, access_log=None)
    await runner.setup()
    try:
        connection = connections(runner, send_timeout_s=send_timeout_s)
        try:
            await _Site(runner, host, port, connection, reuse_port=reuse_port).start()
        except OSError as error:
            # The loop puts the address into strerror; the number says why in the system's words.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise StartupError(f"cannot listen on {host or '*'}:{port}: {reason}") from error
        yield _url(runner.addresses[0])
    finally:
        await runner.cleanup()


def _url(address: tuple[str, int]) -> str:
    host, port = address[0], address[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
