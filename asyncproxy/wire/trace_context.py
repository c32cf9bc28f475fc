"""The ``traceparent`` of a request (W3C Trace Context, section 3.2). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["carried", "format_traceparent", "trace_id", "valid"]

# Of version 00, or of a later one as far as it is known: then more may follow.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)


def valid(traceparent: str | None) -> str:
    """``traceparent`` without what a later version may add, or empty if it is none.

    Whatever a client sends, it is 55 characters at the most.
    """
    if not traceparent:
        return ""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or (match["more"] and match[0].startswith("00")):
        return ""
    return match[0][:55]


def trace_id(traceparent: str | None) -> str:
    """The id of the trace, 32 hexadecimal digits, or empty if there is none."""
    return valid(traceparent)[3:35]


def format_traceparent(trace: int, span: int, flags: int) -> str:
    """The ``traceparent`` of a span."""
    return f"00-{trace:032x}-{span:016x}-{flags:02x}"


def carried(headers: Iterable[tuple[str, str]], traceparent: str) -> list[tuple[str, str]]:
    """``headers`` with another ``traceparent``: whoever gets them is one step further down."""
    others = [pair for pair in headers if pair[0].lower() != "traceparent"]
    return [*others, ("traceparent", traceparent)]
