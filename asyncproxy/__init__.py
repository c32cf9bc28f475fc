"""An async job API in front of any synchronous, OpenAI-compatible gateway."""

from asyncproxy.app import build_app, setup
from asyncproxy.config.load import load_config
from asyncproxy.version import __version__

__all__ = ["__version__", "build_app", "load_config", "setup"]
