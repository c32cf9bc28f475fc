"""The wishes of a request for waiting and lifetime: ``Prefer``, ``?wait=``, the TTL header. Pure.

A value that cannot be read counts as absent, so no value can make a request fail.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["preferences", "ttl", "wait"]

_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

# A preference up to its comma: name, value, and the parameters, which are skipped. A comma or semicolon
# within quotes separates nothing.
_QUOTED: Final = r'"(?:[^"\\]|\\.)*+"'
_PREFERENCE: Final = re.compile(
    rf'[\s,]*+([^\s=;,"]++)\s*+(?:=\s*+(?:({_QUOTED})|([^;,"]*+))\s*+)?+(?:;(?:[^,"]|{_QUOTED})*+)?+(?:,|$)'
)


def ttl(value: str | None, *, default_s: int, max_s: int) -> int:
    """The lifetime of a result after completion in seconds, given ``x-bf-async-job-result-ttl``.

    A value that is missing, no number, zero or negative gives the default. A value over the maximum
    gives the maximum.
    """
    if value is None or not (value.isascii() and value.isdecimal()):
        return default_s
    digits = value.lstrip("0")
    if not digits:
        return default_s
    return min(int(digits), max_s) if len(digits) < 10 else max_s


def wait(query: str | None, prefer: str | None, *, max_s: float) -> float | None:
    """Seconds that a client asks to wait: ``?wait=``, or else ``Prefer: wait=``, at most ``max_s``.

    None if neither is there, or neither can be read.
    """
    preferred = preferences(prefer).get("wait") if prefer else None
    for value in (query, preferred):
        if value is not None and _SECONDS.fullmatch(value):
            return min(float(value), max_s)
    return None


def preferences(prefer: str) -> dict[str, str]:
    """The preferences of a ``Prefer`` field (RFC 7240): lower-case names, values without quotes.

    The preferences after an unreadable one count as absent, because its end is not known.
    """
    found: dict[str, str] = {}
    at = 0
    while one := _PREFERENCE.match(prefer, at):
        name, quoted, bare = one.groups(default="")
        value = re.sub(r"\\(.)", r"\1", quoted[1:-1]) if quoted else bare.strip()
        found.setdefault(name.lower(), value)  # the first of two with the same name counts
        at = one.end()
    return found
