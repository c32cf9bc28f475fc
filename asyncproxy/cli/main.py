"""The command line: arguments, signals, exit codes. 0 stopped, 1 cannot start, 2 wrong use."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from asyncproxy.app import PROXY, Proxy, build_app
from asyncproxy.cli.reload import Reload
from asyncproxy.cli.supervisor import Supervisor, reserved
from asyncproxy.config.model import Config, dump_config, load_config
from asyncproxy.core.errors import ConfigError, StartupError, StoreUnavailable
from asyncproxy.observe.logs import logging_to_stderr
from asyncproxy.stores.base import Store
from asyncproxy.version import __version__
from asyncproxy.web.server import listening
from asyncproxy.wire import credentials

__all__ = ["main"]

logger = logging.getLogger("asyncproxy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the return value is the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        file = getattr(arguments, "config", None)
        for problem in error.problems:
            where = "" if file is None or problem.startswith(file) else f"{file}: "
            print(f"asyncproxy: {where}{problem}", file=sys.stderr)
        return 2
    except StartupError as error:
        print(f"asyncproxy: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncproxy",
        description="An async job API in front of any OpenAI-compatible gateway.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"asyncproxy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the proxy", allow_abbrev=False)
    source = serve.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="the YAML configuration")
    source.add_argument("--upstream", metavar="URL", help="the gateway's URL, instead of a file")
    serve.add_argument("--listen", metavar="HOST:PORT", help="overrides `listen`")
    serve.add_argument(
        "--workers", metavar="N", type=_count, default=1, help="processes on the port (redis:// only)"
    )
    serve.add_argument("--worker", metavar="NUMBER", type=int, help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check", help="validate a configuration and print it in full", allow_abbrev=False
    )
    check.add_argument("--config", metavar="FILE", required=True, help="the YAML configuration")
    check.set_defaults(run=_check)

    demo = commands.add_parser(
        "demo", help="a local embedding model behind the proxy", allow_abbrev=False
    )
    demo.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:8080")
    demo.add_argument(
        "--delay", metavar="SECONDS", type=_seconds, default=0.0, help="make the model slow"
    )
    demo.set_defaults(run=_demo)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 256:
        raise argparse.ArgumentTypeError("between 1 and 256")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError("between 0 and 3600 seconds")
    return value


def _serve(arguments: argparse.Namespace) -> int:
    config = _configured(arguments)
    with logging_to_stderr(config.log.level, config.log.format) as log:
        read = None if arguments.config is None else lambda: _configured(arguments)
        if arguments.workers > 1:
            return _supervise(arguments, config)
        reload = Reload(read, log=log, warn=_warn)
        return _run(lambda: serve(config, reload=reload, worker=arguments.worker is not None))


def _configured(arguments: argparse.Namespace) -> Config:
    if arguments.config is not None:
        config = load_config(arguments.config)
    else:
        config = load_config({"upstreams": [{"base_url": arguments.upstream}]}, environ={})
    if arguments.worker is not None:
        config = _with_pages_of_its_own(config, arguments.worker)
    return config if arguments.listen is None else _listening_on(config, arguments.listen)


def _with_pages_of_its_own(config: Config, number: int) -> Config:
    """What a worker is, it has to say on a port of its own: the first one's, and those behind it."""
    if config.admin_listen is None or config.admin_listen.endswith(":0"):
        return config
    host, _, port = config.admin_listen.rpartition(":")
    return config.model_copy(update={"admin_listen": f"{host}:{int(port) + number}"})


def _supervise(arguments: argparse.Namespace, config: Config) -> int:
    """Serve with several processes. They share nothing but the store, so it has to be a shared one."""
    if not config.store.url.startswith("redis"):
        raise ConfigError([f"--workers: {arguments.workers} processes need a store.url of redis://"])
    source = ["--config", arguments.config] if arguments.config else ["--upstream", arguments.upstream]
    with reserved(*config.address) as (host, port):
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

        def command(number: int) -> Sequence[str]:
            worker = ["serve", *source, "--listen", address, "--worker", str(number)]
            return [sys.executable, "-m", "asyncproxy", *worker]

        def ready() -> None:
            how = f" with {arguments.workers} workers"
            if config.admin_listen is not None:
                how += f", the pages of each on the ports from {config.admin_listen} on"
            _announce(f"http://{address}", config, how)

        if config.admin_listen is None:
            logger.warning("without admin_listen, a scrape of /-/metrics meets any one of the workers")

        supervisor = Supervisor(command, arguments.workers, grace_s=config.shutdown_grace)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(supervisor.run(ready))


def _place(config: Config) -> str:
    """Where jobs are kept, for the log."""
    url = str(config.model_dump(mode="json")["store"]["url"])  # without its password
    return "memory: a restart loses them" if url == "memory://" else url


def _announce(url: str, config: Config, how: str) -> None:
    names = ", ".join(upstream.name for upstream in config.upstreams)
    print(f"asyncproxy {__version__} listens on {url}, in front of {names}{how}", flush=True)


def _check(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    print(dump_config(config), end="")
    for warning in _warnings(config):
        print(f"asyncproxy: warning: {warning}", file=sys.stderr)
    return 0


def _warn(config: Config) -> None:
    for warning in _warnings(config):
        logger.warning(warning)


def _warnings(config: Config) -> Iterator[str]:
    """What can be meant as it is written, and rarely is."""
    for upstream in config.upstreams:
        given = {name.lower() for name in upstream.headers}
        if not config.auth.keys and given & {name.lower() for name in credentials.HEADERS}:
            yield (
                f"the upstream {upstream.name!r} gets a credential from `headers`, and `auth.keys` is "
                "empty: whoever reaches this proxy uses that credential, on every path of the gateway"
            )


def _demo(arguments: argparse.Namespace) -> int:
    # Loads numpy and a model: only for those who ask for it.
    from asyncproxy.cli import demo

    config = _listening_on(load_config({"upstreams": [{"base_url": "http://demo"}]}), arguments.listen)
    with logging_to_stderr("info", "text"):
        return _run(lambda: demo.run(config, arguments.delay, serve))


def _listening_on(config: Config, listen: str) -> Config:
    try:
        return Config.model_validate({**dict(config), "listen": listen})
    except ValueError:
        raise ConfigError([f"--listen: found {listen!r}; expected host:port"]) from None


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())
    return 0


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # there is none for this platform
        return None
    return uvloop.new_event_loop


async def serve(
    config: Config,
    *,
    announce: Callable[[str], None] | None = None,
    reload: Reload | None = None,
    worker: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT. ``announce`` gets the URL instead of a line on stdout.

    ``reload`` is what SIGHUP does; without one it ends the process, as ever. ``worker``: others listen
    on the same address, and the end of stdin is the end of their supervisor.
    """
    _allow_many_connections()
    _warn(config)
    app = build_app(config)
    _spare_the_collector()
    stop, now = _stop_signals()
    if worker:
        _stop_at_the_end_of_stdin(stop)
    timeout_s = config.client_timeout
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(
            listening(app, *config.address, send_timeout_s=timeout_s, reuse_port=worker)
        )
        if reload is not None:
            await stack.enter_async_context(reload.at_hangup(app[PROXY]))
        logger.info("jobs and results are kept in %s", _place(config))
        if announce is None:
            pages = app[PROXY].admin.url
            _announce(url, config, f", its own pages on {pages}" if pages else "")
        else:
            announce(url)
        await stop.wait()
        await _drain(app[PROXY], now)


async def _drain(proxy: Proxy, now: asyncio.Event) -> None:
    """Invariant 8: no new jobs, and the grace for what is under way. A second signal cuts it short.

    We go on listening meanwhile, so that clients can still fetch what becomes ready.
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
        loop.remove_reader(stdin)  # an end stays readable
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
    """Let the garbage collector run less often, and not over what stays for ever.

    Jobs and results are freed by their reference counts: nothing of them is in a cycle, and most is not
    even tracked. With Python's own thresholds a busy proxy collects hundreds of times a second, in
    vain; its slowest answers were six times slower for it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _allow_many_connections() -> None:
    """Raise the limit of open files to what the system allows: each client is one."""
    try:
        import resource
    except ImportError:  # not on this platform
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1_048_576
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
