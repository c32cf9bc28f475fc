"""The relay: async for clients that know nothing of it. The wire contract, section 6.

No connection stays open for longer than ``hold_s``: what takes longer is answered with a redirect to a
path that is held again. HTTP clients follow it by themselves.
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

# A client follows a redirect at once, over whatever network it has, and may ask there again.
_FOLLOWED_WITHIN_S: Final = 60.0

_UUID: Final = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

PassOn = Callable[[web.BaseRequest, str, list[bytes] | None], Awaitable[web.StreamResponse]]


class Relay:
    """The routes under ``/v1/relay/``.

    ``pass_on`` sends a request to the upstream under another path, with its body if that was read: it
    takes it out of the list, so that nobody keeps it for longer than it is needed.
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
        self._shortest_hold_s = hold_s  # of those that ended in a redirect: a reload changes it

    def routes(self, endpoints: Iterable[Endpoint]) -> Iterator[Route]:
        """The relayed paths of ``endpoints``. All others pass as if ``/relay`` were not there."""
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
        except UnsupportedMediaType:
            return await self._elsewhere(request)
        except StreamingNotSupported:
            assert read is not None
            body = [read.body]
            del read
            return await self._pass_on(request, _without_prefix(request), body)
        except ApiError as error:
            self._service.refused(endpoint, error)
            raise
        del read  # nothing of the request is kept here while the job is held
        folder = endpoint.name.rpartition("/")[2] + "/"
        return await self._hold(endpoint, job, hop=0, folder=folder)

    async def _go_on(self, endpoint: Endpoint, request: web.BaseRequest, job_id: str) -> Response:
        if not _UUID.fullmatch(job_id):  # the gateway's own: /v1/responses/resp_1
            return await self._elsewhere(request)
        job = await self._requests.find(endpoint, request, job_id)
        hop = request.query.get("hop", "")
        hops = int(hop) if hop.isascii() and hop.isdecimal() and len(hop) < 6 else 0
        return await self._hold(endpoint, job, hop=hops, folder="")

    async def _hold(
        self, endpoint: Endpoint, job: Job | Outcome, *, hop: int, folder: str
    ) -> WireResponse:
        """Hold a request. ``folder`` is what a job's path has beyond that of the request's folder."""
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
        # Relative, so that it holds behind an ingress that strips a prefix, and in a sub-application.
        location = job_responses.header("Location", f"{folder}{job.id}?hop={hop + 1}")
        return WireResponse(303, location + job_responses.NO_STORE, b"")

    def _keep_s(self, submitted_at: float | None, *, first: bool) -> float:
        """How long a result that is being delivered stays for those who were redirected to its path.

        Requests that are equal share a job, on any node. None was redirected before the first hold of
        the job was over: half of that leaves room for clocks that differ. ``submitted_at`` is None for
        a job that had ended when this request came.
        """
        if first and submitted_at is not None:
            hold_s = min(self._shortest_hold_s, self.hold_s)
            if self._clock() - submitted_at < hold_s / 2:
                return 0.0
        return max(_FOLLOWED_WITHIN_S, self.hold_s)

    def _delivering(self, outcome: Outcome, *, keep_s: float) -> WireResponse:
        """The answer. That it was taken is noted: if it was not, a retry is to find this result."""
        response = job_responses.own_response(outcome, self._service.read)
        response.when_written(partial(self._service.delivered, outcome, keep_s))
        return response


def _without_prefix(request: web.BaseRequest) -> str:
    """The path and query as if ``/relay`` were not there, otherwise as they were sent."""
    return "/v1" + request.raw_path.removeprefix(_PREFIX)


def _is_retry(request: web.BaseRequest) -> bool:
    """Whether an OpenAI SDK says that it has sent this request before."""
    count = request.headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdecimal() and int(count[:9]) > 0
