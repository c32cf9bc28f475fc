"""``asyncproxy check``: prints the errors and warnings that ``serve`` would have."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote

from asyncproxy.app import make_store
from asyncproxy.config import settings
from asyncproxy.config.load import dump_config, load_config
from asyncproxy.config.model import Config
from asyncproxy.core.errors import CallError, StartupError
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.observe.logs import logging_to_stderr
from asyncproxy.upstream.client import Upstream, UpstreamOptions
from asyncproxy.web.routes import RouteTable
from asyncproxy.web.server import listening
from asyncproxy.wire import credentials

__all__ = ["check", "log_config"]

logger = logging.getLogger("asyncproxy")

# The path that gateways are asked for. Every gateway has it, and a request costs nothing.
_ASKED = "/v1/models"


def check(arguments: argparse.Namespace) -> int:
    """Print all problems of a configuration. Returns the exit code that ``serve`` would have, or 0."""
    config = load_config(arguments.config)
    print(dump_config(config), end="")
    for warning in _warnings(config):
        _say(f"warning: {warning}")
    # The store and the client of the gateways warn in the log.
    with logging_to_stderr("warning", "text"):
        return asyncio.run(_check(config, running=arguments.reload, connect=arguments.connect))


async def _check(config: Config, *, running: bool, connect: bool) -> int:
    problems = [problem async for problem in _problems(config, running=running)]
    if connect and not problems:
        problems = [problem async for problem in _problems_outside(config)]
    for problem in problems:
        _say(problem)
    return 1 if problems else 0


def _say(line: str) -> None:
    print(f"asyncproxy: {line}", file=sys.stderr)


async def _problems(config: Config, *, running: bool) -> AsyncIterator[str]:
    """The problems that would keep a proxy from starting on this machine.

    ``running``: a proxy with this configuration runs, and has the ports and files itself.
    """
    try:
        _check_store(config, running=running)
    except StartupError as error:
        yield str(error)
    if running:
        return
    for address in (config.address, config.admin_address):
        if address is not None:
            try:
                async with listening(RouteTable([]), *address):
                    pass
            except StartupError as error:
                yield str(error)


def _check_store(config: Config, *, running: bool) -> None:
    scheme, _, rest = config.store.url.partition("://")
    if scheme != "sqlite":
        make_store(config)  # raises StartupError, and leaves nothing behind
        return
    from asyncproxy.stores.sqlite import file

    path = Path(unquote(rest))
    file.check(path, config.store.encryption_keys)
    if not running:
        file.check_unlocked(path)


async def _problems_outside(config: Config) -> AsyncIterator[str]:
    """The problems of the store, if it is a server, and of the gateways."""
    if config.store.url.startswith("redis"):
        from asyncproxy.stores.codec import Codec
        from asyncproxy.stores.redis.probe import probe

        store = config.store
        codec = Codec(store.encryption_keys, seal_outcomes=False, extra="redis")
        try:
            await probe(store.url, store.prefix, codec)
        except StartupError as error:
            yield str(error)
    for options in settings.upstream_options(config):
        if problem := await _ask(options):
            yield problem


async def _ask(options: UpstreamOptions) -> str:
    """The problem of a gateway. Empty if it answers: then its status is printed."""
    upstream = Upstream(options, HeavyWork())
    name = f"the upstream {options.name!r} at {options.base_url}"
    try:
        async with (
            asyncio.timeout(options.connect_s + 10),
            upstream.connected(),
            upstream.exchange("GET", _ASKED, b"") as exchange,
        ):
            status = exchange.status
    except (CallError, TimeoutError, OSError) as error:
        detail = error.detail if isinstance(error, CallError) else str(error)
        return f"{name} does not answer: {detail or type(error).__name__}"
    hints: dict[int, str] = {
        HTTPStatus.UNAUTHORIZED: ", as it wants a key: clients send theirs, or `headers` has one",
        HTTPStatus.FORBIDDEN: ", as it wants another key",
        HTTPStatus.NOT_FOUND: ": is the path of base_url right?",
    }
    _say(f"{name} answers {_ASKED} with {status}{hints.get(status, '')}")
    return ""


def _warnings(config: Config) -> Iterator[str]:
    """Warnings about settings that are valid and usually a mistake."""
    for upstream in config.upstreams:
        given = {name.lower() for name in upstream.headers}
        if not config.auth.keys and given & {name.lower() for name in credentials.HEADERS}:
            yield (
                f"the upstream {upstream.name!r} gets a credential from `headers`, and `auth.keys` is "
                "empty: whoever reaches this proxy uses that credential, on every path of the gateway"
            )


def log_config(config: Config) -> None:
    """Log the URLs of the upstreams, and warnings about settings that are usually a mistake."""
    for upstream in config.upstreams:
        logger.info("the upstream %s is at %s", upstream.name, upstream.base_url)
    for warning in _warnings(config):
        logger.warning(warning)
