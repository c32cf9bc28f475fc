"""Which bytes of a response a ``Range`` field asks for."""

from __future__ import annotations

import pytest

from asyncproxy.core.errors import RangeNotSatisfiable
from asyncproxy.wire.byte_range import byte_range

SIZE = 10


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("bytes=0-", range(10)),
        ("bytes=0-0", range(1)),
        ("bytes=3-5", range(3, 6)),
        ("bytes=9-", range(9, 10)),
        ("bytes=4-9", range(4, 10)),
        ("bytes=4-10", range(4, 10)),
        ("bytes=4-999999999999999999", range(4, 10)),
        ("bytes=-1", range(9, 10)),
        ("bytes=-10", range(10)),
        ("bytes=-11", range(10)),
        ("Bytes= 3-5\t", range(3, 6)),
    ],
)
def test_a_range_is_read(value: str, found: range) -> None:
    assert byte_range(value, SIZE) == found


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=5-3",
        "bytes=a-b",
        "bytes=1-2,4-5",
        "bytes=1-2-3",
        "bytes=+1-2",
        "bytes=\u0663-5",
        "bytes=0-" + "9" * 19,
        "items=0-1",
        " bytes=0-1",
    ],
)
def test_what_is_no_single_range_of_bytes_asks_for_all(value: str | None) -> None:
    assert byte_range(value, SIZE) is None


@pytest.mark.parametrize(
    ("value", "size"), [("bytes=10-", 10), ("bytes=10-12", 10), ("bytes=-0", 10), ("bytes=0-", 0)]
)
def test_a_range_without_a_byte_is_refused(value: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as error:
        byte_range(value, size)
    assert error.value.headers == (("Content-Range", f"bytes */{size}"),)
