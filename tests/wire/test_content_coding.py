"""Content codings are undone, within a limit and in linear work."""

from __future__ import annotations

import gzip
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncproxy.wire import content_coding
from asyncproxy.wire.content_coding import TooLarge, Undecodable, codings, decode


def gzipped(data: bytes) -> bytes:
    """Without a time in it: what is in the name of a test is the same in each process."""
    return gzip.compress(data, mtime=0)


MEMBER = gzipped(b"x")


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], []),
        ([(b"Content-Encoding", b"GZip")], ["gzip"]),
        ([(b"content-encoding", b" deflate ,gzip,, identity")], ["deflate", "gzip"]),
        ([(b"Content-Encoding", b"br"), (b"X", b"y"), (b"CONTENT-ENCODING", b"gzip")], ["br", "gzip"]),
    ],
)
def test_the_codings_of_a_message(fields: list[tuple[bytes, bytes]], expected: list[str]) -> None:
    assert codings(fields) == expected


@pytest.mark.parametrize(
    ("names", "body"),
    [
        (["gzip"], gzipped(b"hello")),
        (["x-gzip"], gzipped(b"hello")),
        (["deflate"], zlib.compress(b"hello")),
        (["deflate"], raw_deflate(b"hello")),
        (["gzip"], gzipped(b"hel") + gzipped(b"") + gzipped(b"lo")),
        (["deflate", "gzip"], gzipped(zlib.compress(b"hello"))),
        (["gzip", "gzip"], gzipped(gzipped(b"hello"))),
    ],
)
def test_what_is_undone(names: list[str], body: bytes) -> None:
    assert decode(body, names, 40) == b"hello"


@given(st.binary(max_size=3000), st.integers(1, 4))
def test_what_was_coded_comes_back(data: bytes, members: int) -> None:
    step = len(data) // members + 1
    body = b"".join(gzipped(data[i : i + step]) for i in range(0, len(data), step))
    assert decode(body, ["gzip"], len(data)) == data


@pytest.mark.parametrize(
    ("names", "body"),
    [
        (["foo"], b"hello"),
        (["gzip"], b"{}"),
        (["gzip"], gzipped(b"hello")[:-1]),
        (["gzip"], gzipped(b"hello") + b"rubbish"),
        (["deflate"], b"\xff" * 9),
        (5 * ["gzip"], b""),
    ],
)
def test_what_cannot_be_undone(names: list[str], body: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(body, names, 1000)


@pytest.mark.parametrize("names", [["gzip"], ["gzip", "gzip"]])
def test_a_bomb_is_not_unpacked(names: list[str]) -> None:
    body = b"\0" * 100_000_000
    for _ in names:
        body = gzipped(body)
    with pytest.raises(TooLarge):
        decode(body, names, 1_000_000)


def bytes_fed(members: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes are handed to the library, or handed back by it, for so many short streams."""
    fed = 0

    class Counting:
        def __init__(self, bits: int) -> None:
            self._inner = zlib.decompressobj(bits)

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal fed
            content = self._inner.decompress(data, limit)
            fed += len(data) + len(self._inner.unused_data)
            return content

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    class Library:
        decompressobj = Counting
        error = zlib.error

    with monkeypatch.context() as patch:
        patch.setattr(content_coding, "zlib", Library)
        assert decode(MEMBER * members, ["gzip"], members) == b"x" * members
    return fed


def test_many_short_streams_cost_what_their_bytes_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = bytes_fed(2_000, monkeypatch), bytes_fed(4_000, monkeypatch)
    assert large <= 3 * small
    assert large <= 4_000 * len(MEMBER) * 30
