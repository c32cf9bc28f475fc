"""The only HTTP client of the gateways. It turns the client library's errors into ours.

Messages of the errors raised here name the upstream, never its address; that is in their ``detail``,
for the log.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from multidict import CIMultiDict
from yarl import URL

from asyncproxy.core.errors import (
    CallError,
    ResultTooLarge,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from asyncproxy.core.jobs import Call, UpstreamResponse
from asyncproxy.loop.heavy_work import HEAVY_BYTES, HeavyWork
from asyncproxy.upstream import exchange
from asyncproxy.upstream.exchange import Connections, Exchange
from asyncproxy.upstream.target import Target
from asyncproxy.wire import body_fields, json_text
from asyncproxy.wire.headers import field_lines

__all__ = ["Upstream", "UpstreamOptions", "describe", "translate"]

# Idle connections are closed by us before the gateway does it: a request that crosses the gateway's
# close on the wire is lost, and a POST cannot be repeated. uvicorn, under most gateways, waits 5 s.
_KEEPALIVE_S = 4.0

# Of a large answer, in bytes: less than the transport reads at once, so that each read is followed by
# one check, of some 0.2 ms.
_CHECKED_AT_ONCE = 128 * 1024


# What the client library says of an answer that it cannot read: of a session's, and of its parser's.
_NOT_HTTP = (aiohttp.ClientResponseError, HttpProcessingError)


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """How to reach one upstream. Times in seconds, sizes in bytes.

    ``headers`` are set on every request, over the client's. ``strip_model_prefix`` is taken off the
    model of each job. ``base_url`` is ``http://``, ``https://``
    or ``unix:/path/to.sock`` (optionally ``:/base/path`` after it).
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

    def __repr__(self) -> str:
        return f"UpstreamOptions({self.name!r})"


class Upstream:
    """One gateway: sends calls and requests to it over a pool of connections.

    Large answers are checked as they arrive, in ``heavy_work`` with all other heavy work.
    """

    def __init__(self, options: UpstreamOptions, heavy_work: HeavyWork) -> None:
        self.name = options.name
        self.options = options
        self.connect_s = options.connect_s
        self.total_s = options.total_s
        self._options = options
        self._socket_path, url = _split_unix(options.base_url)
        self._target = Target(url)
        self._headers = tuple(options.headers)
        self._overridden = frozenset(name.lower() for name, _ in options.headers)
        self._max_result_bytes = options.max_result_bytes
        self._heavy_work = heavy_work
        self._streaming = aiohttp.ClientTimeout(total=None, connect=options.connect_s)
        self._session: aiohttp.ClientSession
        # Of all calls: known once there are connections.
        self._connections: Connections
        self._lines: str
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()
        # Connections, by the future of their end, and the body that is being read from each.
        self._reading: WeakKeyDictionary[asyncio.Future[None], StreamReader | None]
        self._reading = WeakKeyDictionary()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Hold a pool of connections for the length of a ``with``: nothing can be sent outside it."""
        connector: aiohttp.BaseConnector
        if self._socket_path is not None:
            connector = _UnixConnector(path=self._socket_path, limit=0, keepalive_timeout=_KEEPALIVE_S)
        else:
            connector = _TCPConnector(
                limit=0,
                keepalive_timeout=_KEEPALIVE_S,
                ssl=_ssl_context(self._options),
                ttl_dns_cache=30,
            )
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),  # one client's cookies are not another's
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=exchange.MAX_FIELD,
            max_field_size=exchange.MAX_FIELD,
            max_headers=exchange.MAX_FIELDS,
            read_bufsize=exchange.READ_BUFFER,
            trust_env=False,
        ) as self._session:
            self._connections = Connections(connector, self._target.origin)
            fields = self._headers
            if "host" not in self._overridden:
                fields = (("Host", self._connections.host), *fields)
            self._lines = field_lines(pair for pair in fields if pair[0].lower() != "accept-encoding")
            yield

    async def idle(self) -> None:
        """Wait until nothing is under way. For one that nobody sends anything to any more."""
        await self._idle.wait()

    def _begin(self) -> None:
        self._busy += 1
        self._idle.clear()

    def _end(self) -> None:
        self._busy -= 1
        if not self._busy:
            self._idle.set()

    async def call(self, call: Call, *, timeout_s: float) -> UpstreamResponse:
        """Send a call and read the answer, its content coding undone.

        Raises :class:`~asyncproxy.core.errors.UpstreamUnreachable`, ``UpstreamTimeout`` after
        ``timeout_s``, or ``ResultTooLarge``.
        """
        self._begin()
        try:
            return await self._call(call, timeout_s=timeout_s)
        finally:
            self._end()

    async def _call(self, call: Call, *, timeout_s: float) -> UpstreamResponse:
        connect_s = min(self.connect_s, timeout_s)
        try:
            body = await self._body(call)
            async with (
                asyncio.timeout(timeout_s),
                Exchange(
                    self._connections, self._head(call, body), body, connect_s=connect_s
                ) as answer,
            ):
                if answer.status < 200:
                    raise aiohttp.ClientConnectionError(f"unexpected status {answer.status}")
                pieces, checked = await self._read(answer)
                return UpstreamResponse(answer.status, answer.headers, pieces, checked)
        except (TimeoutError, aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise translate(error, self.name) from error

    async def _body(self, call: Call) -> bytes:
        """The body of a call, its model as this upstream knows it."""
        prefix = self._options.strip_model_prefix
        if not prefix:
            return call.body
        types = [value for name, value in call.headers if name.lower() == "content-type"]
        return await self._heavy_work.run(
            body_fields.without_model_prefix(types[0] if types else "", call.body, prefix)
        )

    def _head(self, call: Call, body: bytes) -> bytes:
        """The request line and the header fields. Raises :class:`ValueError` if they cannot be sent."""
        if "\r" in call.head or "\0" in call.head:  # of what would split it, a call has no line feed
            raise ValueError("a header field cannot be sent")
        lines = self._lines + field_lines(self._theirs(call.headers))
        # A result is kept decoded; that it travels compressed costs both ends more than it saves.
        return (
            f"POST {self._target.path(call.target)} HTTP/1.1\r\n{lines}"
            f"Accept-Encoding: identity\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()

    async def _read(self, answer: Exchange) -> tuple[tuple[bytes, ...], bool]:
        """The body as it arrives, and whether it was found to be JSON text meanwhile."""
        most = self._max_result_bytes
        if answer.length > most:
            raise self._too_large()
        content = answer.content
        if content.is_eof():  # all of it came with the head
            body = content.read_nowait()
            if len(body) > most:
                raise self._too_large()
            return (body,), False
        pieces: list[bytes] = []
        size = 0
        text = json_text.Arriving(_CHECKED_AT_ONCE)
        with self._watched(answer.protocol, content):
            while piece := await content.readany():
                size += len(piece)
                if size > most:
                    raise self._too_large()
                pieces.append(piece)
                if text.add(piece):
                    await self._heavy_work.next()
                    text.step()
        if size < HEAVY_BYTES:
            return tuple(pieces), False
        await self._heavy_work.next()
        return tuple(pieces), text.end()

    def _too_large(self) -> ResultTooLarge:
        return ResultTooLarge(
            f"The upstream {self.name!r} answered with more than {self._max_result_bytes} bytes. "
            "Ask for less at once, or raise `jobs.max_result_bytes`."
        )

    def stream(
        self,
        method: str,
        raw_path: str,
        headers: Iterable[tuple[str, str]],
        data: bytes | AsyncIterator[bytes] | None,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a request as it is; its answer is not decoded, and read by the caller.

        Only the connect timeout is applied. Raises what the client library raises: see
        :func:`translate`.
        """
        request = self._session.request(
            method,
            URL(self._target.url(raw_path), encoded=True),
            headers=self._prepared(headers),
            data=data,
            timeout=self._streaming,
            auto_decompress=False,
            allow_redirects=False,
        )
        return _Counted(request, self._begin, self._end)

    def watching(self, response: aiohttp.ClientResponse) -> AbstractContextManager[None]:
        """Read the body of ``response`` within this: the end of its connection then ends the read."""
        connection = response.connection
        if connection is None or response.content.is_eof():
            return nullcontext()  # all of the body is here
        return self._watched(connection.protocol, response.content)

    @contextmanager
    def _watched(self, protocol: ResponseHandler | None, content: StreamReader) -> Iterator[None]:
        """See :meth:`watching`.

        On a chunk that is not one, aiohttp closes the connection and tells whoever waits for a
        response, but not whoever waits for more of a body.
        """
        closed = None if protocol is None else protocol.closed
        if closed is None:  # all of the body is here
            yield
            return
        if closed not in self._reading:
            closed.add_done_callback(self._on_closed)
        self._reading[closed] = content
        try:
            yield
        finally:
            self._reading[closed] = None

    def _on_closed(self, closed: asyncio.Future[None]) -> None:
        closed.exception()  # it says no more than that the connection is closed
        content = self._reading.pop(closed, None)
        if content is not None and not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was closed"))

    def _prepared(self, headers: Iterable[tuple[str, str]]) -> CIMultiDict[str]:
        prepared = CIMultiDict(self._theirs(headers))
        prepared.extend(self._headers)
        return prepared

    def _theirs(self, headers: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
        """What is left of a client's fields beside the operator's."""
        overridden = self._overridden
        if not overridden:
            return headers
        return [pair for pair in headers if pair[0].lower() not in overridden]


class _Counted(AbstractAsyncContextManager[aiohttp.ClientResponse]):
    """``inner``, and a call before and after it."""

    def __init__(
        self,
        inner: AbstractAsyncContextManager[aiohttp.ClientResponse],
        begin: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._inner, self._begin, self._end = inner, begin, end

    async def __aenter__(self) -> aiohttp.ClientResponse:
        self._begin()
        try:
            return await self._inner.__aenter__()
        except BaseException:
            self._end()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._inner.__aexit__(kind, error, trace)
        finally:
            self._end()


class _Clean(aiohttp.BaseConnector):
    """Gives out no connection on which something came that nobody had asked for.

    It would be the answer to the next request, and that may be another client's.
    """

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  the signature is aiohttp's
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            if connection.protocol is None or not connection.protocol.should_close:
                return connection
            connection.close()


class _TCPConnector(_Clean, aiohttp.TCPConnector):
    pass


class _UnixConnector(_Clean, aiohttp.UnixConnector):
    pass


def translate(error: Exception, upstream: str) -> CallError:
    """The client library's error as one of ours. Raise it ``from`` the original."""
    ours = _translated(error, upstream)
    ours.detail = describe(error)
    return ours


def describe(error: Exception) -> str:
    """What happened, for the log.

    Not the error's own ``repr``: that of an answer which is not HTTP holds the whole request, with
    the credential in it, and later lines of its message are the upstream's bytes.
    """
    said = error.message if isinstance(error, _NOT_HTTP) else str(error)
    first_line = said.partition("\n")[0].strip(" :")[:200]
    if isinstance(error, aiohttp.ServerDisconnectedError):
        first_line = ""  # it may be the answer as far as it came
    return f"{type(error).__name__}: {first_line}".removesuffix(": ")


def _translated(error: Exception, upstream: str) -> CallError:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamUnreachable(f"The upstream {upstream!r} did not take the connection in time.")
    if isinstance(error, asyncio.TimeoutError):
        return UpstreamTimeout(f"The upstream {upstream!r} did not answer in time.")
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return UpstreamUnreachable(f"The upstream {upstream!r} has no certificate that we trust.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamUnreachable(f"The upstream {upstream!r} cannot be reached.")
    if isinstance(error, aiohttp.ClientPayloadError):
        return UpstreamUnreachable(
            f"The answer of the upstream {upstream!r} broke off, or cannot be decoded."
        )
    if isinstance(error, _NOT_HTTP):
        return UpstreamUnreachable(f"The upstream {upstream!r} answered with something not HTTP.")
    return UpstreamUnreachable(f"The upstream {upstream!r} closed the connection without an answer.")


def _split_unix(base_url: str) -> tuple[str | None, str]:
    """The path of a unix socket, if it is one, and the URL to ask for."""
    parts = urlsplit(base_url)
    if parts.scheme != "unix":
        return None, base_url
    path, _, base = parts.path.partition(":")
    return unquote(path), f"http://localhost{base}"


def _ssl_context(options: UpstreamOptions) -> ssl.SSLContext | bool:
    if options.insecure_skip_verify:
        return False
    if options.ca_file is None:
        return True
    return ssl.create_default_context(cafile=options.ca_file)
