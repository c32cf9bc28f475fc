"""The ``Range`` of a request (RFC 9110, section 14): which bytes of a response a client asks for."""

from __future__ import annotations

import re
from typing import Final

from asyncproxy.core.errors import RangeNotSatisfiable

__all__ = ["byte_range"]

# More digits than any size has are not read.
_ONE_RANGE: Final = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*", re.ASCII | re.IGNORECASE)


def byte_range(value: str | None, size: int) -> range | None:
    """The bytes of a response of ``size`` bytes that a ``Range`` field asks for. None: all of them.

    A field that is malformed, has another unit or names several ranges asks for all of them.
    Raises :class:`RangeNotSatisfiable` for a range that holds no byte of the response.
    """
    found = _ONE_RANGE.fullmatch(value) if value else None
    if found is None:
        return None
    first, last = found.groups()
    if not first:
        if not last:
            return None
        start, stop = max(0, size - int(last)), size
    else:
        start = int(first)
        if last and int(last) < start:
            return None
        stop = min(int(last) + 1, size) if last else size
    if start >= stop:
        raise RangeNotSatisfiable(size)
    return range(start, stop)
