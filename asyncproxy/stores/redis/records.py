"""The form of jobs in Redis: the fields of a hash, and the names of lanes."""

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

# The fields that a poll reads: state, claims, attempts, record, outcome, turn, expiry (lua/common.lua).
OUTCOME: Final = "f"
FIELDS: Final = ("s", "n", "a", "j", OUTCOME, "p", "e")

# The field of an outcome that is too large to be read with the other fields.
LARGE_OUTCOME: Final = "F"

_PENDING: Final = b"0"
_DONE: Final = b"2"


class Records:
    """Reads jobs from the replies of Redis. A ``clock`` decides about expiry. None: Redis does."""

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
    """Whether the outcome of a job is not among its :data:`FIELDS`."""
    return fields[0] == _DONE and fields[4] is None


def with_outcome(fields: Sequence[Any], outcome: bytes) -> list[Any]:
    """``fields`` with an outcome that was read by itself."""
    return [*fields[:4], outcome, *fields[5:]]


def lane_name(lane: Lane) -> str:
    """The name of a lane: its credential, then a hash of upstream and model, which may be long."""
    digest = blake2b(digest_size=16)
    for part in (lane.upstream.encode(), lane.model.encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return f"{lane.credential.hex()}/{digest.hexdigest()}"


def _as_it_is(job: Job, status: JobStatus, claims: bytes | int, attempts: bytes | int) -> Job:
    """``job`` with the fields that may have changed since its record was written."""
    return msgspec.structs.replace(job, status=status, claims=int(claims), attempts=int(attempts))
