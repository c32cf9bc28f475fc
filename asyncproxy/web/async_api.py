"""The async paths: submit, poll, content, delete. A handler reads like its page in the contract."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from aiohttp import hdrs, web

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.errors import MethodNotAllowed, UnknownEndpoint
from asyncproxy.core.jobs import Job, Outcome
from asyncproxy.service import JobService
from asyncproxy.web import job_responses
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.job_requests import JobRequests, prefer_of
from asyncproxy.web.routes import Handler, Route
from asyncproxy.web.wire_response import WireResponse

__all__ = ["AsyncApi"]


class AsyncApi:
    """The routes under ``/v1/async/``."""

    def __init__(self, service: JobService, requests: JobRequests) -> None:
        self._service = service
        self._requests = requests

    def routes(self, endpoints: Iterable[Endpoint]) -> Iterator[Route]:
        """The async paths of ``endpoints``, and a 404 for all other paths under ``/v1/async``."""
        for endpoint in endpoints:
            path, name = endpoint.async_path, endpoint.name
            submit, poll, content, delete = (
                answering_errors(partial(answer, endpoint), endpoint=name)
                for answer in (self._submit, self._poll, self._content, self._delete)
            )
            for below, methods in {
                path: {"POST": submit},
                f"{path}/{{id}}": {"GET": poll, "HEAD": poll, "DELETE": delete},
                f"{path}/{{id}}/content": {"GET": content, "HEAD": content},
            }.items():
                for method, handler in methods.items():
                    yield Route(method, below, handler)
                refusal = answering_errors(self._refusing(", ".join(methods)), endpoint=name)
                yield Route("*", below, refusal)
        for path in ("/v1/async", "/v1/async/{rest}"):
            yield Route("*", path, answering_errors(self._unknown))

    async def _submit(self, endpoint: Endpoint, request: web.BaseRequest) -> WireResponse:
        job, replayed = await self._requests.submit(endpoint, request)
        path = endpoint.async_path
        lines = job_responses.location(request, path, f"{path}/{job.id}")
        if replayed:
            lines += job_responses.REPLAYED
        return self._envelope(job, lines)

    async def _poll(self, endpoint: Endpoint, request: web.BaseRequest, job_id: str) -> WireResponse:
        job, lines = await self._awaited(endpoint, request, job_id)
        return self._envelope(job, lines)

    async def _content(self, endpoint: Endpoint, request: web.BaseRequest, job_id: str) -> WireResponse:
        job, lines = await self._awaited(endpoint, request, job_id)
        if isinstance(job, Outcome):
            return job_responses.content(job, self._service.read, _range_of(request))
        return self._envelope(job, lines)

    async def _delete(self, endpoint: Endpoint, request: web.BaseRequest, job_id: str) -> WireResponse:
        job = await self._requests.find(endpoint, request, job_id)
        await self._service.delete(job)
        return WireResponse(204, job_responses.NO_STORE, b"")

    async def _awaited(
        self, endpoint: Endpoint, request: web.BaseRequest, job_id: str
    ) -> tuple[Job | Outcome, bytes]:
        """The job of a path, after the wait that the client asks for, and the header line about it."""
        job = await self._requests.find(endpoint, request, job_id)
        query = request.query.get("wait") if request.query_string else None
        wait_s = self._service.waiting_time(query=query, prefer=prefer_of(request))
        if wait_s is None:
            return job, b""
        job = await self._service.wait(job, wait_s)
        return job, job_responses.header("Preference-Applied", f"wait={wait_s:g}")

    def _envelope(self, job: Job | Outcome, lines: bytes) -> WireResponse:
        if isinstance(job, Outcome):
            return job_responses.terminal(job, self._service.read, lines=lines)
        return job_responses.pending(job, self._service.retry_after_s(job), lines=lines)

    def _refusing(self, allow: str) -> Handler:
        async def refuse(request: web.BaseRequest, _job_id: str = "") -> WireResponse:
            self._requests.identify(request)
            raise MethodNotAllowed(f"This path only supports {allow}.", allow=allow)

        return refuse

    async def _unknown(self, request: web.BaseRequest) -> WireResponse:
        self._requests.identify(request)
        raise UnknownEndpoint(
            "There is no such async endpoint. The path is /v1/async/<endpoint>, as in "
            "/v1/async/embeddings."
        )


def _range_of(request: web.BaseRequest) -> str | None:
    """The ``Range`` of a request. With ``If-Range`` there is none: no answer names its version."""
    headers = request.headers
    if request.method != "GET" or hdrs.IF_RANGE in headers:
        return None
    return headers.get(hdrs.RANGE)
