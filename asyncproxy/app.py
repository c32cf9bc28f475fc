"""The composition root: the parts are made, joined, and opened and closed around one yield."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from asyncproxy.config import settings
from asyncproxy.config.model import Config
from asyncproxy.core.errors import StartupError
from asyncproxy.core.events import Observer, Observers
from asyncproxy.core.ids import RandomIds
from asyncproxy.dispatch.dispatcher import Dispatcher
from asyncproxy.dispatch.workers import CallPolicy
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.loop.lag import measuring_lag
from asyncproxy.observe import tracing
from asyncproxy.observe.logs import LogObserver
from asyncproxy.observe.metrics import Metrics
from asyncproxy.observe.timed_store import TimedStore
from asyncproxy.observe.tracing import Tracer
from asyncproxy.service import JobService
from asyncproxy.stores.base import Store
from asyncproxy.stores.memory import MemoryStore
from asyncproxy.upstream.client import Upstream
from asyncproxy.upstream.model_routes import ModelRoutes
from asyncproxy.upstream.registry import UpstreamRegistry
from asyncproxy.web.admin import Admin
from asyncproxy.web.async_api import AsyncApi
from asyncproxy.web.body_reader import BodyReader, expect_nothing
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.fast_path import DIRECTORY, FastPathRouter
from asyncproxy.web.header_async import HeaderAsync
from asyncproxy.web.health import Health
from asyncproxy.web.job_requests import JobRequests
from asyncproxy.web.passthrough import PassThrough
from asyncproxy.web.relay import Relay
from asyncproxy.web.request_heads import RequestHeads
from asyncproxy.wire.credentials import KeyRing

__all__ = ["PROXY", "Proxy", "build_app", "setup"]

# Larger heads than this are refused, in bytes per line and in lines.
_MAX_LINE: Final = 32 * 1024
_MAX_HEADERS: Final = 256

_READ_BUFFER: Final = 64 * 1024

# A load balancer that keeps idle connections for as long as `client_timeout` must be the one who
# closes them: were it us, it would answer 502 to a request that crosses our close on the wire.
_KEEPALIVE_FACTOR: Final = 1.25


@dataclass(slots=True)
class Proxy:
    """The parts of a running proxy, and the configuration that they have."""

    config: Config
    observer: Observer
    tracer: Tracer
    metrics: Metrics
    body_reader: BodyReader
    keys: KeyRing
    routes: ModelRoutes
    service: JobService
    store: Store
    upstreams: UpstreamRegistry
    dispatcher: Dispatcher
    api: AsyncApi
    admin: Admin
    pass_through: PassThrough
    by_header: HeaderAsync
    relay: Relay
    directory: FastPathRouter

    async def running(self, app: web.Application) -> AsyncIterator[None]:
        """The cleanup context of an application: opens the parts, and closes them in reverse."""
        async with AsyncExitStack() as stack:
            # Last, in a thread: what is left goes out over the network.
            stack.push_async_callback(asyncio.to_thread, self.tracer.close)
            await stack.enter_async_context(measuring_lag(self.metrics.loop_lagged))
            await stack.enter_async_context(self.upstreams.connected())
            await stack.enter_async_context(self.store.opened(self.dispatcher.lost))
            await stack.enter_async_context(self.dispatcher.running(grace_s=self.config.shutdown_grace))
            if self.config.admin_address is not None:
                await stack.enter_async_context(self.admin.listening(*self.config.admin_address))
            yield

    async def reconfigure(self, config: Config) -> list[str]:
        """Work by another configuration from now on; no connection, call or job is cut.

        The keys whose change needs a restart: they stay as they were. If it raises, all does.
        """
        config, fixed = settings.as_far_as_it_can_change(self.config, config)
        following = await self.upstreams.prepare(settings.upstream_options(config))
        # From here on nothing awaits, and nothing can fail: no request sees one half of it.
        self.config = config
        self.upstreams.replace(following)
        self.routes.replace(settings.patterns(config))
        self.dispatcher.reconfigure(_pools(config, self.upstreams), deadline_s=config.jobs.deadline)
        self.keys.replace(settings.auth_keys(config))
        self.service.lifetimes = settings.lifetimes(config)
        self.store.limits = settings.limits(config)
        self.body_reader.max_bytes, self.body_reader.max_total_bytes = settings.bodies(config)
        self.relay.hold_s = config.jobs.relay_hold
        self.relay.max_hops = config.jobs.relay_max_hops
        return fixed


PROXY: Final = web.AppKey("asyncproxy", Proxy)


def build_app(config: Config) -> web.Application:
    """The whole proxy: an application, :func:`setup`, the paths of the gateway, the pass-through."""
    app = web.Application(handler_args=server_options(config))
    _setup(app, config, whole=True)
    proxy, endpoints = app[PROXY], settings.endpoints(config)
    app[DIRECTORY] = proxy.directory
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
    proxy.api.add_routes(app.router, settings.endpoints(config))
    if config.admin_address is None:
        proxy.admin.add_routes(app.router)
    else:
        proxy.admin.keep_away(app.router)
    app.cleanup_ctx.append(proxy.running)


def _paths(config: Config, *, whole: bool) -> frozenset[str]:
    """The paths that the routes of the parts have: those of :func:`setup`, or of the whole proxy."""
    paths = set()
    for endpoint in settings.endpoints(config):
        job = f"{endpoint.async_path}/{{id}}"
        paths |= {endpoint.async_path, job, f"{job}/content"}
        if whole:
            paths |= {endpoint.sync_path, endpoint.relay_path, f"{endpoint.relay_path}/{{id}}"}
    return frozenset(paths)


def _compose(config: Config, *, whole: bool) -> Proxy:
    metrics = Metrics()
    observer = Observers([LogObserver(), metrics])
    tracer = tracing.from_environment(os.environ)
    store = TimedStore(_store(config), observer)
    heavy_work = HeavyWork()
    upstreams = UpstreamRegistry(settings.upstream_options(config), heavy_work)
    routes = ModelRoutes(settings.patterns(config))
    dispatcher = Dispatcher(
        store,
        _pools(config, upstreams),
        deadline_s=config.jobs.deadline,
        observer=observer,
        route=routes.upstream_for,
        heavy_work=heavy_work,
        tracer=tracer,
    )
    bodies = settings.bodies(config)
    body_reader = BodyReader(
        max_bytes=bodies.max_bytes,
        max_total_bytes=bodies.max_total_bytes,
        timeout_s=config.client_timeout,
        heavy_work=heavy_work,
    )
    keys = KeyRing(settings.auth_keys(config), store.credential_keys[0])
    new_id = RandomIds()
    directory = FastPathRouter()
    service = JobService(
        store=store,
        dispatcher=dispatcher,
        routes=routes,
        new_id=new_id,
        observer=observer,
        tracer=tracer,
        heavy_work=heavy_work,
        lifetimes=settings.lifetimes(config),
    )
    requests = JobRequests(service, RequestHeads(keys, store.credential_keys[0]), body_reader)
    pass_through = PassThrough(
        upstreams=upstreams,
        routes=routes,
        body_reader=body_reader,
        keys=keys,
        observer=observer,
        tracer=tracer,
        new_id=new_id,
    )
    relay = Relay(
        service,
        requests,
        pass_through.send,
        observer=observer,
        hold_s=config.jobs.relay_hold,
        max_hops=config.jobs.relay_max_hops,
    )
    health = Health(
        store=store,
        dispatcher=dispatcher,
        waiting=lambda: service.waiting,
        passing=lambda: pass_through.under_way,
    )
    return Proxy(
        config=config,
        observer=observer,
        tracer=tracer,
        metrics=metrics,
        body_reader=body_reader,
        keys=keys,
        routes=routes,
        service=service,
        store=store,
        upstreams=upstreams,
        dispatcher=dispatcher,
        api=AsyncApi(service, requests, directory),
        admin=Admin(health, metrics, _paths(config, whole=whole)),
        pass_through=pass_through,
        by_header=HeaderAsync(service, requests, pass_through.handle, directory),
        directory=directory,
        relay=relay,
    )


def _store(config: Config) -> Store:
    """The store that the URL names. Those that need a library are loaded only then."""
    store, limits = config.store, settings.limits(config)
    scheme, _, rest = store.url.partition(":")
    if scheme == "memory":
        return MemoryStore(limits)
    if scheme == "sqlite":
        from asyncproxy.stores.sqlite.store import SqliteStore

        return SqliteStore(
            Path(unquote(rest.removeprefix("//"))),
            limits,
            keys=store.encryption_keys,
            seal_outcomes=store.encrypt_results,
            full_durability=store.durability == "full",
        )
    try:
        from asyncproxy.stores.redis.store import RedisStore
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("redis", "hiredis"):
            raise
        raise StartupError(
            "this store needs a library that is missing: pip install 'asyncproxy[redis]'"
        ) from None
    return RedisStore(
        store.url,
        limits,
        keys=store.encryption_keys,
        seal_outcomes=store.encrypt_results,
        prefix=store.prefix,
        lease_s=store.lease,
    )


def _pools(config: Config, upstreams: UpstreamRegistry) -> list[tuple[Upstream, CallPolicy]]:
    return [(upstreams[one.name], settings.policy(one)) for one in config.upstreams]


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
