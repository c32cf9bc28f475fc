"""A request that may become a job, as plain data: who asks, with which head, for what. Pure."""

from __future__ import annotations

import msgspec

__all__ = ["Caller", "Request", "RequestHead"]


class Caller(msgspec.Struct, frozen=True, gc=False):
    """Who a request is from: the header that says so, if one does, and what it says with its digest."""

    header: str | None
    digest: bytes
    credential: str = ""

    def __repr__(self) -> str:
        return f"Caller({self.header!r}, …)"


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    """The head of a request that may become a job, without its method and its target."""

    caller: Caller
    content_type: str
    """That of a form as the client wrote it; ``application/json`` for anything else."""
    codings: tuple[str, ...]
    """The content codings of the body, in the order in which they were applied."""
    traceparent: str
    """Empty if there is no valid one."""
    request_id: str
    """Empty if there is none."""
    ttl: str | None
    """As the client wrote it."""
    idempotency_key: bytes | None
    sent: tuple[str, ...]
    """The header fields that go upstream, in pieces: the job's id belongs between them."""

    def sent_for(self, job_id: str) -> str:
        """The header fields that go upstream for a job, as a ``Call`` has them."""
        return job_id.join(self.sent)

    def __repr__(self) -> str:
        return f"RequestHead({self.caller!r}, {self.content_type!r})"


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request that is to become a job, read to its end."""

    head: RequestHead
    query: str
    """The raw query string, without its question mark."""
    body: bytes
    """Its content codings undone."""
    received: bytes
    """The body as the client sent it."""

    @property
    def query_bytes(self) -> bytes:
        """The query as the bytes that the client sent."""
        return self.query.encode("utf-8", "surrogateescape")

    def __repr__(self) -> str:
        return f"Request({self.head!r}, {len(self.body)} bytes)"
