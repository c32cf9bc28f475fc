"""The composition root: makes the parts, joins them, opens and closes them around one ``yield``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from aiohttp import web

from asyncproxy.config import settings
from asyncproxy.config.model import Config
from asyncproxy.core.errors import StartupError
from asyncproxy.core.events import Observer, Observers
from asyncproxy.core.ids import RandomIds
from asyncproxy.dispatch.dispatcher import Dispatcher
from asyncproxy.dispatch.verdict import CallPolicy
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
from asyncproxy.web.admin import Admin, no_pages
from asyncproxy.web.async_api import AsyncApi
from asyncproxy.web.body_reader import BodyReader
from asyncproxy.web.connection import connection_options
from asyncproxy.web.cors import answering_preflights, letting_in
from asyncproxy.web.errors import answering_errors
from asyncproxy.web.header_async import HeaderAsync
from asyncproxy.web.health import Health
from asyncproxy.web.job_requests import JobRequests
from asyncproxy.web.passthrough import PassThrough
from asyncproxy.web.relay import Relay
from asyncproxy.web.request_heads import RequestHeads
from asyncproxy.web.routes import Route, RouteTable, add_to
from asyncproxy.wire.credentials import KeyRing

__all__ = ["PROXY", "Proxy", "build_app", "compose", "make_store", "setup"]


@dataclass(slots=True)
class Proxy:
    """The parts of a running proxy, and the configuration that they work by."""

    config: Config
    observer: Observer
    log: LogObserver
    tracer: Tracer
    metrics: Metrics
    body_reader: BodyReader
    keys: KeyRing
    routes: ModelRoutes
    service: JobService
    store: Store
    upstreams: UpstreamRegistry
    dispatcher: Dispatcher
    admin: Admin
    pass_through: PassThrough
    relay: Relay
    table: RouteTable

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the parts for the length of a ``with``, and close them in reverse."""
        async with AsyncExitStack() as stack:
            # The tracer closes last, in a thread: it sends the remaining spans over the network.
            stack.push_async_callback(asyncio.to_thread, self.tracer.close)
            await stack.enter_async_context(measuring_lag(self.metrics.loop_lagged))
            await stack.enter_async_context(self.upstreams.connected())
            await stack.enter_async_context(self.store.opened(self.dispatcher.abort))
            await stack.enter_async_context(self.dispatcher.running(grace_s=self.config.shutdown_grace))
            if self.config.admin_address is not None:
                await stack.enter_async_context(self.admin.listening(*self.config.admin_address))
            yield

    async def running_with(self, app: web.Application) -> AsyncIterator[None]:
        """:meth:`running`, as the cleanup context of an application."""
        async with self.running():
            yield

    async def reconfigure(self, config: Config) -> list[str]:
        """Work by another configuration from now on. No connection, call or job is cut.

        Returns the keys whose change needs a restart; these keep their old values. If an upstream
        cannot be opened, this raises and the whole old configuration stays.
        """
        config, fixed = settings.as_far_as_it_can_change(self.config, config)
        following = await self.upstreams.prepare(settings.upstream_options(config))
        # From here on nothing awaits and nothing can fail: no request sees half a configuration.
        self.config = config
        self.upstreams.replace(following)
        self.routes.replace(settings.patterns(config))
        self.dispatcher.reconfigure(_pools(config, self.upstreams), deadline_s=config.jobs.deadline)
        self.log.base_urls = settings.base_urls(config)
        self.keys.replace(settings.auth_keys(config))
        self.service.lifetimes = settings.lifetimes(config)
        self.store.limits = settings.limits(config)
        self.body_reader.max_bytes, self.body_reader.max_total_bytes = settings.bodies(config)
        self.relay.hold_s = config.jobs.relay_hold
        self.relay.max_hops = config.jobs.relay_max_hops
        return fixed


PROXY: Final = web.AppKey("asyncproxy", Proxy)


def build_app(config: Config) -> web.Application:
    """The whole proxy as an aiohttp application: the async paths, the relay, and the pass-through.

    ``asyncproxy serve`` serves the same routes from a server of its own, whose connections do more:
    see :mod:`asyncproxy.web.connection`.
    """
    options = {**connection_options(config.client_timeout), "handler_cancellation": True}
    app = web.Application(handler_args=options)
    proxy = compose(config)
    _add(app, proxy, [Route("*", "/{rest}", proxy.table.dispatch)])
    return app


def setup(app: web.Application, config: Config) -> None:
    """Add the async paths and ``/-/`` to an application.

    Adds routes and one cleanup context, and keeps the proxy under the :data:`PROXY` key. Adds no
    middleware, so the host's routes work as before. The host's middlewares and signals see our
    responses as they see any other.
    """
    proxy = compose(config, whole=False)
    _add(app, proxy, proxy.table.routes)


def _add(app: web.Application, proxy: Proxy, routes: Iterable[Route]) -> None:
    app[PROXY] = proxy
    add_to(app.router, routes)
    app.cleanup_ctx.append(proxy.running_with)


def compose(config: Config, *, whole: bool = True) -> Proxy:
    """A proxy that is not running yet. Not ``whole``: without header form, relay and pass-through."""
    metrics = Metrics()
    log = LogObserver(settings.base_urls(config))
    observer = Observers([log, metrics])
    tracer = tracing.from_environment(os.environ)
    store = TimedStore(make_store(config), observer)
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
    endpoints = settings.endpoints(config)
    origins = config.cors.allow_origins
    routes_of_jobs = [*answering_preflights(AsyncApi(service, requests).routes(endpoints))]
    others: list[Route] = []
    if whole:
        routes_of_jobs += HeaderAsync(service, requests, pass_through.handle).routes(endpoints)
        relayed = relay.routes(endpoints)
        routes_of_jobs += answering_preflights(relayed) if origins else relayed
        others.append(Route("*", "/{rest}", answering_errors(pass_through.handle)))
    if origins:
        routes_of_jobs = [*letting_in(origins, routes_of_jobs)]
    admin = Admin(health, metrics, {route.path for route in routes_of_jobs})
    pages = admin.routes() if config.admin_address is None else [no_pages()]
    return Proxy(
        config=config,
        observer=observer,
        log=log,
        tracer=tracer,
        metrics=metrics,
        body_reader=body_reader,
        keys=keys,
        routes=routes,
        service=service,
        store=store,
        upstreams=upstreams,
        dispatcher=dispatcher,
        admin=admin,
        pass_through=pass_through,
        relay=relay,
        table=RouteTable([*routes_of_jobs, *pages, *others]),
    )


def make_store(config: Config) -> Store:
    """The store that ``store.url`` names. A store's library is imported only if the URL names it.

    Makes the key file of a new SQLite store. Raises :class:`StartupError`.
    """
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
