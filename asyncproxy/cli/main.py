"""The command line: arguments, signals, exit codes. 0 stopped, 1 cannot start, 2 wrong use."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from asyncproxy.cli.check import check, log_config
from asyncproxy.cli.reload import Reload
from asyncproxy.cli.serve import announce_listening, serve
from asyncproxy.cli.supervisor import Supervisor, reserved
from asyncproxy.config.load import load_config
from asyncproxy.config.model import Config
from asyncproxy.core.errors import ConfigError, StartupError
from asyncproxy.observe.logs import logging_to_stderr
from asyncproxy.version import __version__

__all__ = ["main"]

logger = logging.getLogger("asyncproxy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code."""
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

    serving = commands.add_parser("serve", help="run the proxy", allow_abbrev=False)
    source = serving.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="the YAML configuration")
    source.add_argument("--upstream", metavar="URL", help="the gateway's URL, instead of a file")
    serving.add_argument("--listen", metavar="HOST:PORT", help="overrides `listen`")
    serving.add_argument(
        "--workers", metavar="N", type=_count, default=1, help="processes on the port (redis:// only)"
    )
    serving.add_argument("--worker", metavar="NUMBER", type=int, help=argparse.SUPPRESS)
    serving.set_defaults(run=_serve)

    checking = commands.add_parser(
        "check", help="validate a configuration and print it in full", allow_abbrev=False
    )
    checking.add_argument("--config", metavar="FILE", required=True, help="the YAML configuration")
    checking.add_argument("--connect", action="store_true", help="ask the store and the gateways, too")
    checking.add_argument(
        "--reload", action="store_true", help="for a proxy that runs: its ports and files are its own"
    )
    checking.set_defaults(run=check)

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
        reload = Reload(read, log=log, log_config=log_config)
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
    """Give the pages of a worker a port of their own: ``admin_listen`` plus its number."""
    if config.admin_listen is None or config.admin_listen.endswith(":0"):
        return config
    host, _, port = config.admin_listen.rpartition(":")
    return config.model_copy(update={"admin_listen": f"{host}:{int(port) + number}"})


def _supervise(arguments: argparse.Namespace, config: Config) -> int:
    """Serve with several processes. They share only the store, so it has to be Redis."""
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
            announce_listening(f"http://{address}", config, how)

        if config.admin_listen is None:
            logger.warning("without admin_listen, a scrape of /-/metrics meets any one of the workers")

        supervisor = Supervisor(command, arguments.workers, grace_s=config.shutdown_grace)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(supervisor.run(ready))


def _demo(arguments: argparse.Namespace) -> int:
    # Imported here, because it loads numpy and a model.
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
    except ImportError:  # uvloop does not exist for this platform
        return None
    return uvloop.new_event_loop
