"""What a job is, and the steps it may take. Pure: nothing here awaits, reads a clock or keeps state.

    pending ──claim──▶ processing ──finish──▶ completed | failed
       ▲                   │
       └──────release──────┘   (retry later, lease lost, shutdown)

A live job is a :class:`Job`. Its :class:`Call` is the request to the upstream, and holds the request
body and the credential. A finished job is an :class:`Outcome`. These are three types on purpose: a poll
never reads a call, and an outcome has no field that could hold a body or a credential.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from itertools import chain
from typing import Final

import msgspec

from asyncproxy.core.errors import IllegalTransition

__all__ = [
    "TERMINAL",
    "TRANSITIONS",
    "Call",
    "Fallback",
    "Job",
    "JobStatus",
    "Lane",
    "Outcome",
    "UpstreamResponse",
    "advance",
    "check_step",
    "head_of",
]


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


# Bytes of memory beside the contents, as measured. A record is a job or a result, with its entries in
# the store's tables; a text is a further string.
_PER_RECORD: Final = 832
_PER_TEXT: Final = 128


class Lane(msgspec.Struct, frozen=True, gc=False):
    """The jobs that share one rate limit: the same upstream, credential and model."""

    upstream: str
    credential: bytes
    model: str

    def __repr__(self) -> str:
        return f"Lane({self.upstream!r}, …, {self.model!r})"


# gc=False: a store may hold a million of these, and none can be part of a reference cycle. If the
# garbage collector tracked them, each full collection would stop the event loop to walk them all.
class Call(msgspec.Struct, frozen=True, gc=False):
    """The request to an upstream. A call does not know its job."""

    endpoint: str
    target: str
    """The sync path, with the query as the client sent it: ``/v1/embeddings?api-version=1``."""
    head: str
    """The end-to-end header fields, the client's credential among them: see :func:`head_of`.

    Stored as one string: a quarter of the objects and half the bytes of a list of pairs.
    """
    body: bytes

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The header fields as pairs."""
        texts = self.head.split("\n") if self.head else []
        return list(zip(texts[::2], texts[1::2], strict=True))

    @property
    def size(self) -> int:
        """Bytes that a store counts for the call."""
        return len(self.body) + len(self.target) + _text_size(self.head)

    def __repr__(self) -> str:
        return f"Call({self.endpoint!r}, {len(self.body)} bytes)"


def head_of(headers: Iterable[tuple[str, str]]) -> str:
    """Header fields as the ``head`` of a :class:`Call`: names and values, each in a line of its own.

    Raises :class:`ValueError` for a name or value of several lines. No HTTP message has one.
    """
    texts = tuple(chain.from_iterable(headers))
    head = "\n".join(texts)
    if texts and head.count("\n") != len(texts) - 1:
        raise ValueError("a header field has several lines")
    return head


class UpstreamResponse(msgspec.Struct, frozen=True, gc=False):
    """The response of an upstream to a call."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    """The raw header fields."""
    pieces: tuple[bytes, ...]
    """The body with its content coding undone, in the pieces in which it arrived."""
    checked: bool = False
    """Whether the body is already known to be JSON text."""

    @property
    def body(self) -> bytes:
        """The whole body. A body of several pieces is copied."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)

    @property
    def size(self) -> int:
        """The size of the body in bytes."""
        return sum(map(len, self.pieces))

    def header(self, name: bytes) -> str | None:
        """The first value of a field, or None. ``name`` is lower case."""
        for key, value in self.headers:
            if key.lower() == name:
                return value.decode("latin-1")
        return None


class Fallback(msgspec.Struct, frozen=True, gc=False):
    """A model to try after another model has failed, and the upstream that serves it."""

    upstream: str
    model: str


class Job(msgspec.Struct, frozen=True, gc=False):
    """An accepted request that has no outcome yet."""

    id: str
    endpoint: str
    credential: bytes
    """The keyed hash of what the client authenticated with. Empty: the client had no credential."""
    upstream: str
    model: str
    created_at: float
    """Seconds since the epoch."""
    ttl_s: int
    """The lifetime of the result after completion."""
    status: JobStatus = JobStatus.PENDING
    attempts: int = 0
    """Calls that count against the retry limit."""
    claims: int = 0
    """How often a worker has taken the job. Only the holder of the last claim may change the job."""
    fallbacks: tuple[Fallback, ...] = ()
    """The models that have not been tried yet, in order."""
    fallback_index: int | None = None
    """How many fallbacks have been tried. None: the job was submitted without fallbacks."""
    request_id: str = ""
    """The client's ``X-Request-Id``. Empty: the client sent none."""
    traceparent: str = ""
    """The parent span of the calls: the span of the submit, or else the client's."""
    calls: int = 0
    """Calls that have ended, including those that do not count as attempts."""
    held_s: float = 0.0
    """How long the job has waited because its upstream was away or limited its rate."""
    held_at: float = 0.0
    """When the job was last told to wait so, in seconds since the epoch. 0: its last call counted."""

    @property
    def lane(self) -> Lane:
        return Lane(self.upstream, self.credential, self.model)

    @property
    def size(self) -> int:
        """Bytes that a store counts for the job, without its call."""
        size = _text_size(self.model) + _text_size(self.request_id) + len(self.traceparent)
        for fallback in self.fallbacks:
            size += _text_size(fallback.model) + _PER_TEXT
        return size + _PER_RECORD

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.endpoint!r}, {self.status.value})"


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a job. An outcome never changes."""

    id: str
    endpoint: str
    credential: bytes
    status: JobStatus
    status_code: int
    expires_at: float
    """Seconds since the epoch."""
    envelope: bytes
    """The response body of a poll. A result that is kept outside the envelope belongs at ``start``."""
    content_head: bytes
    """The header lines of the ``/content`` response, each with its CRLF."""
    start: int = 0
    """Without ``content`` and ``parts``, the bytes of ``/content`` are ``envelope[start:end]``."""
    end: int = 0
    content: bytes | None = None
    """The bytes of ``/content``, if the envelope does not hold them: an upstream's error, or media."""
    encoded: bool = False
    """Whether the Base64 of ``content`` or ``parts`` belongs into the envelope, at ``start``."""
    parts: tuple[bytes, ...] = msgspec.field(default=(), name="pieces")
    """The bytes of ``/content`` of a large result, until a store has taken them."""
    part_sizes: tuple[int, ...] = ()
    """The sizes of the parts that the store keeps by themselves: see :meth:`Store.read`."""

    def __repr__(self) -> str:
        return f"Outcome({self.id!r}, {self.endpoint!r}, {self.status.value}, {self.status_code})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the parts. Empty: the outcome itself holds the bytes of ``/content``."""
        if self.part_sizes or not self.parts:
            return self.part_sizes
        return tuple(map(len, self.parts))

    @property
    def is_spliced(self) -> bool:
        """Whether the parts belong into the envelope. The parts of an upstream's error do not."""
        return self.status is JobStatus.COMPLETED

    @property
    def size(self) -> int:
        """Bytes that a store counts for the outcome."""
        contents = len(self.envelope) + len(self.content_head) + len(self.content or b"")
        return contents + sum(self.sizes) + _PER_RECORD


def _text_size(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def check_step(job: Job, status: JobStatus) -> None:
    """Raise :class:`IllegalTransition` unless ``job`` may go to ``status`` in one step."""
    if status not in TRANSITIONS[job.status]:
        raise IllegalTransition(f"job {job.id}: {job.status.value} → {status.value}")


def advance(job: Job, status: JobStatus, *, attempts: int | None = None) -> Job:
    """``job`` after one step to ``status``. Raises as :func:`check_step`."""
    check_step(job, status)
    return msgspec.structs.replace(
        job,
        status=status,
        attempts=job.attempts if attempts is None else attempts,
        claims=job.claims + (status is JobStatus.PROCESSING),
    )
