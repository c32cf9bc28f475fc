"""The upstreams by name, while they are open: others can take their place without a call being cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.upstream.client import Upstream, UpstreamOptions

__all__ = ["UpstreamRegistry"]


class UpstreamRegistry(Mapping[str, Upstream]):
    """Open upstreams. One whose options stay the same keeps its connections."""

    def __init__(self, options: Iterable[UpstreamOptions], heavy_work: HeavyWork) -> None:
        self._heavy_work = heavy_work
        self._current = {one.name: Upstream(one, heavy_work) for one in options}
        self._open: dict[Upstream, AsyncExitStack] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def __getitem__(self, name: str) -> Upstream:
        return self._current[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current)

    def __len__(self) -> int:
        return len(self._current)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Hold the connections of all for the length of a ``with``."""
        try:
            await self._connect_all()
            yield
        finally:
            for task in self._retiring:
                task.cancel()
            await asyncio.gather(*self._retiring, return_exceptions=True)
            for upstream in list(self._open):
                await self._open.pop(upstream).aclose()

    async def prepare(self, options: Iterable[UpstreamOptions]) -> Mapping[str, Upstream]:
        """Open what is new or different among ``options``. Nothing else changes yet.

        Raises :class:`OSError` if one cannot be (its ``ca_file``), and then nothing is open for it.
        """
        following: dict[str, Upstream] = {}
        async with AsyncExitStack() as undo:
            for one in options:
                there = self._current.get(one.name)
                if there is not None and there.options == one:
                    following[one.name] = there
                else:
                    following[one.name] = fresh = Upstream(one, self._heavy_work)
                    await self._connect(fresh)
                    undo.push_async_callback(self._close, fresh)
            undo.pop_all()
        return following

    def replace(self, following: Mapping[str, Upstream]) -> None:
        """Let those that were prepared take over. The others close when their last call has ended."""
        leaving = [one for one in self._current.values() if following.get(one.name) is not one]
        self._current = dict(following)
        for upstream in leaving:
            task = asyncio.create_task(
                self._retire(upstream), name=f"asyncproxy-retire-{upstream.name}"
            )
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _connect_all(self) -> None:
        # Apart from `connected`, whose frame would keep the last one for as long as the proxy runs.
        for upstream in self._current.values():
            await self._connect(upstream)

    async def _connect(self, upstream: Upstream) -> None:
        stack = AsyncExitStack()
        await stack.enter_async_context(upstream.connected())
        self._open[upstream] = stack

    async def _close(self, upstream: Upstream) -> None:
        stack = self._open.pop(upstream, None)
        if stack is not None:
            await stack.aclose()

    async def _retire(self, upstream: Upstream) -> None:
        await upstream.idle()
        await self._close(upstream)
