"""What a request says about waiting and lifetimes: ``Prefer``, ``?wait=``, the TTL header. Pure.

Whatever cannot be read counts as absent: none of it can make a request fail.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["preferences", "ttl", "wait"]

_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def ttl(value: str | None, *, default_s: int, max_s: int) -> int:
    """Seconds that a result lives after completion, given ``x-bf-async-job-result-ttl``.

    Missing, not a number, zero or negative: the default. Over the maximum: the maximum.
    """
    if value is None or not (value.isascii() and value.isdecimal()):
        return default_s
    digits = value.lstrip("0")
    if not digits:
        return default_s
    return min(int(digits), max_s) if len(digits) < 10 else max_s


def wait(query: str | None, prefer: str | None, *, max_s: float) -> float | None:
    """Seconds that a client is ready to wait: ``?wait=`` or else ``Prefer: wait=``, ``max_s`` at most.

    None if it did not say, or in a way that cannot be read.
    """
    preferred = preferences(prefer).get("wait") if prefer else None
    for value in (query, preferred):
        if value is not None and _SECONDS.fullmatch(value):
            return min(float(value), max_s)
    return None


def preferences(prefer: str) -> dict[str, str]:
    """The preferences of a ``Prefer`` field (RFC 7240): lower-case names, values without quotes."""
    found: dict[str, str] = {}
    for part in prefer.split(","):
        name, _, value = part.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found
