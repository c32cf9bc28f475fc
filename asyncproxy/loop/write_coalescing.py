"""Small writes of one round of the event loop leave together, at the start of the next round.

Each socket write may wake the receiving process. Across cores that costs as much as the write. Writing
several responses back to back wakes the receiver once. The computing of a round is not interrupted by
system calls either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final, Protocol

__all__ = ["CoalescingTransport", "Flushable", "WriteCoalescer"]

# Bytes of a response that may wait. A larger response takes longer to send than a wake-up does.
_SMALL: Final = 64 * 1024


class Flushable(Protocol):
    """Holds a write back until it is flushed."""

    def flush(self) -> None:
        """Write what is held back. Must not raise: others are flushed after this one."""


class WriteCoalescer:
    """Flushes its members at the end of a round, or as soon as there are ``most`` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._holding: list[Flushable] = []

    def hold(self, held: Flushable) -> None:
        """Flush ``held`` when this round of the loop is over, or earlier. May be called twice."""
        holding = self._holding
        if not holding:
            asyncio.get_running_loop().call_soon(self._release)
        holding.append(held)
        if len(holding) >= self._most:
            self._release()

    def _release(self) -> None:
        holding, self._holding = self._holding, []
        for held in holding:
            held.flush()


class CoalescingTransport(asyncio.Transport):
    """Wraps ``inner``, so that a small response may wait for others. Writes keep their order."""

    __slots__ = ("_cork", "_held", "_inner")

    def __init__(self, inner: asyncio.Transport, cork: WriteCoalescer) -> None:
        super().__init__()
        self._inner = inner
        self._cork = cork
        self._held: bytes | None = None

    def write_soon(self, data: bytes) -> None:
        """Write ``data``, the end of a response, together with the other writes of this round."""
        held = self._held or b""
        if len(held) + len(data) > _SMALL:
            self.write(data)
        else:
            self._held = held + data if held else data
            if not held:
                self._cork.hold(self)

    def write(self, data: Any) -> None:
        self.flush()
        self._inner.write(data)

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.flush()
        self._inner.writelines(list_of_data)

    def flush(self) -> None:
        """Write the held data, unless the connection closes."""
        held, self._held = self._held, None
        if held is not None and not self._inner.is_closing():
            self._inner.write(held)

    def get_write_buffer_size(self) -> int:
        held = 0 if self._held is None else len(self._held)
        return held + self._inner.get_write_buffer_size()

    def write_eof(self) -> None:
        self.flush()
        self._inner.write_eof()

    def close(self) -> None:
        self.flush()
        self._inner.close()

    def abort(self) -> None:
        self._held = None
        self._inner.abort()

    # The rest is delegated to the inner transport.

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def is_reading(self) -> bool:
        return self._inner.is_reading()

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def can_write_eof(self) -> bool:
        return self._inner.can_write_eof()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._inner.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._inner.set_write_buffer_limits(high, low)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner.get_protocol()
