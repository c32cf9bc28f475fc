"""The open upstreams by name. A reload replaces upstreams without cutting a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.upstream.client import Upstream, UpstreamOptions

__all__ = ["UpstreamRegistry"]


class UpstreamRegistry(Mapping[str, Upstream]):
    """The open upstreams by name. An upstream whose options stay the same keeps its connections."""

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
        """Keep all upstreams open for the length of a ``with``."""
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
        """Open the upstreams that are new or different in ``options``. Nothing else changes yet.

        Raises :class:`OSError` if an upstream cannot be opened (its ``ca_file`` is unreadable). Then
        the upstreams that were opened are closed again.
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
        """Switch to the prepared upstreams. The replaced ones close when their last call has ended."""
        leaving = [one for one in self._current.values() if following.get(one.name) is not one]
        self._current = dict(following)
        for upstream in leaving:
            task = asyncio.create_task(
                self._retire(upstream), name=f"asyncproxy-retire-{upstream.name}"
            )
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _connect_all(self) -> None:
        # Not inline: the frame of `connected` would keep its loop variable while the proxy runs.
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
