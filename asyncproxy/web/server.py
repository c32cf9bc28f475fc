"""Serves a table of routes on a TCP port."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from asyncproxy.core.errors import StartupError
from asyncproxy.web.connection import EdgeServer, parser_is_lax
from asyncproxy.web.routes import RouteTable

__all__ = ["MAX_CONNECTIONS", "listening"]

logger = logging.getLogger(__name__)

# Connections that may wait to be accepted: a fleet of clients may start at once.
_BACKLOG = 4096

MAX_CONNECTIONS = 10_000


@asynccontextmanager
async def listening(
    table: RouteTable,
    host: str | None,
    port: int,
    *,
    client_timeout_s: float = 60.0,
    max_connections: int = MAX_CONNECTIONS,
    reuse_port: bool = False,
) -> AsyncIterator[str]:
    """Serve ``table`` for the length of a ``with``. Yields the URL of the address.

    ``client_timeout_s`` and ``max_connections``: see :class:`EdgeServer`.
    ``reuse_port``: other processes may listen on the same address.
    Raises :class:`StartupError` if the address cannot be listened on.
    """
    if parser_is_lax():
        logger.warning(
            "aiohttp is installed without its parser in C. The one in Python takes requests and "
            "answers that a strict parser refuses. Install a wheel of aiohttp for this platform."
        )
    server = EdgeServer(
        table.dispatch, client_timeout_s=client_timeout_s, max_connections=max_connections
    )
    # Handlers get their grace while the server still listens. Handlers that are left are cut off.
    runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(
            runner,
            host,
            port,
            backlog=_BACKLOG,
            reuse_address=True,
            reuse_port=reuse_port or None,
        )
        try:
            await site.start()
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
