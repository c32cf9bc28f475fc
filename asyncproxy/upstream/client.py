"""One gateway: sends it the calls of jobs, and the requests that pass through."""

from __future__ import annotations

import asyncio
import ssl
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from asyncproxy.core.errors import CallError, Interrupted, ResultTooLarge
from asyncproxy.core.jobs import Call, UpstreamResponse
from asyncproxy.loop.heavy_work import HEAVY_BYTES, HeavyWork
from asyncproxy.upstream.errors import translate
from asyncproxy.upstream.exchange import ConnectionPool, Exchange, RequestBody, connection_pool
from asyncproxy.upstream.target import Target
from asyncproxy.wire import body_fields, content_coding, json_text
from asyncproxy.wire.content_coding import CannotDecode
from asyncproxy.wire.headers import field_lines
from asyncproxy.wire.steps import Steps

__all__ = ["Upstream", "UpstreamOptions"]

# Bytes of a large response that are checked in one step, of some 0.2 ms. The transport reads more at
# once, so each read is followed by one check.
_CHECKED_AT_ONCE = 128 * 1024


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """How to reach one upstream. Times in seconds, sizes in bytes.

    ``headers`` are set on every request and replace the client's. ``base_url`` is ``http://``,
    ``https://`` or ``unix:/path/to.sock`` (optionally ``:/base/path`` after it).
    """

    name: str
    base_url: str
    headers: Sequence[tuple[str, str]] = ()
    connect_s: float = 5.0
    total_s: float = 600.0
    max_result_bytes: int = 64 * 1024 * 1024
    ca_file: str | None = None
    insecure_skip_verify: bool = False
    strip_model_prefix: str = ""
    """A prefix that is removed from the model of each job."""

    def __repr__(self) -> str:
        return f"UpstreamOptions({self.name!r})"


class Upstream:
    """One gateway, over a pool of connections.

    ``overridden`` are the names of the operator's header fields, lower case. A client's fields of these
    names are dropped. Large responses are checked while they arrive, in turns of ``heavy_work``.
    """

    def __init__(self, options: UpstreamOptions, heavy_work: HeavyWork) -> None:
        self.name = options.name
        self.options = options
        self.total_s = options.total_s
        self.overridden = frozenset(name.lower() for name, _ in options.headers)
        self._heavy_work = heavy_work
        self._socket_path, url = _split_unix(options.base_url)
        hosts = [value for name, value in options.headers if name.lower() == "host"]
        self._target = Target(url, hosts[0] if hosts else None)
        self._pool: ConnectionPool
        # The operator's fields and Host, which stand before the client's: of a call, and of a request.
        self._call_lines: str
        self._request_lines: bytes

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Keep a pool of connections for the length of a ``with``. Nothing can be sent outside it."""
        async with connection_pool(
            self.name, self._target, socket_path=self._socket_path, tls=_tls(self.options)
        ) as self._pool:
            fields = list(self.options.headers)
            if "host" not in self.overridden:
                fields.insert(0, ("Host", self._pool.host))
            self._request_lines = field_lines(fields).encode()
            # Results are stored decoded, and compressing them costs both ends more than it saves.
            others = [pair for pair in fields if pair[0].lower() != "accept-encoding"]
            self._call_lines = field_lines([*others, ("Accept-Encoding", "identity")])
            yield

    async def idle(self) -> None:
        """Wait until no exchange is under way. For an upstream that a reload has replaced."""
        await self._pool.idle()

    def exchange(
        self,
        method: str,
        raw_path: str,
        lines: bytes,
        body: RequestBody = b"",
        *,
        length: int | None = None,
        upgrade: bool = False,
    ) -> Exchange:
        """An exchange for a client's request, for an ``async with``. Only connecting has a timeout.

        ``lines`` are the header fields, each with its CRLF, without ``overridden`` fields and without
        fields that frame the body. ``length`` is the size in bytes of a body that arrives while it is
        sent (None: unknown). A ``length`` with an empty ``body`` adds ``Content-Length: 0``.
        """
        if isinstance(body, bytes) and (body or length is not None):
            length = len(body)
        chunked = not isinstance(body, bytes) and length is None
        if length is not None:
            framing = b"Content-Length: %d\r\n\r\n" % length
        else:
            framing = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"
        line = f"{method} {self._target.path(raw_path)} HTTP/1.1\r\n".encode()
        head = b"".join((line, self._request_lines, lines, framing))
        return Exchange(
            self._pool,
            method,
            head,
            body,
            connect_s=self.options.connect_s,
            chunked=chunked,
            upgrade=upgrade,
        )

    def timed_out(self, error: TimeoutError) -> CallError:
        """The error for an exchange that took too long. Raise it ``from`` the original."""
        return translate(error, self.name, delivered=True)

    async def call(self, call: Call, *, timeout_s: float) -> UpstreamResponse:
        """Send a call and read the response, with its content coding undone.

        Raises :class:`~asyncproxy.core.errors.UpstreamUnreachable`, ``UpstreamTimeout`` after
        ``timeout_s``, ``ResultTooLarge``, or ``Interrupted`` for a call that cannot be sent.
        """
        body = await self._body(call)
        exchange = Exchange(
            self._pool,
            "POST",
            self._head(call, len(body)),
            body,
            connect_s=min(self.options.connect_s, timeout_s),
        )
        try:
            async with asyncio.timeout(timeout_s), exchange:
                pieces, checked = await self._read(exchange)
        except TimeoutError as error:
            raise self.timed_out(error) from error
        response = UpstreamResponse(exchange.status, exchange.headers, pieces, checked)
        return await self._decoded(response) if exchange.coded else response

    async def _body(self, call: Call) -> bytes:
        """The body of a call, with ``strip_model_prefix`` removed from its model."""
        prefix = self.options.strip_model_prefix
        if not prefix:
            return call.body
        types = [value for name, value in call.headers if name.lower() == "content-type"]
        content_type = types[0] if types else ""
        steps = body_fields.without_model_prefix(content_type, call.body, prefix)
        return await self._heavy_work.run(steps)

    def _head(self, call: Call, length: int) -> bytes:
        """The request head of a call. Raises :class:`Interrupted` if it cannot be sent."""
        fields: Iterable[tuple[str, str]] = call.headers
        if self.overridden:
            fields = [pair for pair in fields if pair[0].lower() not in self.overridden]
        head = (
            f"POST {self._target.path(call.target)} HTTP/1.1\r\n{self._call_lines}{field_lines(fields)}"
            f"Content-Length: {length}\r\n\r\n"
        )
        # A CR or NUL would split the head. The fields of a call have no line feed: see `Call.head`.
        if "\r" in call.head or "\0" in call.head:
            raise Interrupted("The call has a line break in a header field.")
        try:
            return head.encode()
        except UnicodeEncodeError as error:
            raise Interrupted("The call has a header field that is not text.") from error

    async def _read(self, exchange: Exchange) -> tuple[tuple[bytes, ...], bool]:
        """The pieces of the body, and whether the body is already known to be JSON text."""
        limit = self.options.max_result_bytes
        if exchange.has_body and (exchange.length or 0) > limit:
            raise self._too_large()
        first = exchange.received()
        size = len(first)
        if size <= limit and exchange.at_end():  # the whole body came with the head
            return (first,), False
        pieces = [first]
        text = json_text.Arriving(_CHECKED_AT_ONCE)
        text.add(_without_bom(first))
        while not exchange.at_end():
            if size > limit:
                raise self._too_large()
            piece = await exchange.read()
            size += len(piece)
            pieces.append(piece)
            if text.add(piece):
                await self._heavy_work.next()
                text.step()
        if size > limit:
            raise self._too_large()
        checked = await self._end_of(text, size)
        return tuple(filter(None, pieces)), checked

    async def _end_of(self, text: json_text.Arriving, size: int) -> bool:
        """Whether a text is known to be JSON. False for a small text: its check is left to others."""
        if size < HEAVY_BYTES:
            return False
        await self._heavy_work.next()
        return text.end()

    async def _decoded(self, answer: UpstreamResponse) -> UpstreamResponse:
        """A response with its content coding undone. Unchanged if that is not possible.

        A response that cannot be decoded is final too: its status counts, and another call would bring
        the same bytes.
        """
        named = [value for name, value in answer.headers if name.lower() == b"content-encoding"]
        if not named or not answer.size:
            return answer
        codings = content_coding.codings_of(b",".join(named).decode("latin-1"))
        if not codings:
            return answer
        try:
            body = await self._heavy_work.run(self._undone(codings, answer.body))
        except CannotDecode:
            return answer
        headers = tuple(field for field in answer.headers if field[0].lower() != b"content-encoding")
        text = json_text.Arriving(_CHECKED_AT_ONCE)
        for start in range(0, len(body), _CHECKED_AT_ONCE):
            piece = body[start : start + _CHECKED_AT_ONCE]
            if text.add(piece if start else _without_bom(piece)):
                await self._heavy_work.next()
                text.step()
        return UpstreamResponse(answer.status, headers, (body,), await self._end_of(text, len(body)))

    def _undone(self, codings: Sequence[str], body: bytes) -> Steps[bytes]:
        """``body`` with its codings undone. Raises :class:`CannotDecode` or :class:`ResultTooLarge`."""
        limit = self.options.max_result_bytes
        pieces: list[bytes] = []
        size = work = 0
        for piece in content_coding.decoded(codings, body, max_bytes=limit):
            pieces.append(piece)
            size += len(piece)
            work += len(piece) + content_coding.PIECE_COST
            if size > limit:
                raise self._too_large()
            if work >= HEAVY_BYTES:
                work = 0
                yield
        return b"".join(pieces)

    def _too_large(self) -> ResultTooLarge:
        limit = self.options.max_result_bytes
        return ResultTooLarge(
            f"The upstream {self.name!r} answered with more than {limit} bytes. "
            "Ask for less at once, or raise `jobs.max_result_bytes`."
        )


def _without_bom(piece: bytes) -> bytes:
    return piece.removeprefix(BOM_UTF8)


def _split_unix(base_url: str) -> tuple[str | None, str]:
    """The path of the unix socket, or None, and the URL to request."""
    parts = urlsplit(base_url)
    if parts.scheme != "unix":
        return None, base_url
    path, _, base = parts.path.partition(":")
    return unquote(path), f"http://localhost{base}"


def _tls(options: UpstreamOptions) -> ssl.SSLContext | bool:
    if options.insecure_skip_verify:
        return False
    if options.ca_file is None:
        return True
    return ssl.create_default_context(cafile=options.ca_file)
