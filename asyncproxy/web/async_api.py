"""The async paths: submit, poll, content, delete. A handler reads like its page in the contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from aiohttp import web

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.errors import MethodNotAllowed, UnknownEndpoint
from asyncproxy.core.jobs import Job, Outcome
from asyncproxy.service import JobService
from asyncproxy.web import job_responses
from asyncproxy.web.body_reader import expect_nothing
from asyncproxy.web.errors import Handler, answering_errors
from asyncproxy.web.fast_path import FastPathRouter, OfJob
from asyncproxy.web.job_requests import JobRequests, prefer_of
from asyncproxy.web.wire_response import WireResponse

__all__ = ["AsyncApi"]


class AsyncApi:
    """The routes under ``/v1/async/``."""

    def __init__(self, service: JobService, requests: JobRequests, directory: FastPathRouter) -> None:
        self._service = service
        self._requests = requests
        self._directory = directory

    def add_routes(self, router: web.UrlDispatcher, endpoints: Iterable[Endpoint]) -> None:
        """Add the async paths of ``endpoints``, and answer for all others under ``/v1/async``."""
        for endpoint in endpoints:
            path, name = endpoint.async_path, endpoint.name
            submit = answering_errors(partial(self._submit, endpoint), endpoint=name)
            poll, content, delete = (
                answering_errors(partial(answer, endpoint), endpoint=name)
                for answer in (self._poll, self._content, self._delete)
            )
            self._add(router, name, path, {"POST": submit})
            look, fetch, forget = map(_of_match, (poll, content, delete))
            self._add(router, name, f"{path}/{{id}}", {"GET": look, "HEAD": look, "DELETE": forget})
            self._add(router, name, f"{path}/{{id}}/content", {"GET": fetch, "HEAD": fetch})
            self._directory.posts[path], self._directory.polls[path] = submit, poll
        for path in ("/v1/async", r"/v1/async/{rest:[\s\S]*}"):
            router.add_route("*", path, answering_errors(self._unknown), expect_handler=expect_nothing)

    def _add(
        self, router: web.UrlDispatcher, name: str, path: str, methods: Mapping[str, Handler]
    ) -> None:
        resource = router.add_resource(path)
        for method, handler in methods.items():
            resource.add_route(method, handler, expect_handler=expect_nothing)
        refusal = answering_errors(self._refusing(", ".join(methods)), endpoint=name)
        resource.add_route("*", refusal, expect_handler=expect_nothing)

    async def _submit(self, endpoint: Endpoint, request: web.BaseRequest) -> web.StreamResponse:
        job, replayed = await self._requests.submit(endpoint, request)
        lines = job_responses.header("Location", f"{endpoint.async_path}/{job.id}")
        if replayed:
            lines += job_responses.REPLAYED
        return self._envelope(job, lines)

    async def _poll(
        self, endpoint: Endpoint, job_id: str, request: web.BaseRequest
    ) -> web.StreamResponse:
        job, lines = await self._awaited(endpoint, job_id, request)
        return self._envelope(job, lines)

    async def _content(
        self, endpoint: Endpoint, job_id: str, request: web.BaseRequest
    ) -> web.StreamResponse:
        job, lines = await self._awaited(endpoint, job_id, request)
        return (
            job_responses.own_response(job) if isinstance(job, Outcome) else self._envelope(job, lines)
        )

    async def _delete(
        self, endpoint: Endpoint, job_id: str, request: web.BaseRequest
    ) -> web.StreamResponse:
        job = await self._requests.find(endpoint, request, job_id)
        await self._service.delete(job)
        return WireResponse(204, b"", b"")

    async def _awaited(
        self, endpoint: Endpoint, job_id: str, request: web.BaseRequest
    ) -> tuple[Job | Outcome, bytes]:
        """The job of a path, after as long a wait for its end as the client asks for."""
        job = await self._requests.find(endpoint, request, job_id)
        query = request.query.get("wait") if request.query_string else None
        wait_s = self._service.waiting_time(query=query, prefer=prefer_of(request))
        if wait_s is None:
            return job, b""
        job = await self._service.wait(job, wait_s)
        return job, job_responses.header("Preference-Applied", f"wait={wait_s:g}")

    def _envelope(self, job: Job | Outcome, lines: bytes) -> web.StreamResponse:
        if isinstance(job, Outcome):
            return job_responses.terminal(job, lines=lines)
        return job_responses.pending(job, self._service.retry_after_s(job), lines=lines)

    def _refusing(self, allow: str) -> Handler:
        async def refuse(request: web.BaseRequest) -> web.StreamResponse:
            self._requests.identify(request)
            raise MethodNotAllowed(f"This path only supports {allow}.", allow=allow)

        return refuse

    async def _unknown(self, request: web.BaseRequest) -> web.StreamResponse:
        self._requests.identify(request)
        raise UnknownEndpoint(
            "There is no such async endpoint. The path is /v1/async/<endpoint>, as in "
            "/v1/async/embeddings."
        )


def _of_match(answer: OfJob) -> Handler:
    """A handler for aiohttp's router, which has the id of the job in its match."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return await answer(request.match_info["id"], request)

    return handler
