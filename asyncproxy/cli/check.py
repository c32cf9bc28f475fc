"""``asyncproxy check``: what ``serve`` would refuse, and what it would warn of."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator

from asyncproxy.config.load import dump_config, load_config
from asyncproxy.config.model import Config
from asyncproxy.wire import credentials

__all__ = ["check", "warn"]

logger = logging.getLogger("asyncproxy")


def check(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    print(dump_config(config), end="")
    for warning in _warnings(config):
        print(f"asyncproxy: warning: {warning}", file=sys.stderr)
    return 0


def _warnings(config: Config) -> Iterator[str]:
    """What can be meant as it is written, and rarely is."""
    for upstream in config.upstreams:
        given = {name.lower() for name in upstream.headers}
        if not config.auth.keys and given & {name.lower() for name in credentials.HEADERS}:
            yield (
                f"the upstream {upstream.name!r} gets a credential from `headers`, and `auth.keys` is "
                "empty: whoever reaches this proxy uses that credential, on every path of the gateway"
            )


def warn(config: Config) -> None:
    """Log what can be meant as it is written, and rarely is."""
    for warning in _warnings(config):
        logger.warning(warning)
