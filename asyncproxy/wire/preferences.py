"""What a request says about waiting and lifetimes: ``Prefer``, ``?wait=``, the TTL header. Pure.

Whatever cannot be read counts as absent: none of it can make a request fail.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["preferences", "ttl", "wait"]

_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

# A preference up to its comma: name, value, and the parameters, which are skipped. A comma or semicolon
# within quotes ends nothing.
_QUOTED: Final = r'"(?:[^"\\]|\\.)*+"'
_PREFERENCE: Final = re.compile(
    rf'[\s,]*+([^\s=;,"]++)\s*+(?:=\s*+(?:({_QUOTED})|([^;,"]*+))\s*+)?+(?:;(?:[^,"]|{_QUOTED})*+)?+(?:,|$)'
)


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
    """The preferences of a ``Prefer`` field (RFC 7240): lower-case names, values without quotes.

    What stands behind one that cannot be read is as if it were absent: where it ends is not known.
    """
    found: dict[str, str] = {}
    at = 0
    while one := _PREFERENCE.match(prefer, at):
        name, quoted, bare = one.groups(default="")
        value = re.sub(r"\\(.)", r"\1", quoted[1:-1]) if quoted else bare.strip()
        found.setdefault(name.lower(), value)  # of one that is there twice, the first counts
        at = one.end()
    return found
