"""The ``traceparent`` of a request (W3C Trace Context, section 3.2). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["carried", "format_traceparent", "trace_id", "valid"]

# Version 00, or the part of a later version that is known: more may follow in a later version.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)


def valid(traceparent: str | None) -> str:
    """``traceparent`` without the additions of a later version. Empty if it is not valid.

    The result has at most 55 characters.
    """
    if not traceparent:
        return ""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or (match["more"] and match[0].startswith("00")):
        return ""
    return match[0][:55]


def trace_id(traceparent: str | None) -> str:
    """The id of the trace, 32 hexadecimal digits. Empty if ``traceparent`` is not valid."""
    return valid(traceparent)[3:35]


def format_traceparent(trace: int, span: int, flags: int) -> str:
    """The ``traceparent`` of a span."""
    return f"00-{trace:032x}-{span:016x}-{flags:02x}"


def carried(headers: Iterable[tuple[str, str]], traceparent: str) -> list[tuple[str, str]]:
    """``headers`` with this ``traceparent`` in place of theirs: the receiver is its child."""
    others = [pair for pair in headers if pair[0].lower() != "traceparent"]
    return [*others, ("traceparent", traceparent)]
