"""Which header fields travel end to end, and which stay behind. Pure.

RFC 9110, section 7.6.1. Header fields are pairs here, in order and with their repetitions: a dict
would drop the second ``Set-Cookie``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Final

from asyncproxy.core.errors import InvalidRequest

__all__ = [
    "CONTENT_LIMIT",
    "HOP_BY_HOP",
    "OURS",
    "field_lines",
    "hop_by_hop",
    "request_headers",
    "response_lines",
]

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
    }
)

# The request headers of the wire contract that are meant for us.
OURS: Final = frozenset(
    {
        "prefer",
        "x-bf-async",
        "x-bf-async-id",
        "x-bf-async-job-result-ttl",
        "x-bf-async-webhook",
    }
)

# Headers of an upstream's answer that are kept for /content, in bytes (the contract, section 3).
CONTENT_LIMIT: Final = 16 * 1024

# Heads up to this size are remembered, by the names of their fields, unless Connection names others:
# it bounds what that takes.
_FEW_FIELDS: Final = 64
_SHORT_NAMES: Final = 2048

_SURROGATE: Final = re.compile("[\ud800-\udfff]")

# Written anew for each hop, from what we know of it.
_REPLACED: Final = frozenset({"host", "expect", "content-length"})

# What ``Connection`` says nearly always: nothing that is a field.
_USUAL: Final = frozenset({"keep-alive", "close"})

_HOP_BY_HOP_BYTES: Final = frozenset(name.encode() for name in HOP_BY_HOP)

Pairs = list[tuple[str, str]]


def hop_by_hop(connection: Sequence[str]) -> frozenset[str]:
    """The names that stay behind, lower case, given the values of the ``Connection`` fields."""
    if not connection or (len(connection) == 1 and connection[0].lower() in _USUAL):
        return HOP_BY_HOP
    named = {name.strip().lower() for value in connection for name in value.split(",")}
    named.discard("")
    if named <= _USUAL:
        return HOP_BY_HOP
    # Content-Length and Host cannot be declared hop by hop: that would change what the message is.
    return HOP_BY_HOP | (named - {"content-length", "host"})


def request_headers(
    items: Sequence[tuple[str, str]],
    *,
    connection: Sequence[str],
    peer: str | None,
    scheme: str,
    host: str,
    request_id: str | None,
    without: frozenset[str] = frozenset(),
) -> Pairs:
    """The fields of a client's request as they go to the upstream.

    ``without`` names further ones that do not, lower case. ``Content-Length`` is left out: whoever
    sends the body knows its length. ``X-Forwarded-For``, ``-Proto``, ``-Host`` and ``X-Request-Id``
    (if there is a ``request_id``) are added: the address of the peer is appended to those that are
    there, the others keep the value that a proxy before us has set. Raises :class:`InvalidRequest` for
    a field that is not UTF-8: our client library would send it without the bytes that it cannot encode.
    """
    names: tuple[str, ...]
    values: tuple[str, ...]
    names, values = zip(*items, strict=True) if items else ((), ())
    by_hop = hop_by_hop(connection)
    usual = by_hop is HOP_BY_HOP and len(names) <= _FEW_FIELDS and len("".join(names)) <= _SHORT_NAMES
    plan = _plan if usual else _plan.__wrapped__
    pick, present = plan(names, by_hop, without)
    headers: Pairs = [*pick(items)]
    if not "".join(values).isascii():
        for name, value in [*headers, ("Host", host)]:
            if _SURROGATE.search(value):
                raise InvalidRequest(f"The header {name} is not UTF-8.")
    if peer:
        if "x-forwarded-for" in present:
            seen = [value for name, value in headers if name.lower() == "x-forwarded-for"]
            headers = [pair for pair in headers if pair[0].lower() != "x-forwarded-for"]
            peer = ", ".join([*seen, peer])
        headers.append(("X-Forwarded-For", peer))
    if "x-forwarded-proto" not in present:
        headers.append(("X-Forwarded-Proto", scheme))
    if "x-forwarded-host" not in present and host:
        headers.append(("X-Forwarded-Host", host))
    if request_id is not None and "x-request-id" not in present:
        headers.append(("X-Request-Id", request_id))
    return headers


@lru_cache(maxsize=256)  # clients differ in their values, and hardly in their names
def _plan(
    names: tuple[str, ...], by_hop: frozenset[str], without: frozenset[str]
) -> tuple[Callable[[Sequence[tuple[str, str]]], Iterable[tuple[str, str]]], frozenset[str]]:
    """How to pick the fields that travel from those with ``names``, and their names in lower case."""
    dropped = by_hop | _REPLACED | without
    lowered = [name.lower() for name in names]
    kept = [position for position, name in enumerate(lowered) if name not in dropped]
    present = frozenset(lowered[position] for position in kept)
    if len(kept) > 1:
        return itemgetter(*kept), present
    return itemgetter(slice(kept[0], kept[0] + 1) if kept else slice(0)), present


def field_lines(fields: Iterable[tuple[str, str]]) -> str:
    """Header fields as lines, each with its CRLF. None of them may have one in it."""
    return "".join([f"{name}: {value}\r\n" for name, value in fields])


def response_lines(
    raw: Iterable[tuple[bytes, bytes]],
    *,
    without: frozenset[bytes] = frozenset(),
    limit: int | None = None,
) -> bytes:
    """The fields of an upstream's answer that go to the client, as header lines with their CRLF.

    Byte for byte, in order, with repetitions. ``without`` names further ones that do not, lower
    case. Past ``limit`` bytes the rest is left out, whole fields only.
    """
    raw = tuple(raw)
    dropped = _HOP_BY_HOP_BYTES
    connection = [v.decode("latin-1") for k, v in raw if k.lower() == b"connection"]
    if connection and (named := hop_by_hop(connection)) is not HOP_BY_HOP:
        dropped = frozenset(name.encode() for name in named)
    lines: list[bytes] = []
    size = 0
    for name, value in raw:
        lowered = name.lower()
        if lowered in dropped or lowered in without:
            continue
        line = b"%b: %b\r\n" % (name, value)
        if line.count(b"\r") > 1 or line.count(b"\n") > 1:
            continue  # aiohttp reads upstreams leniently; what it lets through must not split ours
        size += len(line)
        if limit is not None and size > limit:
            break
        lines.append(line)
    return b"".join(lines)
