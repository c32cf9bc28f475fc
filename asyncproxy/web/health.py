"""The state of the parts, read at a probe or a scrape. A slow store delays it by 0.8 s at most."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.dispatch.dispatcher import Dispatcher
from asyncproxy.observe.metrics import Fill, Readings
from asyncproxy.stores.base import Store

__all__ = ["Check", "Health", "Presence"]

logger = logging.getLogger(__name__)

# Less than a second: probes and load balancers wait for a second by default.
_STORE_TIMEOUT_S = 0.8

T = TypeVar("T")


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """One condition for accepting jobs: ``ok``, or ``unavailable`` with a ``reason``."""

    status: str
    reason: str = ""


class Presence(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of an upstream: ``ok``, or ``away`` for ``away_s``."""

    status: str
    away_s: float = 0.0


class Health:
    """Reads the state of the parts.

    ``waiting`` returns how many clients wait for a job, ``passing`` how many requests pass through.
    """

    def __init__(
        self,
        *,
        store: Store,
        dispatcher: Dispatcher,
        waiting: Callable[[], int],
        passing: Callable[[], int],
        store_timeout_s: float = _STORE_TIMEOUT_S,
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._waiting = waiting
        self._passing = passing
        self._store_timeout_s = store_timeout_s

    async def checks(self) -> dict[str, Check]:
        """The conditions for accepting jobs. The reasons name nothing internal."""
        away = await self._store_away()
        return {
            "draining": _check("shutting down" if self._dispatcher.draining else ""),
            "store": _check(away),
        }

    def upstreams(self) -> dict[str, Presence]:
        """The states of the upstreams. While an upstream is away, its jobs wait and are accepted."""
        return {
            name: Presence("away", round(away_s, 1)) if away_s else Presence("ok")
            for name, away_s in self._dispatcher.away.items()
        }

    async def _store_away(self) -> str:
        try:
            await self._in_time(self._store.check())
        except TimeoutError:
            return "the store does not answer"
        except StoreUnavailable as error:
            logger.debug("not ready: %s", error.detail or error)
            return "the store is out of reach"
        return ""

    async def readings(self) -> Readings:
        """The values of the gauges. Those of the store are missing if it does not answer in time."""
        try:
            fill = await self._in_time(self._fill())
        except (TimeoutError, StoreUnavailable):
            fill = None
        limits = self._store.limits
        return Readings(
            fill=fill,
            max_live=limits.max_live,
            max_bytes=limits.max_bytes,
            calls=self._dispatcher.calls,
            limits=self._dispatcher.limits,
            away=self._dispatcher.away,
            waiting=self._waiting(),
            passing=self._passing(),
            draining=self._dispatcher.draining,
        )

    async def _fill(self) -> Fill:
        return Fill(await self._store.usage(), await self._store.states())

    async def _in_time(self, answer: Awaitable[T]) -> T:
        async with asyncio.timeout(self._store_timeout_s):
            return await answer


def _check(reason: str) -> Check:
    return Check("unavailable", reason) if reason else Check("ok")
