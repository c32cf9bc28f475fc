"""The relay: async for clients that know nothing of it. The wire contract, section 6.

No connection stays open for longer than ``hold_s``: what takes longer is answered with a redirect to a
path that is held again. HTTP clients follow it by themselves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from aiohttp import web

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.errors import ApiError, StillRunning, StreamingNotSupported, UnsupportedMediaType
from asyncproxy.core.events import Observer, RelayHop
from asyncproxy.core.jobs import Job, Outcome
from asyncproxy.loop.write_coalescing import CoalescingTransport
from asyncproxy.service import JobService
from asyncproxy.web import job_responses
from asyncproxy.web.body_reader import expect_nothing
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.job_requests import JobRequests
from asyncproxy.web.wire_response import WireResponse
from asyncproxy.wire.request import Request

__all__ = ["PREFIX", "Relay"]

PREFIX = "/v1/relay"

# A result that was delivered under a path of its own is kept so long: its client may ask there again.
# One that was delivered at once has no path that anybody knows.
_KEEP_DELIVERED_S = 10.0

_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"

PassOn = Callable[[web.Request, str, list[bytes] | None], Awaitable[web.StreamResponse]]


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
    ) -> None:
        self._service = service
        self._requests = requests
        self._pass_on = pass_on
        self._observer = observer
        self.hold_s = hold_s
        self.max_hops = max_hops

    def add_routes(self, router: web.UrlDispatcher, endpoints: Iterable[Endpoint]) -> None:
        """Add the relayed paths of ``endpoints``. All others pass as if ``/relay`` were not there."""
        for endpoint in endpoints:
            begin = answering_errors(partial(self._begin, endpoint), endpoint=endpoint.name)
            router.add_post(endpoint.relay_path, begin, expect_handler=expect_nothing)
            go_on = answering_errors(partial(self._go_on, endpoint), endpoint=endpoint.name)
            # What has no id of ours below an endpoint is the gateway's own: /v1/responses/resp_1.
            resource = router.add_resource(f"{endpoint.relay_path}/{{id:{_UUID}}}")
            for method in ("GET", "POST"):  # POST is for `curl -L -X POST`
                resource.add_route(method, go_on, expect_handler=expect_nothing)
        router.add_route(
            "*",
            rf"{PREFIX}/{{rest:[\s\S]*}}",
            answering_errors(self._elsewhere),
            expect_handler=expect_nothing,
        )

    async def _elsewhere(self, request: web.Request) -> web.StreamResponse:
        return await self._pass_on(request, _without_prefix(request), None)

    async def _begin(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
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
                return await self._elsewhere(request)  # its body was not read
            self._service.refused(endpoint, error)
            raise
        del read  # nothing of the request is kept here while the job is held
        return await self._hold(endpoint, request, job, hop=0)

    async def _go_on(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        job = await self._requests.find(endpoint, request, request.match_info["id"])
        hop = request.query.get("hop", "")
        hops = int(hop) if hop.isascii() and hop.isdecimal() and len(hop) < 6 else 0
        return await self._hold(endpoint, request, job, hop=hops)

    async def _hold(
        self, endpoint: Endpoint, request: web.Request, job: Job | Outcome, *, hop: int
    ) -> web.StreamResponse:
        job = await self._service.wait(job, self.hold_s)
        if isinstance(job, Outcome):
            return await self._deliver(request, job, keep_s=_KEEP_DELIVERED_S if hop else 0)
        if hop >= self.max_hops:
            raise StillRunning(
                "The call is still running. The same request again goes on waiting for it."
            )
        self._observer.relay_hop(RelayHop(endpoint.name))
        location = f"{endpoint.relay_path}/{job.id}?hop={hop + 1}"
        return WireResponse(
            303, job_responses.header("Location", location) + b"Cache-Control: no-store\r\n", b""
        )

    async def _deliver(
        self, request: web.Request, outcome: Outcome, *, keep_s: float
    ) -> web.StreamResponse:
        response = job_responses.own_response(outcome)
        # Written here and not by the server, to know that the client was there to take it: if it was
        # not, its retry is to find this result.
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            return response
        transport = request.transport
        if isinstance(transport, CoalescingTransport):
            transport.flush()
        if transport is not None and not transport.is_closing():
            await self._service.delivered(outcome, keep_s)
        return response


def _without_prefix(request: web.Request) -> str:
    """The path and query as if ``/relay`` were not there, otherwise as they were sent."""
    raw_path = request.raw_path
    if not raw_path.startswith("/"):
        raw_path = request.rel_url.raw_path_qs
    return "/v1" + raw_path.removeprefix(PREFIX)


def _is_retry(request: web.Request) -> bool:
    """Whether an OpenAI SDK says that it has sent this request before."""
    count = request.headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdecimal() and int(count[:9]) > 0
