"""SIGHUP: reads the configuration again, and applies the changes that need no restart."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from asyncproxy.app import Proxy
from asyncproxy.config.model import Config
from asyncproxy.core.errors import ConfigError
from asyncproxy.core.events import ConfigReloaded
from asyncproxy.observe.logs import Log

__all__ = ["Reload"]

logger = logging.getLogger(__name__)


class Reload:
    """Reads the configuration again.

    ``read`` returns the new configuration, or raises :class:`ConfigError`; None: there is no file.
    ``log_config`` is called with each configuration that is applied. ``log`` gets the new log settings.
    """

    def __init__(
        self, read: Callable[[], Config] | None, *, log: Log, log_config: Callable[[Config], None]
    ) -> None:
        self._read = read
        self._log = log
        self._log_config = log_config

    @asynccontextmanager
    async def at_hangup(self, proxy: Proxy) -> AsyncIterator[None]:
        """Reload at each SIGHUP for the length of a ``with``. Several at once cause one reload."""
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, asked.set)
        task = asyncio.create_task(self._go_on(proxy, asked), name="asyncproxy-reload")
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _go_on(self, proxy: Proxy, asked: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            await self.now(proxy)

    async def now(self, proxy: Proxy) -> None:
        """Reload once. After a problem, the log has the reasons and nothing has changed."""
        if self._read is None:
            logger.warning("SIGHUP: there is no file to read again; the proxy was started without one")
            return
        try:
            config = await asyncio.to_thread(self._read)
            fixed = await proxy.reconfigure(config)
        except ConfigError as error:
            for problem in error.problems:
                logger.error("the configuration stays as it was: %s", problem)  # noqa: TRY400
            proxy.observer.config_reloaded(ConfigReloaded(succeeded=False))
            return
        except Exception:
            logger.exception("the configuration stays as it was: an error inside the proxy")
            proxy.observer.config_reloaded(ConfigReloaded(succeeded=False))
            return
        self._log.configure(config.log.level, config.log.format)
        self._log_config(config)
        if fixed:
            logger.warning("only a restart changes %s: it stays as it was", ", ".join(fixed))
        logger.info("the configuration was read again")
        proxy.observer.config_reloaded(ConfigReloaded(succeeded=True))
