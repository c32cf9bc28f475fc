"""Reads request bodies within limits: bytes of one body, bytes of all bodies, and silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from aiohttp import web
from aiohttp.http import HttpVersion11

from asyncproxy.core.errors import (
    ApiError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from asyncproxy.loop.heavy_work import HEAVY_BYTES, HeavyWork
from asyncproxy.web.wire_response import write_continue
from asyncproxy.wire import content_coding
from asyncproxy.wire.content_coding import CannotDecode

__all__ = ["BodyReader", "expect_nothing"]


class BodyReader:
    """Reads request bodies within limits.

    ``max_bytes`` limits one body, ``max_total_bytes`` all bodies that are being read, ``timeout_s`` the
    silence between two pieces. A large body waits for a turn of ``heavy_work`` before it is returned,
    because the caller checks it next.
    """

    def __init__(
        self, *, max_bytes: int, max_total_bytes: int, timeout_s: float, heavy_work: HeavyWork
    ) -> None:
        self.max_bytes = max_bytes
        self.max_total_bytes = max_total_bytes
        self._timeout_s = timeout_s
        self._heavy_work = heavy_work
        self._total = 0

    def read_buffered(self, request: web.BaseRequest) -> bytes | None:
        """The body, if all of it has arrived. None: some of it is still to come.

        A small body usually arrives with the head. Raises :class:`RequestTooLarge`.
        """
        content = request.content
        if not content.is_eof():
            return None
        body = content.read_nowait()
        if len(body) > self.max_bytes:
            raise self._too_large()
        return body

    async def read(self, request: web.BaseRequest) -> bytes:
        """The whole body.

        Raises :class:`RequestTooLarge` as soon as the size is known to pass the limit, without reading
        the rest, :class:`RequestTimeout`, and :class:`Overloaded` if too many bytes are being read.
        """
        if (body := self.read_buffered(request)) is not None:
            return body
        if (request.content_length or 0) > self.max_bytes:
            raise self._too_large()
        return await self._gathered(self.pieces(request))

    async def decode(self, codings: Sequence[str], body: bytes) -> bytes:
        """``body`` with its content codings undone.

        Raises :class:`RequestTooLarge` as soon as the limit is passed, :class:`UnsupportedMediaType`
        for a body that is not in these codings, and :class:`Overloaded`.
        """
        try:
            return await self._gathered(self._decoded(codings, body))
        except CannotDecode as error:
            raise UnsupportedMediaType(f"The body cannot be decoded: {error}.") from None

    async def _decoded(self, codings: Sequence[str], body: bytes) -> AsyncIterator[bytes]:
        work = 0
        for piece in content_coding.decoded(codings, body, max_bytes=self.max_bytes):
            yield piece
            work += len(piece) + content_coding.PIECE_COST
            if work >= HEAVY_BYTES:
                work = 0
                await self._heavy_work.next()

    async def _gathered(self, source: AsyncIterator[bytes]) -> bytes:
        """The joined pieces of ``source``. Raises :class:`RequestTooLarge` or :class:`Overloaded`."""
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in source:
                size += len(piece)
                self._total += len(piece)
                if size > self.max_bytes:
                    raise self._too_large()
                if self._total > self.max_total_bytes:
                    raise _too_much_at_once()
                pieces.append(piece)
            if size >= HEAVY_BYTES:
                await self._heavy_work.next()
        finally:
            self._total -= size
        return b"".join(pieces)

    async def begin(
        self, request: web.BaseRequest, limit: int
    ) -> tuple[bytes, AsyncGenerator[bytes, None] | None]:
        """The body and None, if the body has at most ``limit`` bytes. Otherwise its beginning and rest.

        Raises as :meth:`read`, except for :class:`RequestTooLarge`.
        """
        pieces: list[bytes] = []
        size = 0
        rest = self.pieces(request)
        try:
            async for piece in rest:
                size += len(piece)
                self._total += len(piece)
                if self._total > self.max_total_bytes:
                    raise _too_much_at_once()
                pieces.append(piece)
                if size > limit:
                    return b"".join(pieces), rest
        finally:
            self._total -= size
        return b"".join(pieces), None

    async def pieces(self, request: web.BaseRequest) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises :class:`RequestTimeout` and :class:`InvalidRequest`."""
        await _continue(request)
        content = request.content
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    piece = await content.readany()
            except TimeoutError:
                raise RequestTimeout(
                    f"The body of the request stood still for {self._timeout_s:g} s."
                ) from None
            except (web.RequestPayloadError, ConnectionError):
                raise InvalidRequest("The body of the request is not what its headers say.") from None
            if not piece:
                return
            yield piece

    def _too_large(self) -> ApiError:
        return RequestTooLarge(f"The body is larger than {self.max_bytes} bytes. Send less at once.")


def _too_much_at_once() -> ApiError:
    # Made in a function of its own. An error in a variable of a frame that it is raised through keeps
    # the frame, and so the pieces of the body in it, until the garbage collector runs.
    error = Overloaded("Too much is being sent at once. Try again later.")
    error.close = True
    return error


async def expect_nothing(request: web.Request) -> None:
    """An aiohttp ``expect_handler`` that leaves ``100 Continue`` to the reader of the body.

    So a request that is refused for its headers is refused before the client sends the body.
    """


async def _continue(request: web.BaseRequest) -> None:
    """Send ``100 Continue`` to a client that waits for it (RFC 9110, section 10.1.1)."""
    if (
        request.headers.get("Expect", "").lower() == "100-continue"
        and request.version == HttpVersion11
        and not request.content.is_eof()
    ):
        await write_continue(request)
