"""Results on disk: how many there are, and what is read of them."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterable
from functools import partial

import msgspec

from asyncproxy.core.jobs import Outcome
from asyncproxy.stores.codec import Codec
from asyncproxy.stores.parts import read_parts
from asyncproxy.stores.sqlite import queries
from asyncproxy.stores.sqlite.caches import ResultCache
from asyncproxy.stores.sqlite.queries import Gone
from asyncproxy.stores.sqlite.readers import Readers

__all__ = ["Results"]


class Results:
    """Reads results through a cache, and counts them and their ``bytes``.

    Whoever writes tells what was written: :meth:`added`, :meth:`shortened`, :meth:`removed`.
    """

    def __init__(self, readers: Readers, codec: Codec) -> None:
        self.count = 0
        self.bytes = 0
        self._readers = readers
        self._codec = codec
        self._cache = ResultCache()
        self._changes = 0  # how often results were removed or shortened

    async def get(self, job_id: str) -> Outcome | None:
        """An outcome without its parts. Raises :class:`StoreUnavailable`."""
        return self._cache.get(job_id) or await self._read_outcome(job_id)

    async def _read_outcome(self, job_id: str) -> Outcome | None:
        changes = self._changes
        outcome = await self._readers.do(partial(self._find, job_id))
        if outcome is not None and self._changes == changes:
            self._cache.add(outcome)  # after a change, the outcome may be gone from disk
        return outcome

    def _find(self, job_id: str, on: sqlite3.Connection) -> Outcome | None:
        found = queries.outcome_of(job_id, on)
        if found is None:
            return None
        packed, expires_at = found
        return msgspec.structs.replace(self._codec.unpack_outcome(packed), expires_at=expires_at)

    async def read(self, outcome: Outcome, start: int = 0) -> AsyncIterator[bytes]:
        """The bytes of a result from ``start`` on. See :meth:`Store.read`."""
        async for piece in read_parts(outcome, start, partial(self._part, outcome.id)):
            yield piece

    async def _part(self, job_id: str, number: int) -> bytes | None:
        """A part of a result. Readers of one result share the parts that were read."""
        part = self._cache.part(job_id, number)
        if part is None:
            part = await self._readers.do(partial(self._open_part, job_id, number))
            if part is not None:
                self._cache.add_part(job_id, number, part)
        return part

    def _open_part(self, job_id: str, number: int, on: sqlite3.Connection) -> bytes | None:
        found = queries.part_of(job_id, number, on)
        return None if found is None else self._codec.unpack_part(found)

    def added(self, outcome: Outcome) -> Outcome:
        """Count an outcome that was written. Returns the outcome without its parts."""
        self.count += 1
        self.bytes += outcome.size
        return self._cache.add_finished(outcome)

    def shortened(self, outcome: Outcome, until: float) -> None:
        """Note that an outcome on disk expires at ``until``, and not later."""
        self._changes += 1
        self._cache.add(msgspec.structs.replace(outcome, expires_at=until))

    def removed(self, gone: Iterable[Gone]) -> None:
        """Take results off the count that are no longer on disk."""
        self._changes += 1
        for job_id, size in gone:
            self._cache.drop(job_id)
            self.count -= 1
            self.bytes -= size
