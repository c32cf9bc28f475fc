"""Our own pages: ``/-/healthy`` and ``/-/ready``."""

from __future__ import annotations

from aiohttp import web

from asyncproxy.dispatcher import Dispatcher
from asyncproxy.errors import MethodNotAllowed, UnknownEndpoint
from asyncproxy.intake import expect_nothing
from asyncproxy.middleware import answering_errors
from asyncproxy.responses import json_response

__all__ = ["Admin"]


class Admin:
    """Pages for load balancers and orchestrators. They need no key and name nothing internal."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the pages, and answer for all other paths under ``/-/``."""
        for path, page in (("/-/healthy", self._healthy), ("/-/ready", self._ready)):
            resource = router.add_resource(path)
            for method in ("GET", "HEAD"):
                resource.add_route(method, page, expect_handler=expect_nothing)
            resource.add_route("*", answering_errors(_refuse), expect_handler=expect_nothing)
        unknown = answering_errors(_unknown_page)
        router.add_route("*", r"/-/{rest:[\s\S]*}", unknown, expect_handler=expect_nothing)

    async def _healthy(self, request: web.Request) -> web.StreamResponse:
        """200: the process runs."""
        return json_response(200, b'{"status":"ok"}')

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        """200: jobs are taken. 503: they are not, and why."""
        if self._dispatcher.draining:
            return json_response(503, b'{"status":"unavailable","reason":"shutting down"}')
        return json_response(200, b'{"status":"ok"}')


async def _refuse(request: web.Request) -> web.StreamResponse:
    raise MethodNotAllowed("This page takes GET, HEAD.", allow="GET, HEAD")


async def _unknown_page(request: web.Request) -> web.StreamResponse:
    raise UnknownEndpoint("There is no such page. There are /-/healthy and /-/ready.")
