"""Reads request heads: the caller, the options of the job, the header fields that go upstream.

Most clients send the same head with each request, except for the length of the body. So a connection
caches its last head with the result of reading it. Reading a head takes a fifth of a submit.
"""

from __future__ import annotations

from itertools import chain
from typing import Final

import msgspec
from aiohttp import web

from asyncproxy.core.jobs import head_of
from asyncproxy.web.auth import authenticate, upstream_headers
from asyncproxy.web.connection import Connection
from asyncproxy.wire import credentials, headers, multipart, submission, trace_context
from asyncproxy.wire.credentials import KeyRing
from asyncproxy.wire.request import Caller, RequestHead

__all__ = ["RequestHeads"]

RawHead = tuple[tuple[bytes, bytes], ...]

# Characters of a client's request id that are logged. The whole id goes upstream.
_LONGEST_REQUEST_ID: Final = 256

# Fields and bytes of a head that is cached: an idle connection must not cost much.
_MOST_FIELDS: Final = 32
_MOST_BYTES: Final = 4096

# Fields that stay behind. A content coding is undone before a body becomes a job.
_LEFT: Final = headers.OURS | {"accept-encoding", "content-encoding"}

_JSON: Final = "application/json"


class _Remembered(msgspec.Struct, frozen=True, gc=False):
    """A cached head."""

    before: RawHead
    """The fields before ``Content-Length``."""
    length_name: bytes
    """The name ``Content-Length`` as the client wrote it."""
    after: RawHead
    """The fields after ``Content-Length``."""
    keys: tuple[bytes, ...]
    """The digests of the key ring when the head was read."""
    head: RequestHead

    def __repr__(self) -> str:
        return f"_Remembered({self.head!r})"


class RequestHeads:
    """Reads heads. ``keys`` are the accepted client keys, ``key`` is the key of the digests."""

    def __init__(self, keys: KeyRing, key: bytes) -> None:
        self._keys = keys
        self._key = key

    def caller(self, request: web.BaseRequest) -> Caller:
        """The sender of a request. Raises :class:`InvalidApiKey` if ``keys`` do not accept it."""
        found = authenticate(request, self._keys)
        if found is None:
            return Caller(None, b"")
        name, credential = found
        return Caller(name, credentials.digest(credential, self._key), credential)

    def read(self, request: web.BaseRequest) -> RequestHead:
        """The head of a request that is to become a job.

        Raises :class:`InvalidApiKey`, :class:`UnsupportedMediaType`, or :class:`InvalidRequest` for a
        field that cannot be forwarded.
        """
        connection, raw = request.protocol, request.raw_headers
        if not isinstance(connection, Connection):
            return self._read(request)
        last = connection.last_head  # unused if a reload has changed the keys
        if isinstance(last, _Remembered) and last.keys is self._keys.digests:
            at = len(last.before)
            if (
                len(raw) > at
                and raw[at][0] == last.length_name
                and raw[:at] == last.before
                and raw[at + 1 :] == last.after
            ):
                return last.head
        head = self._read(request)
        connection.last_head = self._remembered(raw, head)
        return head

    def _read(self, request: web.BaseRequest) -> RequestHead:
        given = request.headers
        caller = self.caller(request)
        content_type = given.get("Content-Type", "")
        return RequestHead(
            caller=caller,
            content_type=content_type if multipart.is_form(content_type) else _JSON,
            codings=submission.codings(given.get("Content-Encoding")),
            traceparent=trace_context.valid(given.get("traceparent")),
            request_id=_request_id(given.get("X-Request-Id", "")),
            ttl=given.get("x-bf-async-job-result-ttl"),
            idempotency_key=_idempotency_key(given.get("Idempotency-Key")),
            sent=self._sent(request, caller),
        )

    def _sent(self, request: web.BaseRequest, caller: Caller) -> tuple[str, ...]:
        # The list is never empty: it has X-Forwarded-Proto at least.
        fields = headers.texts(
            upstream_headers(request, self._keys, caller.header, request_id=None, without=_LEFT)
        )
        kinds = [value for name, value in fields if name.lower() == "content-type"]
        if len(kinds) != 1 or not _is_known(kinds[0]):  # the body is read as JSON: send it as JSON
            fields = [pair for pair in fields if pair[0].lower() != "content-type"]
            fields.append(
                ("Content-Type", kinds[0] if kinds and multipart.is_form(kinds[0]) else _JSON)
            )
        there = {name.lower() for name, _ in fields}
        pieces = [head_of(fields)]
        for name in ("X-Request-Id", "Idempotency-Key"):  # a job may be sent to the upstream twice
            if name.lower() not in there:
                pieces[-1] += f"\n{name}\n"
                pieces.append("")
        return tuple(pieces)

    def _remembered(self, raw: RawHead, head: RequestHead) -> _Remembered | None:
        if len(raw) > _MOST_FIELDS or len(b"".join(chain.from_iterable(raw))) > _MOST_BYTES:
            return None
        for at, (name, _) in enumerate(raw):
            if name.lower() == b"content-length":
                return _Remembered(raw[:at], name, raw[at + 1 :], self._keys.digests, head)
        return None


def _is_known(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == _JSON or multipart.is_form(content_type)


def _request_id(given: str) -> str:
    text = given[:_LONGEST_REQUEST_ID]
    # aiohttp decodes bytes that are not UTF-8 to half surrogate pairs. A store cannot encode them.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _idempotency_key(given: str | None) -> bytes | None:
    """The key, quoted (draft-ietf-httpapi-idempotency-key-header) or bare. None if it is empty."""
    if given is None:
        return None
    return given.strip().strip('"').encode("utf-8", "surrogateescape") or None
