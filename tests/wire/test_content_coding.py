"""Compressed bodies: undone in pieces, no further than a limit, refused when they are none."""

from __future__ import annotations

import gzip
import importlib
import sys
import zlib
from collections.abc import Callable

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncproxy.wire import content_coding
from asyncproxy.wire.content_coding import CannotDecode, decoded
from tests.growth import lines_run_in

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

KIB, MIB = 1024, 1024**2


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:]),
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
}


def undo(coding: str, packed: bytes, max_bytes: int = 64 * MIB) -> bytes:
    return b"".join(decoded(coding.split(","), packed, max_bytes=max_bytes))


@pytest.mark.parametrize("coding", COMPRESS)
@given(body=st.binary(max_size=500), times=st.sampled_from([1, 3, 3000]))
@settings(max_examples=30, deadline=None)
def test_what_was_compressed_is_undone(coding: str, body: bytes, times: int) -> None:
    assert undo(coding, COMPRESS[coding](body * times)) == body * times


def test_deflate_may_lack_its_frame() -> None:
    assert undo("deflate", raw_deflate(b"hello" * 1000)) == b"hello" * 1000


def test_two_codings_are_undone_in_turn() -> None:
    assert undo("deflate,gzip", gzip.compress(zlib.compress(b"hello"))) == b"hello"


def test_an_empty_body_is_empty_in_every_coding() -> None:
    assert undo("gzip", b"") == b""


@pytest.mark.parametrize("coding", COMPRESS)
def test_what_is_cut_off_or_damaged_is_refused(coding: str) -> None:
    packed = COMPRESS[coding](bytes(range(256)) * 40)
    for broken in (packed[:-1], packed[: len(packed) // 2], b"{}" + packed, packed + b"{}", b"\xff"):
        with pytest.raises(CannotDecode) as caught:
            undo(coding, broken)
        assert "{}" not in str(caught.value)


@pytest.mark.parametrize("coding", [*COMPRESS, "gzip,gzip"])
def test_little_more_than_the_limit_is_undone_in_pieces_of_a_bounded_size(coding: str) -> None:
    packed = bytes(64 * MIB)
    for name in coding.split(","):
        packed = COMPRESS[name](packed)
    pieces = [len(piece) for piece in decoded(coding.split(","), packed, max_bytes=MIB)]
    assert max(pieces) <= 512 * KIB
    assert MIB < sum(pieces) <= MIB + 512 * KIB


def test_streams_without_a_content_are_not_undone_for_ever() -> None:
    for coding, empty in (("gzip", gzip.compress(b"")), ("zstd", zstd.compress(b""))):
        assert undo(coding, empty * 1000) == b""
        steps = []
        for times in (10_000, 20_000):
            with lines_run_in(content_coding) as count, pytest.raises(CannotDecode):
                undo(coding, empty * times)
            steps.append(count())
        assert steps[0] == steps[1]


def test_a_frame_with_a_huge_window_is_refused() -> None:
    """The window is memory that the decoder takes: RFC 9659 allows 8 MiB of it."""
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    packed = packer.compress(b"a" * MIB) + packer.flush()
    with pytest.raises(CannotDecode):
        undo("zstd", packed)
