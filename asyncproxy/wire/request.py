"""A request that may become a job, as plain data: the caller, the head, the body. Pure."""

from __future__ import annotations

import msgspec

__all__ = ["Caller", "Request", "RequestHead"]


class Caller(msgspec.Struct, frozen=True, gc=False):
    """The client that sent a request."""

    header: str | None
    """The header that holds the credential. None: the client has no credential."""
    digest: bytes
    """The keyed hash of the credential. Empty: the client has no credential."""
    credential: str = ""

    def __repr__(self) -> str:
        return f"Caller({self.header!r}, …)"


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    """The head of a request that may become a job, without the method and the target."""

    caller: Caller
    content_type: str
    """For a form, the client's own text. For anything else, ``application/json``."""
    codings: tuple[str, ...]
    """The content codings of the body, in the order in which they were applied."""
    traceparent: str
    """The client's ``traceparent``. Empty if the client sent no valid one."""
    request_id: str
    """The client's ``X-Request-Id``. Empty if the client sent none."""
    ttl: str | None
    """The client's ``x-bf-async-job-result-ttl``, unchecked."""
    idempotency_key: bytes | None
    sent: tuple[str, ...]
    """The header fields that go upstream, in pieces: the job's id belongs between two pieces."""

    def sent_for(self, job_id: str) -> str:
        """The header fields that go upstream for a job, in the form of ``Call.head``."""
        return job_id.join(self.sent)

    def __repr__(self) -> str:
        return f"RequestHead({self.caller!r}, {self.content_type!r})"


class Request(msgspec.Struct, frozen=True, gc=False):
    """A whole request that is to become a job."""

    head: RequestHead
    query: str
    """The raw query string, without its question mark."""
    body: bytes
    """The body with its content codings undone."""
    received: bytes
    """The body as the client sent it."""

    @property
    def query_bytes(self) -> bytes:
        """The query in the bytes that the client sent."""
        return self.query.encode("utf-8", "surrogateescape")

    def __repr__(self) -> str:
        return f"Request({self.head!r}, {len(self.body)} bytes)"
