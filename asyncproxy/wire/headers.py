"""Which header fields travel end to end, and which stay behind. Pure.

RFC 9110, section 7.6.1. Header fields are the pairs of bytes that stood on the wire, in order and with
their repetitions: a dict would drop the second ``Set-Cookie``.
"""

from __future__ import annotations

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
    "raw_lines",
    "request_headers",
    "response_lines",
    "texts",
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

# Written anew for each hop, from what we know of it.
_REPLACED: Final = frozenset({"host", "expect", "content-length"})

# What ``Connection`` says nearly always: nothing that is a field.
_USUAL: Final = frozenset({"keep-alive", "close"})

Fields = list[tuple[bytes, bytes]]
_Plan = tuple[Callable[[Sequence[tuple[bytes, bytes]]], Iterable[tuple[bytes, bytes]]], frozenset[str]]

_NONE: Final[frozenset[str]] = frozenset()


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
    raw: Sequence[tuple[bytes, bytes]],
    *,
    connection: Sequence[str],
    peer: str | None,
    scheme: str,
    host: str,
    request_id: str | None,
    without: frozenset[str] = _NONE,
) -> Fields:
    """The fields of a client's request as they go to the upstream, byte for byte.

    ``without`` names further ones that do not, lower case. ``Content-Length`` is left out: whoever
    sends the body knows its length. ``X-Forwarded-For``, ``-Proto``, ``-Host`` and ``X-Request-Id``
    (if there is a ``request_id``) are added, unless they are in ``without``: the address of the peer is
    appended to those that are there, the others keep the value that a proxy before us has set.
    """
    pick, present = _plan_for(raw, hop_by_hop(connection), _REPLACED, without)
    fields: Fields = [*pick(raw)]
    if peer and "x-forwarded-for" not in without:
        forwarded = peer.encode()
        if "x-forwarded-for" in present:
            seen = [value for name, value in fields if name.lower() == b"x-forwarded-for"]
            fields = [field for field in fields if field[0].lower() != b"x-forwarded-for"]
            forwarded = b", ".join([*seen, forwarded])
        fields.append((b"X-Forwarded-For", forwarded))
    present |= without
    if "x-forwarded-proto" not in present:
        fields.append((b"X-Forwarded-Proto", scheme.encode()))
    if host and "x-forwarded-host" not in present:
        fields.append((b"X-Forwarded-Host", host.encode("utf-8", "surrogateescape")))
    if request_id is not None and "x-request-id" not in present:
        fields.append((b"X-Request-Id", request_id.encode("utf-8", "surrogateescape")))
    return fields


def texts(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Fields as text, as a job keeps them. Raises :class:`InvalidRequest` for one that is not UTF-8."""
    pairs = []
    for name, value in fields:
        try:
            pairs.append((name.decode(), value.decode()))
        except UnicodeDecodeError:
            shown = name.decode("ascii", "replace")
            raise InvalidRequest(f"The header {shown} is not UTF-8.") from None
    return pairs


def _plan_for(
    raw: Sequence[tuple[bytes, bytes]],
    by_hop: frozenset[str],
    replaced: frozenset[str],
    without: frozenset[str],
) -> _Plan:
    names = tuple([name for name, _ in raw])
    usual = by_hop is HOP_BY_HOP and len(names) <= _FEW_FIELDS and len(b"".join(names)) <= _SHORT_NAMES
    plan = _plan if usual else _plan.__wrapped__
    return plan(names, by_hop, replaced, without)


@lru_cache(maxsize=256)  # messages differ in their values, and hardly in their names
def _plan(
    names: tuple[bytes, ...],
    by_hop: frozenset[str],
    replaced: frozenset[str],
    without: frozenset[str],
) -> _Plan:
    """How to pick the fields that travel from those with ``names``, and their names in lower case."""
    dropped = by_hop | replaced | without
    lowered = [name.lower().decode("latin-1") for name in names]
    kept = [position for position, name in enumerate(lowered) if name not in dropped]
    present = frozenset(lowered[position] for position in kept)
    if len(kept) > 1:
        return itemgetter(*kept), present
    return itemgetter(slice(kept[0], kept[0] + 1) if kept else slice(0)), present


def field_lines(fields: Iterable[tuple[str, str]]) -> str:
    """Header fields as lines, each with its CRLF. None of them may have one in it."""
    return "".join([f"{name}: {value}\r\n" for name, value in fields])


def raw_lines(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Raw header fields as lines, each with its CRLF. A field that would be two lines is left out.

    aiohttp reads upstreams leniently: what it lets through must not split a message of ours.
    """
    lines = b"".join([b"%b: %b\r\n" % field for field in fields])
    if lines.count(b"\n") == len(fields) == lines.count(b"\r"):
        return lines
    return b"".join([line for field in fields if _is_one(line := b"%b: %b\r\n" % field)])


def _is_one(line: bytes) -> bool:
    return line.count(b"\r") == 1 == line.count(b"\n")


def response_lines(
    raw: Sequence[tuple[bytes, bytes]], *, without: frozenset[str] = _NONE, limit: int | None = None
) -> bytes:
    """The fields of an upstream's answer that go to the client, as header lines with their CRLF.

    Byte for byte, in order, with repetitions. ``without`` names further ones that do not, lower
    case. Past ``limit`` bytes the rest is left out, whole fields only.
    """
    connection = [value.decode("latin-1") for name, value in raw if name.lower() == b"connection"]
    pick, _ = _plan_for(raw, hop_by_hop(connection), _NONE, without)
    lines = raw_lines([*pick(raw)])
    if limit is None or len(lines) <= limit:
        return lines
    return lines[: lines.rfind(b"\n", 0, limit) + 1]
