"""Turns aiohttp's requests into the plain requests that the service takes."""

from __future__ import annotations

from aiohttp import web

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.errors import ApiError
from asyncproxy.core.jobs import Job, Outcome
from asyncproxy.service import JobService, Submitted, shutting_down
from asyncproxy.web.body_reader import BodyReader
from asyncproxy.web.request_heads import RequestHeads
from asyncproxy.wire.request import Request

__all__ = ["JobRequests", "prefer_of"]


class JobRequests:
    """Reads requests for the service, for the async paths, the header form and the relay."""

    def __init__(self, service: JobService, heads: RequestHeads, body_reader: BodyReader) -> None:
        self._service = service
        self._heads = heads
        self._body_reader = body_reader

    async def read(self, request: web.BaseRequest) -> Request:
        """Read a whole request.

        Raises :class:`ShuttingDown`, and the errors of :meth:`RequestHeads.read`,
        :meth:`BodyReader.read` and :meth:`BodyReader.decode`.
        """
        if self._service.draining:
            raise shutting_down()
        head = self._heads.read(request)
        body = self._body_reader.read_buffered(request)
        if body is None:
            body = await self._body_reader.read(request)
        received = body
        if head.codings:
            body = await self._body_reader.decode(head.codings, received)
        return Request(head, request.rel_url.raw_query_string, body, received)

    async def submit(self, endpoint: Endpoint, request: web.BaseRequest) -> Submitted:
        """Make a request a job, or find the job that its ``Idempotency-Key`` names."""
        try:
            return await self._service.submit(endpoint, await self.read(request))
        except ApiError as error:
            self._service.refused(endpoint, error)
            raise

    async def find(self, endpoint: Endpoint, request: web.BaseRequest, job_id: str) -> Job | Outcome:
        """The job of a path, if the sender of the request may see it.

        Raises :class:`InvalidApiKey` or :class:`JobNotFound`.
        """
        return await self._service.find(endpoint, self._heads.caller(request), job_id)

    def identify(self, request: web.BaseRequest) -> None:
        """Raise :class:`InvalidApiKey` unless the sender of the request is accepted."""
        self._heads.caller(request)


def prefer_of(request: web.BaseRequest) -> str | None:
    """The ``Prefer`` fields of a request, joined (RFC 7240, section 2). None if there is none."""
    return ", ".join(request.headers.getall("Prefer", ())) or None
