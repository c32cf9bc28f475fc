"""The ``traceparent`` of a request (W3C Trace Context, section 3.2). Pure."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["trace_id", "valid"]

# Of version 00, or of a later one as far as it is known: then more may follow.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)


def valid(traceparent: str | None) -> str:
    """``traceparent`` without what a later version may add, or empty if it is none.

    Whatever a client sends, it is 55 characters at the most.
    """
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if match is None or (match["more"] and match[0].startswith("00")):
        return ""
    return match[0][:55]


def trace_id(traceparent: str | None) -> str:
    """The id of the trace, 32 hexadecimal digits, or empty if there is none."""
    return valid(traceparent)[3:35]
