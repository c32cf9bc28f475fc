"""The way round aiohttp's application, for the requests that are most: submits, polls, sync calls.

Its router and its signals cost nearly as much as all that is ours about a poll, and none of them has
anything to say about one: whoever listens with :func:`asyncproxy.web.server.listening` serves our own
application. What the directory does not know goes to the application, which has all the routes. Both
ways lead to the same handlers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from aiohttp import web

__all__ = ["DIRECTORY", "FastPathRouter", "Handler", "OfJob", "install_fast_path"]

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

# What gets the id of a job first.
OfJob = Callable[[str, web.BaseRequest], Awaitable[web.StreamResponse]]

# The id of a job, as :class:`asyncproxy.core.ids.RandomIds` makes them.
_ID: Final = re.compile(r"[0-9a-f-]{36}")


class FastPathRouter:
    """Handlers by the targets (path and query, as they came) that clients mostly write."""

    def __init__(self) -> None:
        self.posts: dict[str, Handler] = {}  # by path
        self.polls: dict[str, OfJob] = {}  # by path, without the id

    def find(self, method: str, target: str) -> Handler | None:
        """The handler of a request. None: ask the application."""
        if method == "POST":
            return self.posts.get(target)
        if method == "GET":
            path, _, job_id = target.rpartition("/")
            poll = self.polls.get(path)
            if poll is not None and _ID.fullmatch(job_id):
                return partial(poll, job_id)
        return None


DIRECTORY: Final[web.AppKey[FastPathRouter]] = web.AppKey("asyncproxy.directory")


class _Request(web.BaseRequest):
    """A request whose handler is known."""

    ATTRS = web.BaseRequest.ATTRS | {"handler"}

    handler: Handler


def install_fast_path(server: web.Server, directory: FastPathRouter) -> None:
    """Let ``server``, which has no connection yet, ask ``directory`` before its application."""
    loop, find = asyncio.get_running_loop(), directory.find
    make_request, handle = server.request_factory, server.request_handler

    def factory(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        if message.chunked:
            # aiohttp 3.14 takes the last field of a trailer for the first one of the next request on
            # the connection, which may be another client's: let there be none.
            message = message._replace(should_close=True)
        handler = find(message.method, message.path)
        if handler is None:
            return make_request(message, payload, protocol, writer, task)
        request = _Request(message, payload, protocol, writer, task, loop)
        request.handler = handler
        return request

    def answer(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        return request.handler(request) if isinstance(request, _Request) else handle(request)

    server.request_factory, server.request_handler = factory, answer
