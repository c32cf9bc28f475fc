"""Jobs as they are in Redis: the fields of a hash, and the names of lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec

from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.core.jobs import Job, JobStatus, Lane, Outcome
from asyncproxy.stores.codec import Codec, Unreadable
from asyncproxy.stores.redis.positions import QueuePositions

__all__ = [
    "FIELDS",
    "LARGE_OUTCOME",
    "OUTCOME",
    "Records",
    "is_large",
    "lane_name",
    "with_outcome",
]

# What a poll reads: state, claims, attempts, record, outcome, turn, expiry (scripts/common.lua).
OUTCOME: Final = "f"
FIELDS: Final = ("s", "n", "a", "j", OUTCOME, "p", "e")

# Where an outcome is that is too large to be read with all others.
LARGE_OUTCOME: Final = "F"

_PENDING: Final = b"0"
_DONE: Final = b"2"


class Records:
    """Reads what scripts and polls bring. A ``clock``, if any, decides what has expired, not Redis."""

    def __init__(self, codec: Codec, places: QueuePositions, clock: Callable[[], float] | None) -> None:
        self._codec = codec
        self._places = places
        self._clock = clock

    def found(self, job_id: str, fields: Sequence[Any]) -> Job | Outcome | None:
        """A job from its :data:`FIELDS`. Raises :class:`StoreUnavailable` if they cannot be read."""
        state, claims, attempts, record, outcome, turn, expiry = fields
        if state is None:
            return None
        try:
            if state == _DONE:
                if self._clock is not None and int(expiry) <= self._clock() * 1000:
                    return None
                return self._codec.unpack_outcome(outcome)
            job = self._codec.unpack_job(record)
        except Unreadable as error:
            unavailable = StoreUnavailable("The job cannot be read just now. Try again later.")
            unavailable.detail = f"job {job_id}: {error}"
            raise unavailable from None
        if state == _PENDING:
            self._places.note_turn(job_id, int(turn))
            return _as_it_is(job, JobStatus.PENDING, claims, attempts)
        return _as_it_is(job, JobStatus.PROCESSING, claims, attempts)

    def claimed(self, record: bytes, claims: int, attempts: bytes) -> Job:
        """A job that a script has claimed."""
        return _as_it_is(self._codec.unpack_job(record), JobStatus.PROCESSING, claims, attempts)


def is_large(fields: Sequence[Any]) -> bool:
    """Whether a job has an outcome that is not among its :data:`FIELDS`."""
    return fields[0] == _DONE and fields[4] is None


def with_outcome(fields: Sequence[Any], outcome: bytes) -> list[Any]:
    """The fields of a job whose outcome was read by itself."""
    return [*fields[:4], outcome, *fields[5:]]


def lane_name(lane: Lane) -> str:
    """A lane as a name: its credential, then all of it in 16 bytes, for a model may be a long text."""
    digest = blake2b(digest_size=16)
    for part in (lane.upstream.encode(), lane.model.encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return f"{lane.credential.hex()}/{digest.hexdigest()}"


def _as_it_is(job: Job, status: JobStatus, claims: bytes | int, attempts: bytes | int) -> Job:
    """The record is that of the last submit or release; these fields have changed since."""
    return msgspec.structs.replace(job, status=status, claims=int(claims), attempts=int(attempts))
