"""The pages for operators: ``/-/healthy``, ``/-/ready``, ``/-/metrics`` and ``/-/openapi.json``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import msgspec
import yaml
from aiohttp import web

from asyncproxy.core.errors import MethodNotAllowed, UnknownEndpoint
from asyncproxy.observe.metrics import CONTENT_TYPE, Metrics
from asyncproxy.version import __version__
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.health import Health
from asyncproxy.web.routes import Route, RouteTable
from asyncproxy.web.server import listening
from asyncproxy.web.wire_response import WireResponse, json_response

__all__ = ["Admin", "describe", "no_pages"]


class Admin:
    """Pages for load balancers, orchestrators and tools. They need no key and name nothing internal.

    ``paths`` are the other paths that the proxy serves, in the form of the OpenAPI description.
    """

    def __init__(self, health: Health, metrics: Metrics, paths: Collection[str]) -> None:
        self._health = health
        self._metrics = metrics
        self._paths = paths
        self._description = b""
        self.url = ""  # set while the pages have an address of their own

    def routes(self) -> Iterator[Route]:
        """The pages, and a 404 for all other paths under ``/-/``."""
        pages = {
            "/-/healthy": self._healthy,
            "/-/ready": self._ready,
            "/-/metrics": self._measured,
            "/-/openapi.json": self._openapi,
        }
        for path, page in pages.items():
            for method in ("GET", "HEAD"):
                yield Route(method, path, answering_errors(page))
            yield Route("*", path, answering_errors(_refuse))
        yield Route("*", "/-/{rest}", answering_errors(_unknown_page))

    @asynccontextmanager
    async def listening(self, host: str | None, port: int) -> AsyncIterator[None]:
        """Serve the pages at an address of their own for the length of a ``with``.

        Raises :class:`~asyncproxy.core.errors.StartupError` if the address cannot be listened on.
        """
        elsewhere = Route("*", "/{rest}", answering_errors(_unknown_page))
        async with listening(RouteTable([*self.routes(), elsewhere]), host, port) as self.url:
            yield

    async def _healthy(self, request: web.BaseRequest) -> WireResponse:
        """200: the process runs."""
        return json_response(200, b'{"status":"ok"}')

    async def _ready(self, request: web.BaseRequest) -> WireResponse:
        """200: jobs are accepted. 503: jobs are refused, with the reasons."""
        checks = await self._health.checks()
        reasons = [check.reason for check in checks.values() if check.reason]
        page: dict[str, Any] = {
            "status": "unavailable" if reasons else "ok",
            "checks": checks,
            "upstreams": self._health.upstreams(),
        }
        if reasons:
            page["reason"] = "; ".join(reasons)
        return json_response(503 if reasons else 200, msgspec.json.encode(page))

    async def _measured(self, request: web.BaseRequest) -> WireResponse:
        """200: all metrics, also while the store is away."""
        page = self._metrics.page(await self._health.readings())
        lines = f"Content-Type: {CONTENT_TYPE}\r\nCache-Control: no-store\r\n"
        return WireResponse(200, lines.encode(), page)

    async def _openapi(self, request: web.BaseRequest) -> WireResponse:
        """200: the description of the paths that are served."""
        if not self._description:
            # In a thread: parsing so much YAML would block the loop for as long as many jobs take.
            description = await asyncio.to_thread(describe, self._paths)
            self._description = msgspec.json.encode(description)
        return json_response(200, self._description)


def describe(paths: Collection[str]) -> dict[str, Any]:
    """The OpenAPI description of ``paths`` and of the operator pages, read from the package."""
    text = files("asyncproxy.web").joinpath("openapi.yaml").read_text(encoding="utf-8")
    description: dict[str, Any] = yaml.safe_load(text)
    description["info"]["version"] = __version__
    shared = description["components"].pop("pathItems")
    description["paths"] = {
        path: _written_out(path, item, shared)
        for path, item in description["paths"].items()
        if path in paths or path.startswith("/-/")
    }
    return description


def _written_out(path: str, item: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """A path item without ``$ref``. Each ``operationId`` gets the endpoint's name, to be unique."""
    if "$ref" not in item:
        return item
    endpoint = re.sub(r"^/v1/(async/|relay/)?|/\{id\}(/content)?$", "", path).replace("/", "_")
    shared_item = shared[item["$ref"].rpartition("/")[2]]
    operations = {
        method: {**operation, "operationId": f"{operation['operationId'].partition('.')[0]}_{endpoint}"}
        for method, operation in shared_item.items()
        if method != "parameters"
    }
    return {**shared_item, **operations}


async def _refuse(request: web.BaseRequest) -> WireResponse:
    raise MethodNotAllowed("This page only supports GET and HEAD.", allow="GET, HEAD")


def no_pages() -> Route:
    """The route for ``/-/`` if the pages have their own address: a 404, and nothing passes through."""
    return Route("*", "/-/{rest}", answering_errors(_no_pages))


async def _no_pages(request: web.BaseRequest) -> WireResponse:
    raise UnknownEndpoint("There are no pages here.")


async def _unknown_page(request: web.BaseRequest) -> WireResponse:
    raise UnknownEndpoint(
        "Unknown page. There are /-/healthy, /-/ready, /-/metrics and /-/openapi.json."
    )
