"""Undoes the content codings of a body (RFC 9110, section 8.4), a piece at a time. Pure."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

__all__ = ["CODINGS", "PIECE_COST", "CannotDecode", "codings_of", "decoded"]

# Bytes that a decoder gets at once, and bytes that it returns at most.
_IN: Final = 64 * 1024
_OUT: Final = 256 * 1024

# The fixed cost of decoding a piece, expressed as bytes of output that take as long.
PIECE_COST: Final = 16 * 1024

# Compressed streams that may follow each other in a body. Even a short one needs a new decoder.
_MAX_STREAMS: Final = 2048

# Codings of one body. Each coding may multiply the bytes by a thousand.
_MAX_CODINGS: Final = 2

# The largest window that a zstd frame may ask for: 8 MiB (RFC 9659, section 3).
_ZSTD_WINDOW_LOG: Final = 23


class CannotDecode(ValueError):
    """The body is not in the coding that its header names. The message quotes none of the body."""


def codings_of(content_encoding: str) -> tuple[str, ...] | None:
    """The codings that a ``Content-Encoding`` names, in the order in which they were applied.

    None if a coding is not supported, or if there are too many.
    """
    names = (name.strip().lower() for name in content_encoding.split(","))
    found = tuple(name for name in names if name not in ("", "identity"))
    return found if len(found) <= _MAX_CODINGS and all(name in CODINGS for name in found) else None


def decoded(codings: Iterable[str], body: bytes, *, max_bytes: int) -> Iterator[bytes]:
    """Yields ``body`` with ``codings`` undone, in pieces of at most 256 KiB. A piece may be empty.

    Each piece takes up to some milliseconds. The piece that passes ``max_bytes`` is the last one.
    Raises :class:`CannotDecode`.
    """
    pieces: Iterator[bytes] = (body[start : start + _IN] for start in range(0, len(body), _IN))
    for coding in reversed(tuple(codings)):
        pieces = _bounded(CODINGS[coding](pieces), max_bytes)
    return pieces


def _bounded(pieces: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        yield piece
        size += len(piece)
        if size > max_bytes:
            return


class _Decoder(Protocol):
    """Undoes one compressed stream."""

    ended: bool
    """Whether the stream is at its end."""
    full: bool
    """Whether the input so far has more output."""

    def decompress(self, data: bytes) -> tuple[bytes, bytes]:
        """The next output, at most 256 KiB, and the rest of ``data``, to be passed again."""


class _Zlib:
    def __init__(self, window_bits: int) -> None:
        self._decoder = zlib.decompressobj(window_bits)
        self.ended = self.full = False

    def decompress(self, data: bytes) -> tuple[bytes, bytes]:
        piece = self._decoder.decompress(data, _OUT)
        self.ended, self.full = self._decoder.eof, len(piece) == _OUT
        return piece, self._decoder.unused_data or self._decoder.unconsumed_tail


class _Brotli:
    def __init__(self, module: Any) -> None:
        self._decoder = module.Decompressor()
        self.ended = self.full = False

    def decompress(self, data: bytes) -> tuple[bytes, bytes]:
        piece: bytes = self._decoder.process(data, output_buffer_limit=_OUT)
        self.ended, self.full = self._decoder.is_finished(), not self._decoder.can_accept_more_data()
        return piece, b""


class _Zstd:
    def __init__(self, module: Any) -> None:
        options = {module.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        self._decoder = module.ZstdDecompressor(options=options)
        self.ended = self.full = False

    def decompress(self, data: bytes) -> tuple[bytes, bytes]:
        piece: bytes = self._decoder.decompress(data, _OUT)
        self.ended, self.full = self._decoder.eof, not self._decoder.needs_input
        return piece, self._decoder.unused_data if self.ended else b""


def _deflate(start: bytes) -> _Zlib:
    """``deflate`` is the zlib format (RFC 1950), but some clients leave out its header."""
    framed = start[0] & 0x0F == zlib.DEFLATED and int.from_bytes(start[:2], "big") % 31 == 0
    return _Zlib(zlib.MAX_WBITS if framed else -zlib.MAX_WBITS)


def _undone(
    pieces: Iterator[bytes],
    decoder_for: Callable[[bytes], _Decoder],
    errors: tuple[type[Exception], ...],
) -> Iterator[bytes]:
    decoder: _Decoder | None = None
    streams = 0
    for piece in pieces:
        data = piece
        while True:
            if decoder is None:
                if not data:
                    break
                decoder = decoder_for(data)
                streams += 1
                if streams > _MAX_STREAMS:
                    raise CannotDecode(f"it is more than {_MAX_STREAMS} compressed streams")
            try:
                out, data = decoder.decompress(data)
            except errors:
                raise CannotDecode("it is not compressed as its Content-Encoding says") from None
            yield out
            if decoder.ended:  # another member may follow (RFC 1952, section 2.2; RFC 8878, section 3)
                decoder = None
            elif not decoder.full:
                break
    if decoder is not None:
        raise CannotDecode("it ends before its compressed data does")


def _module(*names: str) -> Any:
    """The first of the modules that is installed, or None."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _codings() -> dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]]:
    """The decoder of each coding that has an installed library, by its name."""
    gzip, errors = lambda _: _Zlib(16 + zlib.MAX_WBITS), (zlib.error,)
    found = {
        "gzip": lambda pieces: _undone(pieces, gzip, errors),
        "x-gzip": lambda pieces: _undone(pieces, gzip, errors),
        "deflate": lambda pieces: _undone(pieces, _deflate, errors),
    }
    if (brotli := _module("brotli", "brotlicffi")) is not None:
        found["br"] = lambda pieces: _undone(pieces, lambda _: _Brotli(brotli), (brotli.error,))
    if (zstd := _module("compression.zstd", "backports.zstd")) is not None:
        found["zstd"] = lambda pieces: _undone(pieces, lambda _: _Zstd(zstd), (zstd.ZstdError,))
    return found


CODINGS: Final = _codings()
