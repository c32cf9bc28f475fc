"""Reads the body of a request: no more of it, no slower and no more at once than is allowed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from aiohttp import web
from aiohttp.http import HttpVersion11

from asyncproxy.core.errors import ApiError, InvalidRequest, Overloaded, RequestTimeout, RequestTooLarge
from asyncproxy.loop.heavy_work import HEAVY_BYTES, HeavyWork
from asyncproxy.web.wire_response import write_continue

__all__ = ["BodyReader", "expect_nothing"]


class BodyReader:
    """Bounds what request bodies cost.

    ``max_bytes`` is the limit of one body, ``max_total_bytes`` that of all which are being read,
    ``timeout_s`` the longest silence between two pieces. A large body waits for its turn of
    ``heavy_work`` before it is returned: the caller checks it next.
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
        """The body, if all of it came with the head, as that of a small request does.

        Raises :class:`RequestTooLarge`.
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

        Raises :class:`RequestTooLarge` before or as soon as the limit is passed, without reading the
        rest, :class:`RequestTimeout`, or :class:`Overloaded` if too much is being read already.
        """
        if (body := self.read_buffered(request)) is not None:
            return body
        if (request.content_length or 0) > self.max_bytes:
            raise self._too_large()
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in self.pieces(request):
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
        """The body and None, if it has ``limit`` bytes at most. Otherwise its beginning, and the rest.

        Raises what :meth:`read` does, but :class:`RequestTooLarge`.
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
        """The body as it arrives. Raises :class:`RequestTimeout`, and what a broken body raises."""
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
    # Not made where it is raised: an error in a variable of the frame that it goes through keeps that
    # frame, and so the pieces in it, until the garbage collector comes by.
    error = Overloaded("Too much is being sent at once. Try again later.")
    error.close = True
    return error


async def expect_nothing(request: web.Request) -> None:
    """An aiohttp ``expect_handler`` that leaves ``100 Continue`` to the one who reads the body.

    A request that is refused for its headers is refused before the client sends the rest.
    """


async def _continue(request: web.BaseRequest) -> None:
    """Tell a client that asked for it to send the body (RFC 9110, section 10.1.1)."""
    if (
        request.headers.get("Expect", "").lower() == "100-continue"
        and request.version == HttpVersion11
        and not request.content.is_eof()
    ):
        await write_continue(request)
