"""What the head of a request says: who it is from, what kind of job it asks for, what goes upstream.

A client writes the same head with each of its requests, but for the length of the body. So a connection
remembers the last one that it had, and what that meant: to read it anew takes a fifth of a submit.
"""

from __future__ import annotations

from itertools import chain
from typing import Final

import msgspec
from aiohttp import web

from asyncproxy.core.jobs import head_of
from asyncproxy.web.auth import authenticate, upstream_headers
from asyncproxy.web.connection import Connection
from asyncproxy.wire import credentials, headers, submission, trace_context
from asyncproxy.wire.credentials import KeyRing
from asyncproxy.wire.request import Caller, RequestHead

__all__ = ["RequestHeads"]

RawHead = tuple[tuple[bytes, bytes], ...]

# Of a client's, as far as the log has it. It goes upstream whole.
_LONGEST_REQUEST_ID: Final = 256

# Fields and bytes of a head that is remembered: a connection that idles must not cost much.
_MOST_FIELDS: Final = 32
_MOST_BYTES: Final = 4096

_LEFT: Final = headers.OURS | {"accept-encoding"}


class _Remembered(msgspec.Struct, frozen=True, gc=False):
    """A head, the fields around its ``Content-Length``, that one's name, and the keys then."""

    before: RawHead
    length_name: bytes
    after: RawHead
    keys: tuple[bytes, ...]
    head: RequestHead

    def __repr__(self) -> str:
        return f"_Remembered({self.head!r})"


class RequestHeads:
    """Reads heads. ``keys`` are who may come in, ``key`` is what digests are made with."""

    def __init__(self, keys: KeyRing, key: bytes) -> None:
        self._keys = keys
        self._key = key

    def caller(self, request: web.BaseRequest) -> Caller:
        """Who a request is from. Raises :class:`InvalidApiKey` for one who may not come in."""
        found = authenticate(request, self._keys)
        if found is None:
            return Caller(None, b"")
        name, credential = found
        return Caller(name, credentials.digest(credential, self._key), credential)

    def read(self, request: web.BaseRequest) -> RequestHead:
        """The head of a request that is to become a job.

        Raises :class:`InvalidApiKey`, :class:`UnsupportedMediaType`, or :class:`InvalidRequest` for a
        field that cannot be sent on.
        """
        connection, raw = request.protocol, request.raw_headers
        if not isinstance(connection, Connection):
            return self._read(request)
        last = connection.last_head  # with other keys (a reload), it may not come in any more
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
        submission.check_content_type(content_type, given.get("Content-Encoding"))
        return RequestHead(
            caller=caller,
            content_type=content_type,
            traceparent=trace_context.valid(given.get("traceparent")),
            request_id=_request_id(given.get("X-Request-Id", "")),
            ttl=given.get("x-bf-async-job-result-ttl"),
            idempotency_key=_idempotency_key(given.get("Idempotency-Key")),
            sent=self._sent(request, caller),
        )

    def _sent(self, request: web.BaseRequest, caller: Caller) -> tuple[str, ...]:
        # There is always a field: X-Forwarded-Proto, if no other.
        fields = headers.texts(
            upstream_headers(request, self._keys, caller.header, request_id=None, without=_LEFT)
        )
        there = {name.lower() for name, _ in fields}
        pieces = [head_of(fields)]
        for name in ("X-Request-Id", "Idempotency-Key"):  # the upstream may see a job twice
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


def _request_id(given: str) -> str:
    text = given[:_LONGEST_REQUEST_ID]
    # Half a surrogate pair, which is how aiohttp reads bytes that are not UTF-8, cannot be stored.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _idempotency_key(given: str | None) -> bytes | None:
    """The key, quoted (draft-ietf-httpapi-idempotency-key-header) or bare; empty is none."""
    if given is None:
        return None
    return given.strip().strip('"').encode("utf-8", "surrogateescape") or None
