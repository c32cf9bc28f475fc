"""Parses and prints values of the YAML: durations, sizes, addresses, keys. Pure."""

from __future__ import annotations

import difflib
import re
from base64 import b64decode
from decimal import Decimal
from typing import Annotated, Final

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from asyncproxy.core.endpoints import ENDPOINTS

__all__ = [
    "URL_SECRET",
    "Count",
    "Duration",
    "DurationOrNone",
    "Size",
    "encryption_keys_in",
    "known_endpoint",
    "show_duration",
    "split_address",
    "without_secret",
]

_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS: Final = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_NUMBER: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)")
URL_SECRET: Final = re.compile(r"(?<=://)[^/?#@\s]*(?=@)|(?<=\?).*(?=')")  # user:password@, ?query
_URLSAFE: Final = str.maketrans("-_", "+/")


def _duration(value: object) -> object:
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        factor = _DURATION_UNITS.get(match[2] or "s")
        if factor is not None:
            return float(match[1]) * factor
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a duration like 500ms, 5s, 10m, 1h or 7d, or a number of seconds")
    return value


def _size(value: object) -> object:
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        factor = _SIZE_UNITS.get(match[2] or "B")
        if factor is not None:
            return int(Decimal(match[1]) * factor)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a size like 64KiB, 32MiB or 1GiB, or a number of bytes")
    return value


def show_duration(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        if seconds % _DURATION_UNITS[unit] == 0:
            return f"{int(seconds / _DURATION_UNITS[unit])}{unit}"
    exact = Decimal(repr(seconds))
    milliseconds = exact * 1000
    return f"{int(milliseconds)}ms" if milliseconds == int(milliseconds) else f"{exact:f}s"


def _show_size(size: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return str(size)


# Ten years: what is longer is a slip, and overflows a date.
_LONGEST: Final = 3650 * 86400.0
_DURATION_SCHEMA: Final = {
    "anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?(ms|s|m|h|d)?$"}, {"type": "number"}]
}
Duration = Annotated[
    float,
    BeforeValidator(_duration),
    Field(gt=0, le=_LONGEST, allow_inf_nan=False),
    PlainSerializer(show_duration),
    WithJsonSchema(_DURATION_SCHEMA),
]
DurationOrNone = Annotated[
    float,
    BeforeValidator(_duration),
    Field(ge=0, le=_LONGEST, allow_inf_nan=False),
    PlainSerializer(show_duration),
    WithJsonSchema(_DURATION_SCHEMA),
]
Size = Annotated[
    int,
    BeforeValidator(_size),
    Field(gt=0),
    PlainSerializer(_show_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^\d+(\.\d+)?(B|KiB|MiB|GiB|TiB)?$"},
                {"type": "integer"},
            ]
        }
    ),
]
Count = Annotated[int, Field(ge=1)]


def without_secret(url: str) -> str:
    return URL_SECRET.sub("***", url)


def encryption_keys_in(value: str) -> tuple[bytes, ...]:
    keys = []
    for text in value.split(","):
        try:
            key = b64decode(text.strip().translate(_URLSAFE), validate=True)
        except ValueError:
            key = b""
        if len(key) != 32:
            raise ValueError("32 bytes in Base64, as `openssl rand -base64 32` prints them")
        keys.append(key)
    return tuple(keys)


def known_endpoint(name: str) -> str:
    if name not in ENDPOINTS:
        close = difflib.get_close_matches(name, ENDPOINTS, n=1)
        hint = f"`{close[0]}`, perhaps; known are " if close else "one of "
        raise ValueError(hint + ", ".join(ENDPOINTS))
    return name


def split_address(value: object) -> tuple[str | None, int]:
    """The host (None: all interfaces) and the port of ``host:port``. Raises :class:`ValueError`."""
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError("host:port, like 127.0.0.1:8080 or [::1]:8080")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("host:port, with brackets around an IPv6 address")
    return host or None, int(port)
