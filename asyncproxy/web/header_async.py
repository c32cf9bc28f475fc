"""Async by header, on the sync path: for clients that can set a header but not a path.

The wire contract, section 5: ``Prefer: respond-async``, ``x-bf-async`` and ``x-bf-async-id``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from aiohttp import web

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.jobs import Job, JobStatus, Outcome
from asyncproxy.service import JobService
from asyncproxy.web import job_responses
from asyncproxy.web.body_reader import expect_nothing
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.fast_path import FastPathRouter, Handler
from asyncproxy.web.job_requests import JobRequests, prefer_of
from asyncproxy.wire import preferences

__all__ = ["HeaderAsync"]


class HeaderAsync:
    """The routes ``POST /v1/<endpoint>``: async where a header asks for it, otherwise passed on."""

    def __init__(
        self,
        service: JobService,
        requests: JobRequests,
        pass_on: Handler,
        directory: FastPathRouter,
    ) -> None:
        self._service = service
        self._requests = requests
        self._pass_on = pass_on
        self._directory = directory

    def add_routes(self, router: web.UrlDispatcher, endpoints: Iterable[Endpoint]) -> None:
        """Add the sync paths of ``endpoints``."""
        for endpoint in endpoints:
            handler = answering_errors(partial(self._handle, endpoint), endpoint=endpoint.name)
            router.add_post(endpoint.sync_path, handler, expect_handler=expect_nothing)
            self._directory.posts[endpoint.sync_path] = handler

    async def _handle(self, endpoint: Endpoint, request: web.BaseRequest) -> web.StreamResponse:
        given = request.headers
        if (job_id := given.get("x-bf-async-id", "")) != "":
            return self._result(await self._requests.find(endpoint, request, job_id))
        if given.get("x-bf-async", "").strip().lower() not in ("", "false", "0"):
            return await self._bifrost(endpoint, request)
        prefer = prefer_of(request)
        if prefer is not None and "respond-async" in preferences.preferences(prefer):
            return await self._preferred(endpoint, request)
        return await self._pass_on(request)

    async def _bifrost(self, endpoint: Endpoint, request: web.BaseRequest) -> web.StreamResponse:
        job, replayed = await self._requests.submit(endpoint, request)
        lines = job_responses.REPLAYED if replayed else b""
        if isinstance(job, Outcome):
            return job_responses.terminal(job, lines=lines)
        return self._live(job, lines)

    async def _preferred(self, endpoint: Endpoint, request: web.BaseRequest) -> web.StreamResponse:
        job, replayed = await self._requests.submit(endpoint, request)
        wait_s = self._service.waiting_time(query=None, prefer=prefer_of(request))
        applied = "respond-async"
        if wait_s is not None:
            applied += f", wait={wait_s:g}"
            job = await self._service.wait(job, wait_s)
            if isinstance(job, Outcome):
                return job_responses.own_response(job)
        lines = job_responses.header("Location", f"{endpoint.async_path}/{job.id}")
        lines += job_responses.header("Preference-Applied", applied)
        if replayed:
            lines += job_responses.REPLAYED
        if isinstance(job, Outcome):
            return job_responses.terminal(job, lines=lines)
        return job_responses.pending(job, self._service.retry_after_s(job), lines=lines)

    def _result(self, job: Job | Outcome) -> web.StreamResponse:
        if isinstance(job, Job):
            return self._live(job)
        if job.status is JobStatus.COMPLETED:
            return job_responses.own_response(job)
        return job_responses.error_of(job)

    def _live(self, job: Job, lines: bytes = b"") -> web.StreamResponse:
        return job_responses.pending(job, self._service.retry_after_s(job), status=200, lines=lines)
