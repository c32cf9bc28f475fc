"""Translates a client's path to the URL at an upstream, and a ``Location`` back. Pure.

The path of ``base_url``, if it has one, replaces the client's ``/v1``. All other paths stay.
"""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from asyncproxy.wire.credentials import masked_path

__all__ = ["RawHeaders", "Target", "loggable"]

# Header fields with the order, spelling and repetitions that they had on the wire.
RawHeaders = tuple[tuple[bytes, bytes], ...]

_LOCATIONS = (b"location", b"content-location")
_PORTS = {"http": 80, "https": 443}


class Target:
    """The origin and the base path of one upstream. ``host`` is the operator's ``Host`` field."""

    def __init__(self, base_url: str, host: str | None = None) -> None:
        parts = urlsplit(base_url)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self._base = parts.path.rstrip("/")
        self._own = _spellings(parts.scheme, parts.netloc)
        if host is not None:  # A gateway builds its URLs from the Host field.
            self._own += _spellings(parts.scheme, host) + _spellings("http", host)

    def path(self, raw_path: str) -> str:
        """The path and query at the upstream, given those of the client's request."""
        path = raw_path
        if self._base and path.startswith("/v1") and path[3:4] in ("", "/", "?"):
            path = self._base + path[3:]
        if not path.isascii():
            path = quote(path.encode("utf-8", "surrogateescape"), safe=_ASCII)
        return path

    def with_our_locations(self, headers: RawHeaders) -> RawHeaders:
        """``headers`` with each ``Location`` at the upstream's own origin turned into a path here."""
        return tuple(
            (name, self._ours(value)) if name.lower() in _LOCATIONS else (name, value)
            for name, value in headers
        )

    def _ours(self, location: bytes) -> bytes:
        """The path at the proxy for a URL at the upstream's own origin. Any other URL stays."""
        lowered = location.lower()
        for origin in self._own:
            if not lowered.startswith(origin) or location[len(origin) :][:1] not in _AFTER_ORIGIN:
                continue
            path = location[len(origin) :]
            base = self._base.encode()
            if base and path.startswith(base) and path[len(base) :][:1] in _AFTER_ORIGIN:
                path = b"/v1" + path[len(base) :]
            if path[:1] != b"/":
                path = b"/" + path
            # Two slashes would begin the name of another host (RFC 3986, section 4.2).
            return b"/." + path if path[1:2] in (b"/", b"\\") else path
        return location


_ASCII = "".join(map(chr, range(0x21, 0x7F)))
_AFTER_ORIGIN = (b"", b"/", b"?", b"#")


def _spellings(scheme: str, netloc: str) -> list[bytes]:
    """The beginnings of URLs at an origin, lower case: with and without scheme and default port."""
    netloc = netloc.rpartition("@")[2].lower()
    port = f":{_PORTS.get(scheme, '')}"
    names = {netloc, netloc.removesuffix(port)}
    if ":" not in netloc.rpartition("]")[2]:
        names.add(netloc + port)
    return [f"{begin}//{name}".encode() for name in names for begin in (f"{scheme}:", "")]


def loggable(raw_path: str) -> str:
    """A client's path without its query and without keys in it."""
    return masked_path(raw_path.partition("?")[0])
