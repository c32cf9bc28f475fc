"""What a job is, and the steps it may take. Pure: nothing here awaits, reads a clock or keeps state.

    pending ──claim──▶ processing ──finish──▶ completed | failed
       ▲                   │
       └──────release──────┘   (retry later, lease lost, shutdown)

A live job is a :class:`Job`, and what is sent for it a :class:`Call`, which holds the request body and
the credential. A finished one is a :class:`Outcome`. They are types of their own on purpose: a poll
never touches a call, and an outcome has no field that could hold one.
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


# Bytes of memory beside the contents, measured: of a job or result, with its places in the store's
# tables, and of another text.
_PER_RECORD: Final = 832
_PER_TEXT: Final = 128


class Lane(msgspec.Struct, frozen=True, gc=False):
    """The jobs that a rate limit of an upstream hits together."""

    upstream: str
    credential: bytes
    model: str

    def __repr__(self) -> str:
        return f"Lane({self.upstream!r}, …, {self.model!r})"


# gc=False: a store may hold a million of these, and none can be part of a reference cycle. Were they
# tracked, each full collection would walk them all and stop the event loop for as long.
class Call(msgspec.Struct, frozen=True, gc=False):
    """What is sent to an upstream. It knows nothing of the job that it is for.

    ``target`` is the path and query as the client sent them, of the sync path
    (``/v1/embeddings?api-version=1``). ``head`` are the end-to-end header fields only, and holds the
    client's credential: see :func:`head_of`. As one text, it is a fourth of the objects and half of the
    bytes that pairs are.
    """

    endpoint: str
    target: str
    head: str
    body: bytes

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The header fields as pairs."""
        texts = self.head.split("\n") if self.head else []
        return list(zip(texts[::2], texts[1::2], strict=True))

    @property
    def size(self) -> int:
        """Bytes that a store has to keep for it."""
        return len(self.body) + len(self.target) + _text_size(self.head)

    def __repr__(self) -> str:
        return f"Call({self.endpoint!r}, {len(self.body)} bytes)"


def head_of(headers: Iterable[tuple[str, str]]) -> str:
    """Header fields as a :class:`Call` has them: names and values, each in a line of its own.

    Raises :class:`ValueError` for a value of several lines, which no HTTP message has.
    """
    texts = tuple(chain.from_iterable(headers))
    head = "\n".join(texts)
    if texts and head.count("\n") != len(texts) - 1:
        raise ValueError("a header field has several lines")
    return head


class UpstreamResponse(msgspec.Struct, frozen=True, gc=False):
    """What an upstream answered to a call: its status, raw header fields and decoded body.

    The body is in ``pieces`` as it arrived. ``checked``: it is known to be JSON text.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    pieces: tuple[bytes, ...]
    checked: bool = False

    @property
    def body(self) -> bytes:
        """All of the body: another copy, where it came in several pieces."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)

    @property
    def size(self) -> int:
        """How many bytes the body has."""
        return sum(map(len, self.pieces))

    def header(self, name: bytes) -> str | None:
        """The first value of a field, or None. ``name`` is lower case."""
        for key, value in self.headers:
            if key.lower() == name:
                return value.decode("latin-1")
        return None


class Fallback(msgspec.Struct, frozen=True, gc=False):
    """A model to try when the one before has failed, and the upstream that serves it."""

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
    """The models that are still to be tried."""
    fallback_index: int | None = None
    """How many fallbacks have been tried. None: the job was submitted without fallbacks."""
    request_id: str = ""
    """The client's. Empty: the client sent none."""
    traceparent: str = ""
    """What the calls are part of: the span of the submit, or else the client's."""
    calls: int = 0
    """Calls that have ended, those included that do not count as attempts."""
    held_s: float = 0.0
    """How long the job has waited because its upstream was away or limited its rate."""
    held_at: float = 0.0
    """When the job was told so last, in seconds since the epoch. 0: its last call was an attempt."""

    @property
    def lane(self) -> Lane:
        return Lane(self.upstream, self.credential, self.model)

    @property
    def size(self) -> int:
        """Bytes that a store has to keep for it, beside its call."""
        size = _text_size(self.model) + _text_size(self.request_id) + len(self.traceparent)
        for fallback in self.fallbacks:
            size += _text_size(fallback.model) + _PER_TEXT
        return size + _PER_RECORD

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.endpoint!r}, {self.status.value})"


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a job. It never changes."""

    id: str
    endpoint: str
    credential: bytes
    status: JobStatus
    status_code: int
    expires_at: float
    """Seconds since the epoch."""
    envelope: bytes
    """The body that a poll answers with. If its middle is missing, that belongs at ``start``."""
    content_head: bytes
    """The header lines that go with ``/content``, each with its CRLF."""
    start: int = 0
    """Without ``content`` and ``pieces`` the bytes of ``/content`` are ``envelope[start:end]``."""
    end: int = 0
    content: bytes | None = None
    """The bytes of ``/content`` that the envelope does not hold: an upstream's error, or no JSON."""
    encoded: bool = False
    """Whether the middle of the envelope is the Base64 of these bytes."""
    parts: tuple[bytes, ...] = msgspec.field(default=(), name="pieces")
    """The bytes of ``/content`` of a large result, until a store has them."""
    part_sizes: tuple[int, ...] = ()
    """The sizes of the parts that the store keeps apart: see :meth:`Outcomes.read`."""

    def __repr__(self) -> str:
        return f"Outcome({self.id!r}, {self.endpoint!r}, {self.status.value}, {self.status_code})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of its parts. None: the outcome holds the bytes of ``/content`` itself."""
        return self.part_sizes or tuple(map(len, self.parts))

    @property
    def is_spliced(self) -> bool:
        """Whether its parts belong into the envelope. Those of an upstream's error do not."""
        return self.status is JobStatus.COMPLETED

    @property
    def size(self) -> int:
        """Bytes that a store has to keep for it."""
        contents = len(self.envelope) + len(self.content_head) + len(self.content or b"")
        return contents + sum(self.sizes) + _PER_RECORD


def _text_size(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def check_step(job: Job, status: JobStatus) -> None:
    """Raise :class:`IllegalTransition` if ``job`` cannot get to ``status`` in one step."""
    if status not in TRANSITIONS[job.status]:
        raise IllegalTransition(f"job {job.id}: {job.status.value} → {status.value}")


def advance(job: Job, status: JobStatus, *, attempts: int | None = None) -> Job:
    """``job`` after one step to ``status``. Raises :class:`IllegalTransition` if there is none."""
    check_step(job, status)
    return msgspec.structs.replace(
        job,
        status=status,
        attempts=job.attempts if attempts is None else attempts,
        claims=job.claims + (status is JobStatus.PROCESSING),
    )
