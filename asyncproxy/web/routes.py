"""Routes as data: which handler answers which method of which path.

Our own server looks a request up in a :class:`RouteTable`. An application that ``setup`` is called
with gets the same routes into its router, by :func:`add_to`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final, NamedTuple

from aiohttp import web
from yarl import URL

from asyncproxy.core.errors import ApiError, UnknownEndpoint
from asyncproxy.web.body_reader import expect_nothing
from asyncproxy.web.wire_response import Response, WireResponse, error_response
from asyncproxy.wire import request_target
from asyncproxy.wire.envelope import error_body

__all__ = ["Handler", "Route", "RouteTable", "add_to"]

# Called with the request and, where the path of the route has an ``{id}``, with what stands there.
Handler = Callable[..., Awaitable[Response]]

# The id of a job, as :class:`asyncproxy.core.ids.RandomIds` makes them.
_ID: Final = re.compile(r"[0-9a-f-]{36}")

_REST: Final = "{rest}"


class Route(NamedTuple):
    """A handler for a method of a path. The description of the API has the same paths."""

    method: str
    """Upper case. ``*``: every method for which the path has no other route."""
    path: str
    """``{id}`` matches one segment, ``{rest}`` at the end matches anything."""
    handler: Handler


class RouteTable:
    """Finds the handler of a request by its method and its path. Paths are not decoded."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._paths: dict[str, dict[str, Handler]] = {}
        for route in self.routes:
            self._paths.setdefault(route.path, {})[route.method] = route.handler
        prefixes = [path for path in self._paths if path.endswith(_REST)]
        self._prefixes = sorted(prefixes, key=len, reverse=True)
        # The targets of most requests, each found by one look-up.
        self._posts = {
            r.path: r.handler for r in self.routes if r.method == "POST" and "{" not in r.path
        }
        self._polls = {
            r.path.removesuffix("/{id}"): r.handler
            for r in self.routes
            if r.method == "GET" and r.path.endswith("/{id}")
        }

    def dispatch(self, request: web.BaseRequest) -> Awaitable[Response]:
        """Answer a request by its handler."""
        target = request.raw_path
        if request.method == "POST":
            handler = self._posts.get(target)
            if handler is not None:
                return handler(request)
        elif request.method == "GET":
            path, _, job_id = target.rpartition("/")
            poll = self._polls.get(path)
            if poll is not None and _ID.fullmatch(job_id):
                return poll(request, job_id)
        return self._dispatch(request, target)

    def _dispatch(self, request: web.BaseRequest, target: str) -> Awaitable[Response]:
        try:
            resolved = request_target.resolved(request.method, target)
            handler, ids = self.find(request.method, resolved.partition("?")[0])
        except ApiError as error:
            return _refused(error)
        if resolved != target:  # a handler that reads the path of the request must see the resolved one
            request = request.clone(rel_url=URL(resolved, encoded=True))
        return handler(request, *ids)

    def find(self, method: str, path: str) -> tuple[Handler, tuple[str, ...]]:
        """The handler of a path, and the ids in the path. Raises :class:`UnknownEndpoint`."""
        for template, ids in self._templates(path):
            handlers = self._paths.get(template)
            if handlers is not None:
                handler = handlers.get(method) or handlers.get("*")
                if handler is not None:
                    return handler, ids
        raise UnknownEndpoint("There is no such path here.")

    def _templates(self, path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield path, ()
        parent, _, last = path.rpartition("/")
        if last:
            yield f"{parent}/{{id}}", (_canonical(last),)
            grandparent, _, middle = parent.rpartition("/")
            if middle:
                yield f"{grandparent}/{{id}}/{last}", (_canonical(middle),)
        for prefix in self._prefixes:
            if path.startswith(prefix.removesuffix(_REST)):
                yield prefix, ()


def _canonical(job_id: str) -> str:
    """The letters of an id may be of either case (RFC 9562, section 4)."""
    return job_id if _ID.fullmatch(job_id) else job_id.lower()


def _refused(error: ApiError) -> Awaitable[Response]:
    async def answer() -> Response:
        return error_response(error, error_body(error))

    return answer()


def add_to(router: web.UrlDispatcher, routes: Iterable[Route]) -> None:
    """Add routes to the router of an aiohttp application."""
    resources: dict[str, web.Resource] = {}
    for route in routes:
        resource = resources.get(route.path)
        if resource is None:
            pattern = route.path.replace(_REST, r"{rest:[\s\S]*}")
            resource = resources[route.path] = router.add_resource(pattern)
        resource.add_route(route.method, _in_application(route), expect_handler=expect_nothing)


def _in_application(route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A handler for aiohttp's router."""
    takes_id, whole = "{id}" in route.path, not route.path.endswith(_REST)

    async def handle(request: web.Request) -> web.StreamResponse:
        ids = (request.match_info["id"],) if takes_id else ()
        path = route.path.replace("{id}", *ids) if takes_id else route.path
        # aiohttp's router decodes a path first. `/%2D/metrics` would get past a rule of nginx on `/-/`.
        if whole and not request.rel_url.raw_path.endswith(path):
            response = await _refused(UnknownEndpoint("There is no such path here."))
        else:
            response = await route.handler(request, *map(_canonical, ids))
        return response.for_application() if isinstance(response, WireResponse) else response

    return handle
