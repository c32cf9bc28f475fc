"""Async by header, on the sync path: for clients that can set a header but not a path.

The wire contract, section 5: ``Prefer: respond-async``, ``x-bf-async`` and ``x-bf-async-id``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from aiohttp import web

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.jobs import Job, JobStatus, Outcome
from asyncproxy.service import JobService
from asyncproxy.web import job_responses
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.job_requests import JobRequests, prefer_of
from asyncproxy.web.routes import Handler, Route
from asyncproxy.web.wire_response import Response, WireResponse
from asyncproxy.wire import preferences

__all__ = ["HeaderAsync"]


class HeaderAsync:
    """The routes ``POST /v1/<endpoint>``: async if a header asks for it, otherwise passed through."""

    def __init__(self, service: JobService, requests: JobRequests, pass_on: Handler) -> None:
        self._service = service
        self._requests = requests
        self._pass_on = pass_on

    def routes(self, endpoints: Iterable[Endpoint]) -> Iterator[Route]:
        """The sync paths of ``endpoints``."""
        for endpoint in endpoints:
            handler = answering_errors(partial(self._handle, endpoint), endpoint=endpoint.name)
            yield Route("POST", endpoint.sync_path, handler)

    async def _handle(self, endpoint: Endpoint, request: web.BaseRequest) -> Response:
        given = request.headers
        if (job_id := given.get("x-bf-async-id", "")) != "":
            return self._result(await self._requests.find(endpoint, request, job_id.lower()))
        if given.get("x-bf-async", "").strip().lower() not in ("", "false", "0"):
            return await self._bifrost(endpoint, request)
        prefer = prefer_of(request)
        if prefer is not None and "respond-async" in preferences.preferences(prefer):
            return await self._preferred(endpoint, request)
        return await self._pass_on(request)

    async def _bifrost(self, endpoint: Endpoint, request: web.BaseRequest) -> WireResponse:
        job, replayed = await self._requests.submit(endpoint, request)
        lines = job_responses.REPLAYED if replayed else b""
        if isinstance(job, Outcome):
            return job_responses.terminal(job, self._service.read, lines=lines)
        return self._live(job, lines)

    async def _preferred(self, endpoint: Endpoint, request: web.BaseRequest) -> WireResponse:
        job, replayed = await self._requests.submit(endpoint, request)
        wait_s = self._service.waiting_time(query=None, prefer=prefer_of(request))
        applied = "respond-async"
        if wait_s is not None:
            applied += f", wait={wait_s:g}"
            job = await self._service.wait(job, wait_s)
            if isinstance(job, Outcome):
                return job_responses.own_response(job, self._service.read)
        path = f"{endpoint.async_path}/{job.id}"
        lines = job_responses.location(request, endpoint.sync_path, path)
        lines += job_responses.header("Preference-Applied", applied)
        if replayed:
            lines += job_responses.REPLAYED
        if isinstance(job, Outcome):
            return job_responses.terminal(job, self._service.read, lines=lines)
        return job_responses.pending(job, self._service.retry_after_s(job), lines=lines)

    def _result(self, job: Job | Outcome) -> WireResponse:
        if isinstance(job, Job):
            return self._live(job)
        if job.status is JobStatus.COMPLETED:
            return job_responses.own_response(job, self._service.read)
        return job_responses.error_of(job)

    def _live(self, job: Job, lines: bytes = b"") -> WireResponse:
        return job_responses.pending(job, self._service.retry_after_s(job), status=200, lines=lines)
