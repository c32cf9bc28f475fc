"""Reads results that are stored in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.core.jobs import Outcome

__all__ = ["parts_from", "read_parts"]


def parts_from(sizes: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
    """Yields the number of each part from byte ``start`` on, and the bytes to skip in that part."""
    for number, size in enumerate(sizes):
        if start < size:
            yield number, start
            start = 0
        else:
            start -= size


async def read_parts(
    outcome: Outcome, start: int, fetch: Callable[[int], Awaitable[bytes | None]]
) -> AsyncIterator[bytes]:
    """Yields the content of a result in parts, from byte ``start`` on.

    ``fetch`` returns the part of a number, or None if the result is gone. Raises
    :class:`StoreUnavailable` then: a result may expire while it is being read.
    """
    for number, skipped in parts_from(outcome.sizes, start):
        part = outcome.parts[number] if outcome.parts else await fetch(number)
        if part is None:
            raise StoreUnavailable("The result has expired while it was being read.")
        yield part[skipped:] if skipped else part
