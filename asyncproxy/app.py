"""The composition root: the parts are made, joined, and opened and closed around one yield."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from asyncproxy.admin import Admin
from asyncproxy.api import Api
from asyncproxy.by_header import ByHeader
from asyncproxy.config import Config, UpstreamConfig
from asyncproxy.credentials import KeyRing
from asyncproxy.dispatcher import Dispatcher, Policy
from asyncproxy.endpoints import ENDPOINTS, Endpoint
from asyncproxy.events import Observers
from asyncproxy.health import Health
from asyncproxy.ids import RandomIds
from asyncproxy.intake import Intake, expect_nothing
from asyncproxy.logs import LogObserver
from asyncproxy.loop_lag import measuring_lag
from asyncproxy.metrics import Metrics
from asyncproxy.middleware import answering_errors
from asyncproxy.passthrough import PassThrough
from asyncproxy.relay import Relay
from asyncproxy.routing import ModelRoutes
from asyncproxy.service import JobService, Lifetimes
from asyncproxy.stores.base import Limits, Store
from asyncproxy.stores.memory import MemoryStore
from asyncproxy.stores.observed import ObservedStore
from asyncproxy.upstream import Upstream, UpstreamOptions

__all__ = ["PROXY", "Proxy", "build_app", "setup"]

# Larger heads than this are refused, in bytes per line and in lines.
_MAX_LINE: Final = 32 * 1024
_MAX_HEADERS: Final = 256

_READ_BUFFER: Final = 64 * 1024

# A load balancer that keeps idle connections for as long as `client_timeout` must be the one who
# closes them: were it us, it would answer 502 to a request that crosses our close on the wire.
_KEEPALIVE_FACTOR: Final = 1.25


@dataclass(frozen=True, slots=True)
class Proxy:
    """The parts of a running proxy."""

    config: Config
    metrics: Metrics
    store: Store
    upstreams: dict[str, Upstream]
    dispatcher: Dispatcher
    api: Api
    admin: Admin
    pass_through: PassThrough
    by_header: ByHeader
    relay: Relay

    async def running(self, app: web.Application) -> AsyncIterator[None]:
        """The cleanup context of an application: opens the parts, and closes them in reverse."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(measuring_lag(self.metrics.loop_lagged))
            for upstream in self.upstreams.values():
                await stack.enter_async_context(upstream.connected())
            await stack.enter_async_context(self.store.opened(self.dispatcher.lost))
            await stack.enter_async_context(self.dispatcher.running(grace_s=self.config.shutdown_grace))
            if self.config.admin_address is not None:
                await stack.enter_async_context(self.admin.listening(*self.config.admin_address))
            yield


PROXY: Final = web.AppKey("asyncproxy", Proxy)


def build_app(config: Config) -> web.Application:
    """The whole proxy: an application, :func:`setup`, the paths of the gateway, the pass-through."""
    app = web.Application(handler_args=server_options(config))
    _setup(app, config, whole=True)
    proxy, endpoints = app[PROXY], _endpoints(config)
    proxy.relay.add_routes(app.router, endpoints)
    proxy.by_header.add_routes(app.router, endpoints)
    app.router.add_route(
        "*",
        r"/{path:[\s\S]*}",
        answering_errors(proxy.pass_through.handle),
        expect_handler=expect_nothing,
    )
    return app


def setup(app: web.Application, config: Config) -> None:
    """Add the async paths and ``/-/`` to an application.

    Adds routes and one cleanup context, keeps everything under the :data:`PROXY` key, and touches
    nothing else: no middleware, so the host's routes are as they were, and the host's own
    middlewares and signals see ours as any other.
    """
    _setup(app, config, whole=False)


def _setup(app: web.Application, config: Config, *, whole: bool) -> None:
    proxy = _compose(config, whole=whole)
    app[PROXY] = proxy
    proxy.api.add_routes(app.router, _endpoints(config))
    if config.admin_address is None:
        proxy.admin.add_routes(app.router)
    else:
        proxy.admin.keep_away(app.router)
    app.cleanup_ctx.append(proxy.running)


def _endpoints(config: Config) -> list[Endpoint]:
    return [ENDPOINTS[name] for name in config.jobs.endpoints]


def _paths(config: Config, *, whole: bool) -> frozenset[str]:
    """The paths that the routes of the parts have: those of :func:`setup`, or of the whole proxy."""
    paths = set()
    for endpoint in _endpoints(config):
        job = f"{endpoint.async_path}/{{id}}"
        paths |= {endpoint.async_path, job, f"{job}/content"}
        if whole:
            paths |= {endpoint.sync_path, endpoint.relay_path, f"{endpoint.relay_path}/{{id}}"}
    return frozenset(paths)


def _compose(config: Config, *, whole: bool) -> Proxy:
    jobs = config.jobs
    metrics = Metrics()
    observer = Observers([LogObserver(), metrics])
    store = ObservedStore(MemoryStore(_limits(config)), observer)
    upstreams = {
        upstream.name: Upstream(_upstream_options(upstream, jobs.max_result_bytes))
        for upstream in config.upstreams
    }
    routes = ModelRoutes([(upstream.name, upstream.models) for upstream in config.upstreams])
    dispatcher = Dispatcher(
        store,
        [(upstreams[upstream.name], _policy(upstream)) for upstream in config.upstreams],
        deadline_s=jobs.deadline,
        observer=observer,
        route=routes.upstream_for,
    )
    # A body that fills all that waiting requests may take is as much as can ever be accepted.
    largest = min(jobs.max_request_bytes, config.store.max_bytes // 2)
    intake = Intake(
        max_bytes=largest,
        max_total_bytes=config.store.max_bytes // 2,
        timeout_s=config.client_timeout,
    )
    keys = KeyRing([key.get_secret_value() for key in config.auth.keys], store.credential_keys[0])
    new_id = RandomIds()
    service = JobService(
        store=store,
        dispatcher=dispatcher,
        intake=intake,
        routes=routes,
        keys=keys,
        new_id=new_id,
        observer=observer,
        lifetimes=Lifetimes(int(jobs.result_ttl) or 1, int(jobs.max_result_ttl) or 1, jobs.max_wait),
    )
    pass_through = PassThrough(
        upstreams=upstreams,
        routes=routes,
        intake=intake,
        keys=keys,
        observer=observer,
        new_id=new_id,
    )
    relay = Relay(
        service,
        pass_through.send,
        intake=intake,
        observer=observer,
        hold_s=jobs.relay_hold,
        max_hops=jobs.relay_max_hops,
    )
    health = Health(
        store=store,
        dispatcher=dispatcher,
        waiting=lambda: service.waiting,
        passing=lambda: pass_through.under_way,
    )
    return Proxy(
        config=config,
        metrics=metrics,
        store=store,
        upstreams=upstreams,
        dispatcher=dispatcher,
        api=Api(service),
        admin=Admin(health, metrics, _paths(config, whole=whole)),
        pass_through=pass_through,
        by_header=ByHeader(service, pass_through.handle),
        relay=relay,
    )


def _limits(config: Config) -> Limits:
    jobs = config.jobs
    return Limits(jobs.max_pending, jobs.max_pending_per_credential, config.store.max_bytes)


def _upstream_options(config: UpstreamConfig, max_result_bytes: int) -> UpstreamOptions:
    return UpstreamOptions(
        name=config.name,
        base_url=config.base_url,
        headers=[(name, secret.get_secret_value()) for name, secret in config.headers.items()],
        connect_s=config.timeout.connect,
        total_s=config.timeout.total,
        max_result_bytes=max_result_bytes,
        ca_file=config.ca_file,
        insecure_skip_verify=config.insecure_skip_verify,
    )


def _policy(config: UpstreamConfig) -> Policy:
    # Whatever stands there: it was the operator's to know.
    values = [secret.get_secret_value() for secret in config.headers.values()]
    hidden = {part for value in values for part in (value, value.rpartition(" ")[2]) if part}
    return Policy(
        concurrency=config.concurrency,
        attempts=config.retry.attempts,
        backoff_s=config.retry.backoff,
        max_backoff_s=config.retry.max_backoff,
        hidden=frozenset(hidden),
    )


def server_options(config: Config) -> dict[str, Any]:
    """How aiohttp's server has to treat connections, whichever runner it is started by."""
    return {
        "access_log": None,  # ours has one line per job and per request passed on
        "auto_decompress": False,  # a compressed body goes through as it is
        "handler_cancellation": True,  # a client that leaves takes its upstream call with it
        "keepalive_timeout": config.client_timeout * _KEEPALIVE_FACTOR,
        "max_line_size": _MAX_LINE,
        "max_field_size": _MAX_LINE,
        "max_headers": _MAX_HEADERS,
        "read_bufsize": _READ_BUFFER,
    }
