"""The async job API: submit, poll, content, delete. A handler reads like its page in the contract."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from asyncproxy import credentials, envelope, headers, submission
from asyncproxy.credentials import KeyRing
from asyncproxy.dispatcher import Dispatcher
from asyncproxy.endpoints import Endpoint
from asyncproxy.errors import (
    ApiError,
    JobNotFound,
    MethodNotAllowed,
    ShuttingDown,
    UnknownEndpoint,
)
from asyncproxy.intake import Intake, expect_nothing
from asyncproxy.jobs import Call, Finished, Job
from asyncproxy.middleware import Handler, answering_errors, authenticate
from asyncproxy.responses import WireResponse, json_response
from asyncproxy.routing import ModelRoutes
from asyncproxy.stores.base import Store

__all__ = ["Api", "Lifetimes"]

_JOB_HEADERS_LEFT = headers.OURS | {"accept-encoding"}


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long results live after completion, in seconds."""

    default_s: int = 3600
    max_s: int = 86400


class Api:
    """The routes under ``/v1/async/``.

    ``clock`` gives seconds since the epoch, ``new_id`` the ids of jobs: unguessable, for an id is
    all that protects a job which was submitted without a credential.
    """

    def __init__(
        self,
        *,
        store: Store,
        dispatcher: Dispatcher,
        intake: Intake,
        routes: ModelRoutes,
        keys: KeyRing,
        lifetimes: Lifetimes,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._intake = intake
        self._routes = routes
        self._keys = keys
        self._lifetimes = lifetimes
        self._clock = clock
        self._new_id = new_id

    def add_routes(self, router: web.UrlDispatcher, endpoints: Iterable[Endpoint]) -> None:
        """Add the async paths of ``endpoints``, and answer for all others under ``/v1/async``."""
        for endpoint in endpoints:
            path = endpoint.async_path
            self._add(router, endpoint, path, {"POST": self._submit})
            job = {"GET": self._poll, "HEAD": self._poll, "DELETE": self._delete}
            self._add(router, endpoint, f"{path}/{{id}}", job)
            content = {"GET": self._content, "HEAD": self._content}
            self._add(router, endpoint, f"{path}/{{id}}/content", content)
        for path in ("/v1/async", r"/v1/async/{rest:[\s\S]*}"):
            router.add_route(
                "*", path, answering_errors(_unknown_endpoint), expect_handler=expect_nothing
            )

    def _add(
        self,
        router: web.UrlDispatcher,
        endpoint: Endpoint,
        path: str,
        methods: Mapping[str, Callable[[Endpoint, web.Request], Awaitable[web.StreamResponse]]],
    ) -> None:
        resource = router.add_resource(path)
        for method, answer in methods.items():
            handler = answering_errors(partial(answer, endpoint), endpoint=endpoint.name)
            resource.add_route(method, handler, expect_handler=expect_nothing)
        refusal = answering_errors(_refusing(", ".join(methods)), endpoint=endpoint.name)
        resource.add_route("*", refusal, expect_handler=expect_nothing)

    async def _submit(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        if self._dispatcher.draining:
            raise ShuttingDown("The proxy is shutting down. Try again: another one may answer.")
        found = authenticate(request, self._keys)
        submission.check_content_type(
            request.headers.get("Content-Type", ""), request.headers.get("Content-Encoding")
        )
        body = await self._intake.read(request)
        model = submission.check_json(endpoint, body)
        try:
            job = self._job(endpoint, request, found, model, body)
            await self._store.create(job)
        except ApiError as error:
            error.model = model
            raise
        lines = f"Location: {endpoint.async_path}/{job.id}\r\n" + self._retry_after(job)
        return json_response(202, envelope.live(job), lines=lines.encode())

    async def _poll(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        job = await self._find(endpoint, request)
        if isinstance(job, Finished):
            return json_response(200, job.envelope)
        return self._not_done(job)

    async def _content(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        job = await self._find(endpoint, request)
        if not isinstance(job, Finished):
            return self._not_done(job)
        spliced = memoryview(job.envelope)[job.start : job.end]
        body = spliced if job.content is None else job.content
        return WireResponse(job.status_code, job.content_head, body)

    async def _delete(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        job = await self._find(endpoint, request)
        if not await self._store.delete(job.id):
            raise _not_found()
        if isinstance(job, Job):
            self._dispatcher.abort(job)
        return WireResponse(204, b"", b"")

    def _job(
        self,
        endpoint: Endpoint,
        request: web.Request,
        found: tuple[str, str] | None,
        model: str,
        body: bytes,
    ) -> Job:
        job_id = self._new_id()
        lifetimes = self._lifetimes
        query = request.rel_url.raw_query_string
        return Job(
            id=job_id,
            endpoint=endpoint.name,
            credential=self._digest(found),
            upstream=self._routes.upstream_for(model),
            model=model,
            created_at=round(self._clock(), 3),
            ttl_s=submission.ttl(
                request.headers.get("x-bf-async-job-result-ttl"),
                default_s=lifetimes.default_s,
                max_s=lifetimes.max_s,
            ),
            call=Call(
                endpoint=endpoint.name,
                target=f"{endpoint.sync_path}?{query}" if query else endpoint.sync_path,
                headers=self._upstream_headers(request, found, job_id),
                body=body,
            ),
        )

    def _upstream_headers(
        self, request: web.Request, found: tuple[str, str] | None, job_id: str
    ) -> tuple[tuple[str, str], ...]:
        left = _JOB_HEADERS_LEFT
        if self._keys and found is not None:
            left = left | {found[0].lower()}  # the key was for us
        sent = headers.forwarded(
            headers.request_headers(
                request.headers.items(),
                connection=request.headers.getall("Connection", ()),
                without=left,
            ),
            peer=request.remote,
            scheme=request.scheme,
            host=request.headers.get("Host", ""),
            request_id=job_id,
        )
        if "Idempotency-Key" not in request.headers:
            sent.append(("Idempotency-Key", job_id))  # the upstream may see the job twice
        return tuple(sent)

    async def _find(self, endpoint: Endpoint, request: web.Request) -> Job | Finished:
        """The job of a path, for the one who may see it. To all others it does not exist."""
        presented = self._digest(authenticate(request, self._keys))
        job = await self._store.get(request.match_info["id"])
        owner = b"" if job is None else job.credential
        allowed = credentials.same(owner or presented, presented)
        if job is None or not allowed or job.endpoint != endpoint.name:
            raise _not_found()
        return job

    def _digest(self, found: tuple[str, str] | None) -> bytes:
        return b"" if found is None else credentials.digest(found[1], self._store.credential_key)

    def _not_done(self, job: Job) -> WireResponse:
        return json_response(202, envelope.live(job), lines=self._retry_after(job).encode())

    def _retry_after(self, job: Job) -> str:
        return f"Retry-After: {self._dispatcher.retry_after_s(job)}\r\n"


def _refusing(allow: str) -> Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise MethodNotAllowed(f"This path takes {allow}.", allow=allow)

    return refuse


async def _unknown_endpoint(request: web.Request) -> web.StreamResponse:
    raise UnknownEndpoint(
        "There is no such async endpoint. The path is /v1/async/<endpoint>, as in /v1/async/embeddings."
    )


def _not_found() -> JobNotFound:
    return JobNotFound("job not found or expired")
