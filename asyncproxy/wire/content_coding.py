"""Content codings and how they are undone (RFC 9110, section 8.4). Pure.

The time is linear in the size of the result, which is limited. A large body belongs in a thread.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

try:
    from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14
except ImportError:
    zstd = None

__all__ = ["TooLarge", "Undecodable", "codings", "decode"]

# The most codings that are undone: each may blow up what the one before has made.
_MOST_CODINGS: Final = 4

_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_RAW_DEFLATE: Final = -zlib.MAX_WBITS

# Bytes that a stream is given at once.
_FIRST_WINDOW: Final = 256
_LARGEST_WINDOW: Final = 256 * 1024

_ERRORS: Final = (zlib.error,) if zstd is None else (zlib.error, zstd.ZstdError)


class Undecodable(ValueError):
    """A coding that is not known here, or bytes that are not in the coding they are said to be in."""


class TooLarge(ValueError):
    """The decoded body is larger than was asked for."""


def codings(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """The content codings that header fields name, lower case, in the order they were applied."""
    named = [
        name.strip().lower().decode("latin-1")
        for field, value in headers
        if field.lower() == b"content-encoding"
        for name in value.split(b",")
    ]
    return [name for name in named if name not in ("", "identity")]


def decode(body: bytes, names: Sequence[str], limit: int) -> bytes:
    """``body`` without the codings ``names``, which were applied in this order.

    Raises :class:`Undecodable`, or :class:`TooLarge` as soon as there are more than ``limit`` bytes.
    """
    if len(names) > _MOST_CODINGS:
        raise Undecodable("too many content codings")
    for name in reversed(names):
        if name in ("gzip", "x-gzip"):
            body = _members(body, limit, lambda: zlib.decompressobj(_GZIP_OR_ZLIB))
        elif name == "deflate":
            bits = zlib.MAX_WBITS if _has_zlib_header(body) else _RAW_DEFLATE
            body = _members(body, limit, partial(zlib.decompressobj, bits))
        elif name == "zstd" and zstd is not None:
            body = _members(body, limit, zstd.ZstdDecompressor)
        else:
            raise Undecodable("a content coding that is not known")
    return body


def _has_zlib_header(body: bytes) -> bool:
    """Whether a body begins as RFC 1950 says. Some send the bare stream, without that wrapper."""
    return len(body) > 1 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0


def _members(body: bytes, limit: int, new: Callable[[], Any]) -> bytes:
    """The content of a compressed stream, or of several that follow each other."""
    pieces: list[bytes] = []
    size = position = 0
    while position < len(body):
        stream = new()
        # What is behind a stream is copied at its end. So a stream gets little at once while it is
        # short: a million short ones would copy the whole rest a million times.
        window = _FIRST_WINDOW
        while not stream.eof:
            given = body[position : position + window]
            if not given:
                raise Undecodable("the compressed stream has no end")
            try:
                # One byte more than is allowed tells too much from just enough.
                piece = stream.decompress(given, limit - size + 1)
            except _ERRORS as error:
                raise Undecodable(str(error)) from None
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise TooLarge(f"more than {limit} bytes")
            position += len(given)
            window = min(2 * window, _LARGEST_WINDOW)
        position -= len(stream.unused_data)
    return b"".join(pieces)
