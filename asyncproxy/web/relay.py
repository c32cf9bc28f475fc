"""The relay: async jobs for clients that only know the sync paths. The wire contract, section 6.

A request waits for its job for at most ``hold_s``. If the job takes longer, the response is a redirect
to a path that waits again. HTTP clients follow redirects by themselves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Final

from aiohttp import web

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.errors import ApiError, StillRunning, StreamingNotSupported, UnsupportedMediaType
from asyncproxy.core.events import Observer, RelayHop
from asyncproxy.core.jobs import Job, Outcome
from asyncproxy.service import JobService
from asyncproxy.web import job_responses
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.job_requests import JobRequests
from asyncproxy.web.routes import Route
from asyncproxy.web.wire_response import Response, WireResponse
from asyncproxy.wire.request import Request

__all__ = ["Relay"]

_PREFIX = "/v1/relay"

# A client follows a redirect within this time, on a slow network too, and may repeat the request.
_FOLLOWED_WITHIN_S: Final = 60.0

_UUID: Final = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

PassOn = Callable[[web.BaseRequest, str, list[bytes] | None], Awaitable[web.StreamResponse]]


class Relay:
    """The routes under ``/v1/relay/``.

    ``pass_on`` sends a request to the upstream under another path. If the body was already read,
    ``pass_on`` takes it out of the list, so that no frame keeps the body for longer than needed.
    """

    def __init__(
        self,
        service: JobService,
        requests: JobRequests,
        pass_on: PassOn,
        *,
        observer: Observer,
        hold_s: float,
        max_hops: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._service = service
        self._requests = requests
        self._pass_on = pass_on
        self._observer = observer
        self.hold_s = hold_s
        self.max_hops = max_hops
        self._clock = clock
        # The shortest hold that has ended in a redirect. A reload may change ``hold_s``.
        self._shortest_hold_s = hold_s

    def routes(self, endpoints: Iterable[Endpoint]) -> Iterator[Route]:
        """The relayed paths of ``endpoints``. Other paths pass through, without ``/relay``."""
        for endpoint in endpoints:
            begin = answering_errors(partial(self._begin, endpoint), endpoint=endpoint.name)
            yield Route("POST", endpoint.relay_path, begin)
            go_on = answering_errors(partial(self._go_on, endpoint), endpoint=endpoint.name)
            for method in ("GET", "POST"):  # POST is for `curl -L -X POST`
                yield Route(method, f"{endpoint.relay_path}/{{id}}", go_on)
            for path in (endpoint.relay_path, f"{endpoint.relay_path}/{{id}}"):
                yield Route("*", path, answering_errors(self._elsewhere))
        yield Route("*", f"{_PREFIX}/{{rest}}", answering_errors(self._elsewhere))

    async def _elsewhere(self, request: web.BaseRequest, _job_id: str = "") -> Response:
        return await self._pass_on(request, _without_prefix(request), None)

    async def _begin(self, endpoint: Endpoint, request: web.BaseRequest) -> Response:
        read: Request | None = None
        try:
            read = await self._requests.read(request)
            job = (await self._service.submit_relayed(endpoint, read, is_retry=_is_retry(request))).job
        except StreamingNotSupported:
            assert read is not None
            body = [read.received]
            del read
            return await self._pass_on(request, _without_prefix(request), body)
        except ApiError as error:
            if isinstance(error, UnsupportedMediaType) and not request.content.at_eof():
                return await self._elsewhere(request)  # the body was not read
            self._service.refused(endpoint, error)
            raise
        del read  # no part of the request stays in memory here during the wait
        folder = endpoint.name.rpartition("/")[2] + "/"
        return await self._hold(endpoint, job, hop=0, folder=folder)

    async def _go_on(self, endpoint: Endpoint, request: web.BaseRequest, job_id: str) -> Response:
        if not _UUID.fullmatch(job_id):  # an id of the gateway: /v1/responses/resp_1
            return await self._elsewhere(request)
        job = await self._requests.find(endpoint, request, job_id)
        hop = request.query.get("hop", "")
        hops = int(hop) if hop.isascii() and hop.isdecimal() and len(hop) < 6 else 0
        return await self._hold(endpoint, job, hop=hops, folder="")

    async def _hold(
        self, endpoint: Endpoint, job: Job | Outcome, *, hop: int, folder: str
    ) -> WireResponse:
        """Wait for a job, then deliver its result or redirect.

        ``folder`` is the part of the job's path that the request's path lacks: ``embeddings/``.
        """
        submitted_at = job.created_at if isinstance(job, Job) else None
        job = await self._service.wait(job, self.hold_s)
        if isinstance(job, Outcome):
            return self._delivering(job, keep_s=self._keep_s(submitted_at, first=folder != ""))
        if hop >= self.max_hops:
            raise StillRunning(
                "The call is still running. The same request again goes on waiting for it."
            )
        self._observer.relay_hop(RelayHop(endpoint.name))
        self._shortest_hold_s = min(self._shortest_hold_s, self.hold_s)
        # A relative URL works behind an ingress that strips a prefix, and in a sub-application.
        location = job_responses.header("Location", f"{folder}{job.id}?hop={hop + 1}")
        return WireResponse(303, location + job_responses.NO_STORE, b"")

    def _keep_s(self, submitted_at: float | None, *, first: bool) -> float:
        """How long a delivered result stays for other clients that were redirected to its path.

        Equal requests share a job, on any node. No client is redirected before the first hold of the
        job is over. So a job that ended within half a hold has no redirected client. The other half
        allows for clocks that differ. ``submitted_at`` is None if the job ended before this request.
        """
        if first and submitted_at is not None:
            hold_s = min(self._shortest_hold_s, self.hold_s)
            if self._clock() - submitted_at < hold_s / 2:
                return 0.0
        return max(_FOLLOWED_WITHIN_S, self.hold_s)

    def _delivering(self, outcome: Outcome, *, keep_s: float) -> WireResponse:
        """The result as a response. Once it is written, the result is marked as delivered.

        Until then, a retry of the request finds the same result.
        """
        response = job_responses.own_response(outcome, self._service.read)
        response.when_written(partial(self._service.delivered, outcome, keep_s))
        return response


def _without_prefix(request: web.BaseRequest) -> str:
    """The path and query of a request without ``/relay``, otherwise unchanged."""
    return "/v1" + request.raw_path.removeprefix(_PREFIX)


def _is_retry(request: web.BaseRequest) -> bool:
    """Whether an OpenAI SDK says that it has sent this request before."""
    count = request.headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdecimal() and int(count[:9]) > 0
