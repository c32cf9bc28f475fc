"""What a job is, and the steps it may take. Pure: nothing here awaits, reads a clock or keeps state.

    pending ──claim──▶ processing ──finish──▶ completed | failed
       ▲                   │
       └──────release──────┘   (retry later, lease lost, shutdown)

A live job is a :class:`Job`. A finished one is a :class:`Finished`, another type on purpose: it has
no field that could hold a request body or a credential, so neither outlives the job.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from asyncproxy.errors import IllegalTransition

__all__ = ["TERMINAL", "TRANSITIONS", "Call", "Finished", "Job", "JobStatus", "Lane", "advance"]


class JobStatus(enum.StrEnum):
    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


TERMINAL: Final = frozenset({JobStatus.COMPLETED, JobStatus.FAILED})

TRANSITIONS: Final = {
    JobStatus.PENDING: frozenset({JobStatus.PROCESSING}),
    JobStatus.PROCESSING: frozenset({JobStatus.PENDING}) | TERMINAL,
    JobStatus.COMPLETED: frozenset[JobStatus](),
    JobStatus.FAILED: frozenset[JobStatus](),
}


class Lane(msgspec.Struct, frozen=True, gc=False):
    """The jobs that a rate limit of an upstream hits together."""

    upstream: str
    credential: bytes
    model: str


# gc=False: a store may hold a million of these, and none can be part of a reference cycle. Were they
# tracked, each full collection would walk them all and stop the event loop for as long.
class Call(msgspec.Struct, frozen=True, gc=False):
    """What is sent to an upstream. It knows nothing of the job that it is for.

    ``target`` is the path and query as the client sent them, of the sync path
    (``/v1/embeddings?api-version=1``). ``headers`` are end-to-end headers only, and hold the
    client's credential.
    """

    endpoint: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def __repr__(self) -> str:
        return f"Call({self.endpoint!r}, {len(self.body)} bytes)"


class Job(msgspec.Struct, frozen=True, gc=False):
    """An accepted request that has no outcome yet.

    ``credential`` is the keyed hash of what the client authenticated with, empty if it had nothing.
    ``created_at`` is in seconds since the epoch, ``ttl_s`` the lifetime of the result after
    completion. ``attempts`` counts the calls that were made and that count against the retry limit.
    """

    id: str
    endpoint: str
    credential: bytes
    upstream: str
    model: str
    created_at: float
    ttl_s: int
    call: Call
    status: JobStatus = JobStatus.PENDING
    attempts: int = 0

    @property
    def lane(self) -> Lane:
        return Lane(self.upstream, self.credential, self.model)

    @property
    def size(self) -> int:
        """Bytes of the request that a store has to keep: its body and headers."""
        call = self.call
        return len(call.body) + sum(len(k) + len(v) for k, v in call.headers)

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.endpoint!r}, {self.status.value})"


class Finished(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a job. It never changes.

    ``envelope`` is the whole body that a poll answers with. The bytes of ``/content`` are
    ``envelope[start:end]``, or ``content`` where the envelope does not hold them (an upstream's
    error is reshaped there). ``content_head`` holds the header lines that go with them, each with
    its CRLF.
    """

    id: str
    endpoint: str
    credential: bytes
    status: JobStatus
    status_code: int
    expires_at: float
    envelope: bytes
    content_head: bytes
    start: int = 0
    end: int = 0
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes that a store has to keep."""
        return len(self.envelope) + len(self.content_head) + len(self.content or b"")


def advance(job: Job, status: JobStatus, *, attempts: int | None = None) -> Job:
    """``job`` after one step to ``status``. Raises :class:`IllegalTransition` if there is none."""
    if status not in TRANSITIONS[job.status]:
        raise IllegalTransition(f"job {job.id}: {job.status.value} → {status.value}")
    return msgspec.structs.replace(
        job, status=status, attempts=job.attempts if attempts is None else attempts
    )
