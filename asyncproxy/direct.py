"""The way round aiohttp's application, for the requests that each job is made of: a submit, and polls.

Its router and its signals cost nearly as much as all that is ours about a poll, and none of them has
anything to say about one: whoever listens with :func:`asyncproxy.server.listening` serves our own
application. What a directory does not know goes to the application, which has all the routes. Both
ways lead to the same handlers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

__all__ = ["DIRECTORY", "Directory", "Handler", "go_round"]

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

# The handler of a method and a target (path and query, as they came), or None: ask the application.
Directory = Callable[[str, str], Handler | None]

DIRECTORY: Final[web.AppKey[Directory]] = web.AppKey("asyncproxy.directory")


class _Request(web.BaseRequest):
    """A request whose handler is known."""

    ATTRS = web.BaseRequest.ATTRS | {"handler"}

    handler: Handler


def go_round(server: web.Server, directory: Directory) -> None:
    """Let ``server``, which has no connection yet, ask ``directory`` before its application."""
    loop = asyncio.get_running_loop()
    make_request, handle = server.request_factory, server.request_handler

    def factory(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        if message.chunked:
            # aiohttp 3.14 takes the last field of a trailer for the first one of the next request on
            # the connection, which may be another client's: let there be none.
            message = message._replace(should_close=True)
        handler = directory(message.method, message.path)
        if handler is None:
            return make_request(message, payload, protocol, writer, task)
        request = _Request(message, payload, protocol, writer, task, loop)
        request.handler = handler
        return request

    def answer(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        return request.handler(request) if isinstance(request, _Request) else handle(request)

    server.request_factory, server.request_handler = factory, answer
