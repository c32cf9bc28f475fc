"""Which header fields are forwarded and which are dropped. Pure.

RFC 9110, section 7.6.1. Header fields are pairs of bytes, as they stood on the wire, in order and with
repetitions: a dict would drop the second ``Set-Cookie``.
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

# The request headers of the wire contract that are meant for the proxy.
OURS: Final = frozenset(
    {
        "prefer",
        "x-bf-async",
        "x-bf-async-id",
        "x-bf-async-job-result-ttl",
        "x-bf-async-webhook",
    }
)

# Bytes of an upstream's response headers that are kept for /content (the wire contract, section 3).
CONTENT_LIMIT: Final = 16 * 1024

# Limits of a set of field names whose plan is cached: they bound the cache. A head with more fields or
# longer names gets a new plan each time, and so does a head whose Connection names further fields.
_FEW_FIELDS: Final = 64
_SHORT_NAMES: Final = 2048

# Fields that each hop writes anew.
_REPLACED: Final = frozenset({"host", "expect", "content-length"})

# The usual values of ``Connection``. They name no field.
_USUAL: Final = frozenset({"keep-alive", "close"})

Fields = list[tuple[bytes, bytes]]
_Plan = tuple[Callable[[Sequence[tuple[bytes, bytes]]], Iterable[tuple[bytes, bytes]]], frozenset[str]]

_NONE: Final[frozenset[str]] = frozenset()


def hop_by_hop(connection: Sequence[str]) -> frozenset[str]:
    """The names of the fields to drop, lower case, given the values of the ``Connection`` fields."""
    if not connection or (len(connection) == 1 and connection[0].lower() in _USUAL):
        return HOP_BY_HOP
    named = {name.strip().lower() for value in connection for name in value.split(",")}
    named.discard("")
    if named <= _USUAL:
        return HOP_BY_HOP
    # Connection must not name Content-Length or Host: dropping them would change the message.
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
    """The header fields of a client's request that go to the upstream, byte for byte.

    ``without`` names further fields to drop, lower case. ``Content-Length`` is dropped too: the sender
    of the body adds it. ``X-Forwarded-For``, ``-Proto``, ``-Host`` and ``X-Request-Id`` (if there is a
    ``request_id``) are added, unless they are in ``without``. The peer's address is appended to the
    addresses in ``X-Forwarded-For``. The other fields keep a value that is already there.
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
    """Fields as text, for a job. Raises :class:`InvalidRequest` if a field is not UTF-8."""
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


@lru_cache(maxsize=256)  # most messages have the same few sets of names
def _plan(
    names: tuple[bytes, ...],
    by_hop: frozenset[str],
    replaced: frozenset[str],
    without: frozenset[str],
) -> _Plan:
    """A function that picks the forwarded fields from those with ``names``, and the picked names.

    The picked names are in lower case.
    """
    dropped = by_hop | replaced | without
    lowered = [name.lower().decode("latin-1") for name in names]
    kept = [position for position, name in enumerate(lowered) if name not in dropped]
    present = frozenset(lowered[position] for position in kept)
    if len(kept) > 1:
        return itemgetter(*kept), present
    return itemgetter(slice(kept[0], kept[0] + 1) if kept else slice(0)), present


def field_lines(fields: Iterable[tuple[str, str]]) -> str:
    """Header fields as lines, each with its CRLF. No field may contain a line break."""
    return "".join([f"{name}: {value}\r\n" for name, value in fields])


def raw_lines(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Raw header fields as lines, each with its CRLF. A field that contains a line break is dropped.

    aiohttp parses upstream responses leniently, so a field may contain a line break. Such a field must
    not split a message that the proxy sends.
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
    """The header fields of an upstream's response that go to the client, as lines with their CRLF.

    Fields keep their bytes, order and repetitions. ``without`` names further fields to drop, lower
    case. ``limit`` is in bytes: the first field that does not fit is dropped, and all after it.
    """
    connection = [value.decode("latin-1") for name, value in raw if name.lower() == b"connection"]
    pick, _ = _plan_for(raw, hop_by_hop(connection), _NONE, without)
    lines = raw_lines([*pick(raw)])
    if limit is None or len(lines) <= limit:
        return lines
    return lines[: lines.rfind(b"\n", 0, limit) + 1]
