"""CORS: lets pages of other origins use the proxy's own paths (the Fetch standard, section 3.3).

Requests that pass through, preflights too, get the gateway's own response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from aiohttp import web

from asyncproxy.web.auth import is_preflight
from asyncproxy.web.routes import Handler, Route
from asyncproxy.web.wire_response import Response, WireResponse

__all__ = ["answering_preflights", "letting_in"]

# Seconds for which a browser may cache a preflight. Chrome allows no more.
_MAX_AGE_S: Final = 7200

# Names of header fields with commas between them, in the form that browsers send.
_NAMES: Final = re.compile(r"[A-Za-z0-9-]+(?:, ?[A-Za-z0-9-]+)*")

_OF_THE_GATEWAY: Final = re.compile(rb"^access-control-[a-z-]+:[^\n]*\n", re.IGNORECASE | re.MULTILINE)


def answering_preflights(routes: Iterable[Route]) -> Iterator[Route]:
    """``routes`` that also answer preflights, which carry no key (the Fetch standard, section 4.8)."""
    routes = tuple(routes)
    for route in routes:
        methods = [r.method for r in routes if r.path == route.path and r.method != "*"]
        if route.method == "*" and methods:
            yield route._replace(handler=_answering(route.handler, ", ".join(methods).encode()))
        else:
            yield route


def _answering(handler: Handler, methods: bytes) -> Handler:
    async def answer(request: web.BaseRequest, *ids: str) -> Response:
        if not is_preflight(request):
            return await handler(request, *ids)
        lines = b"Allow: %b\r\nAccess-Control-Allow-Methods: %b\r\n" % (methods, methods)
        names = request.headers.get("Access-Control-Request-Headers", "")
        if _NAMES.fullmatch(names):
            lines += b"Access-Control-Allow-Headers: %b\r\n" % names.encode()
        lines += b"Access-Control-Max-Age: %d\r\n" % _MAX_AGE_S
        return WireResponse(204, lines + b"Vary: Access-Control-Request-Headers\r\n", b"")

    return answer


def letting_in(origins: Iterable[str], routes: Iterable[Route]) -> Iterator[Route]:
    """``routes`` whose responses the pages of ``origins`` may read. ``*`` stands for every origin."""
    allowed = frozenset(origins)
    for route in routes:
        yield route._replace(handler=_letting_in(allowed, route.handler))


def _letting_in(allowed: frozenset[str], handler: Handler) -> Handler:
    async def answer(request: web.BaseRequest, *ids: str) -> Response:
        response = await handler(request, *ids)
        if isinstance(response, WireResponse):
            lines = response.lines
            if not is_preflight(request):
                lines = _OF_THE_GATEWAY.sub(b"", lines) + b"Access-Control-Expose-Headers: *\r\n"
            response.lines = lines + _origin_lines(allowed, request.headers.get("Origin", ""))
        return response

    return answer


def _origin_lines(allowed: frozenset[str], origin: str) -> bytes:
    if "*" in allowed:
        return b"Access-Control-Allow-Origin: *\r\n"
    if origin in allowed:
        return b"Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n" % origin.encode()
    return b"Vary: Origin\r\n"
