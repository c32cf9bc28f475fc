"""Small answers wait for the end of the round, in order, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from asyncproxy.loop.write_coalescing import CoalescingTransport, WriteCoalescer

LARGE = b"x" * (64 * 1024 + 1)


class Wire(asyncio.Transport):
    """Notes what a transport is told to do, with the others that share ``told``."""

    def __init__(self, name: str, told: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.name = name
        self.told = told
        self.closing = False

    def write(self, data: Any) -> None:
        assert not self.closing
        self.told.append((self.name, bytes(data)))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.told.append((self.name, b"".join(list_of_data)))

    def write_eof(self) -> None:
        self.told.append((self.name, "eof"))

    def close(self) -> None:
        self.closing = True
        self.told.append((self.name, "close"))

    def abort(self) -> None:
        self.closing = True
        self.told.append((self.name, "abort"))

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 1000


def wires(*names: str) -> tuple[list[tuple[str, Any]], list[CoalescingTransport]]:
    told: list[tuple[str, Any]] = []
    cork = WriteCoalescer(32)
    return told, [CoalescingTransport(Wire(name, told), cork) for name in names]


async def test_small_answers_leave_together_when_the_round_is_over() -> None:
    told, (a, b) = wires("a", "b")
    a.write_soon(b"1")
    b.write_soon(b"2")
    assert (told, a.get_write_buffer_size()) == ([], 1001)
    await asyncio.sleep(0)
    assert (told, a.get_write_buffer_size()) == ([("a", b"1"), ("b", b"2")], 1000)
    a.write_soon(b"3")
    await asyncio.sleep(0)
    assert told[2:] == [("a", b"3")]


async def test_what_cannot_wait_leaves_after_what_waits() -> None:
    steps: list[tuple[Callable[[CoalescingTransport], None], object]] = [
        (lambda t: t.write(b"at once"), b"at once"),
        (lambda t: t.write_soon(LARGE), LARGE),
        (lambda t: t.writelines([b"l", b"m"]), b"lm"),
        (lambda t: t.write_eof(), "eof"),
        (lambda t: t.close(), "close"),
    ]
    for last, said in steps:
        told, (a,) = wires("a")
        a.write_soon(b"1")
        last(a)
        assert told == [("a", b"1"), ("a", said)]
        await asyncio.sleep(0)
        assert told == [("a", b"1"), ("a", said)]


async def test_answers_of_one_connection_are_one_write() -> None:
    told, (a,) = wires("a")
    a.write_soon(b"1")
    a.write_soon(b"2")
    await asyncio.sleep(0)
    assert told == [("a", b"12")]


async def test_a_large_answer_does_not_wait_nor_does_what_is_no_whole_answer() -> None:
    told, (a,) = wires("a")
    a.write_soon(LARGE)
    a.write(b"head")
    assert told == [("a", LARGE), ("a", b"head")]


async def test_a_connection_that_is_gone_gets_nothing() -> None:
    told, (a, b, c) = wires("a", "b", "c")
    for transport in (a, b, c):
        transport.write_soon(b"1")
    a.abort()
    b._inner.close()  # by the peer, which our end is not asked about
    await asyncio.sleep(0)
    assert told == [("a", "abort"), ("b", "close"), ("c", b"1")]


async def test_only_so_many_wait_for_the_end_of_a_round() -> None:
    told, all_of_them = wires(*map(str, range(70)))
    for transport in all_of_them:
        transport.write_soon(b"1")
    assert len(told) == 64
    await asyncio.sleep(0)
    assert told == [(str(number), b"1") for number in range(70)]
