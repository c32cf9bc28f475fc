"""The memory caches of the SQLite store. They are bounded, and hold nothing that is not on disk."""

from __future__ import annotations

from typing import Final

import msgspec
from cachetools import LRUCache

from asyncproxy.core.jobs import Call, Outcome

__all__ = ["RecentCalls", "ResultCache"]

_OUTCOME_BYTES: Final = 16 * 1024 * 1024
_PART_BYTES: Final = 16 * 1024 * 1024
_CALL_BYTES: Final = 16 * 1024 * 1024

# An item larger than this share of a cache (a fourth) is not kept: it would push out too many others.
_LARGEST_SHARE: Final = 4


class RecentCalls:
    """Calls of jobs that were just accepted. A worker takes most of them soon."""

    def __init__(self) -> None:
        self._calls: dict[str, Call] = {}
        self._bytes = 0

    def add(self, job_id: str, call: Call) -> None:
        """Keep a call, if there is room."""
        size = call.size
        if self._bytes + size <= _CALL_BYTES:
            self._calls[job_id] = call
            self._bytes += size

    def take(self, job_id: str) -> Call | None:
        """Take a call out of the cache. None: it is not here."""
        call = self._calls.pop(job_id, None)
        if call is not None:
            self._bytes -= call.size
        return call


class ResultCache:
    """Recent outcomes and their parts. Several readers of one result share its parts."""

    def __init__(self) -> None:
        self._outcomes: LRUCache[str, Outcome] = LRUCache(_OUTCOME_BYTES, getsizeof=_size_in_memory)
        self._parts: LRUCache[tuple[str, int], bytes] = LRUCache(_PART_BYTES, getsizeof=len)

    def get(self, job_id: str) -> Outcome | None:
        """An outcome, without its parts."""
        return self._outcomes.get(job_id)

    def part(self, job_id: str, number: int) -> bytes | None:
        """A part of an outcome."""
        return self._parts.get((job_id, number))

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, if there is room."""
        if _size_in_memory(outcome) <= _OUTCOME_BYTES // _LARGEST_SHARE:
            self._outcomes[outcome.id] = outcome

    def add_finished(self, outcome: Outcome) -> Outcome:
        """Keep an outcome and its parts, which are stored by now. Returns it without its parts."""
        if outcome.parts:
            for number, part in enumerate(outcome.parts):
                self.add_part(outcome.id, number, part)
            outcome = msgspec.structs.replace(outcome, parts=(), part_sizes=outcome.sizes)
        self.add(outcome)
        return outcome

    def add_part(self, job_id: str, number: int, part: bytes) -> None:
        """Keep a part of an outcome."""
        if len(part) <= _PART_BYTES // _LARGEST_SHARE:
            self._parts[job_id, number] = part

    def drop(self, job_id: str) -> None:
        """Drop an outcome. Its parts are not read any more, and leave the cache by age."""
        self._outcomes.pop(job_id, None)


def _size_in_memory(outcome: Outcome) -> int:
    return outcome.size - sum(outcome.part_sizes)
