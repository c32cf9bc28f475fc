"""Serves until a signal, then drains: start, wait, stop, from top to bottom."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack

from asyncproxy.app import Proxy, compose
from asyncproxy.cli.check import log_config
from asyncproxy.cli.reload import Reload
from asyncproxy.config.model import Config
from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.observe.logs import json_line
from asyncproxy.stores.base import Store
from asyncproxy.version import __version__
from asyncproxy.web.server import listening

__all__ = ["announce_listening", "serve"]

logger = logging.getLogger("asyncproxy")


def _place(config: Config) -> str:
    """The store's URL without its password, for the log."""
    url = str(config.model_dump(mode="json")["store"]["url"])  # without its password
    return "memory: a restart loses them" if url == "memory://" else url


def announce_listening(url: str, config: Config, how: str) -> None:
    """Say on stdout that connections are accepted, in the format of the log."""
    names = ", ".join(upstream.name for upstream in config.upstreams)
    line = f"asyncproxy {__version__} listens on {url}, in front of {names}{how}"
    print(json_line(line, url=url) if config.log.format == "json" else line, flush=True)


async def serve(
    config: Config,
    *,
    announce: Callable[[str], None] | None = None,
    reload: Reload | None = None,
    worker: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT. ``announce`` gets the URL instead of a line on stdout.

    ``reload`` handles SIGHUP; without it, SIGHUP ends the process. ``worker``: other processes listen
    on the same address, and the end of stdin means that the supervisor has ended.
    """
    _allow_many_connections()
    proxy = compose(config)
    _spare_the_collector()
    stop, now = _stop_signals()
    if worker:
        _stop_at_the_end_of_stdin(stop)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(proxy.running())
        url = await stack.enter_async_context(
            listening(
                proxy.table,
                *config.address,
                client_timeout_s=config.client_timeout,
                max_connections=config.max_connections,
                reuse_port=worker,
            )
        )
        if reload is not None:
            await stack.enter_async_context(reload.at_hangup(proxy))
        log_config(config)
        logger.info("jobs and results are kept in %s", _place(config))
        if announce is None:
            pages = proxy.admin.url
            announce_listening(url, config, f", its own pages on {pages}" if pages else "")
        else:
            announce(url)
        await stop.wait()
        await _drain(proxy, now)


async def _drain(proxy: Proxy, now: asyncio.Event) -> None:
    """Invariant 8: no new jobs, and a grace period for requests and calls under way.

    A second signal ends the grace period. Meanwhile clients can still connect and fetch results.
    """
    grace_s = proxy.config.shutdown_grace
    logger.info("shutting down: up to %g s for the calls in flight", grace_s)
    parts = (proxy.dispatcher, proxy.pass_through)
    draining = [asyncio.create_task(part.drain(grace_s)) for part in parts]
    hurrying = asyncio.create_task(_cancel_when(now, draining))
    await asyncio.wait(draining)
    hurrying.cancel()
    await asyncio.gather(hurrying, return_exceptions=True)
    await proxy.dispatcher.drain(0)
    await _say_what_is_left(proxy.store)


async def _say_what_is_left(store: Store) -> None:
    try:
        usage = await store.usage()
    except StoreUnavailable as error:
        logger.warning("the store is out of reach at the end: %s", error.detail or error)
        return
    if store.survives:
        logger.info("stopped; unfinished jobs in the store: %d, results: %d", *usage[:2])
        return
    logger.log(
        logging.WARNING if usage.live or usage.results else logging.INFO,
        "the memory store ends with the process: %d unfinished jobs are lost, %d results dropped",
        usage.live,
        usage.results,
    )


async def _cancel_when(event: asyncio.Event, tasks: Iterable[asyncio.Task[None]]) -> None:
    await event.wait()
    for task in tasks:
        task.cancel()


def _stop_at_the_end_of_stdin(stop: asyncio.Event) -> None:
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()

    def ended() -> None:
        loop.remove_reader(stdin)  # a closed stdin stays readable for ever
        stop.set()

    loop.add_reader(stdin, ended)


def _stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first and the second SIGTERM or SIGINT."""
    stop, now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop, now


def _spare_the_collector() -> None:
    """Let the garbage collector run less often, and not over objects that live for ever.

    Jobs and results are freed by their reference counts: they are in no cycle, and most are not even
    tracked. With Python's own thresholds a busy proxy collects hundreds of times a second and frees
    nothing. Its slowest responses took six times as long.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _allow_many_connections() -> None:
    """Raise the limit of open files to the system's maximum: each client is an open file."""
    try:
        import resource
    except ImportError:  # not on this platform
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1_048_576
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
