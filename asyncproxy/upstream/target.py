"""The URL of an upstream for the path that a client asked for, and the way back. Pure.

A ``base_url`` with a path stands for the client's ``/v1``. All other paths go to its host as they are.
"""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from asyncproxy.wire.credentials import masked_path

__all__ = ["RawHeaders", "Target", "loggable"]

# Header fields as they stood on the wire: order, spelling and repetitions kept.
RawHeaders = tuple[tuple[bytes, bytes], ...]

_LOCATIONS = (b"location", b"content-location")
_PORTS = {"http": 80, "https": 443}


class Target:
    """Where the requests for one upstream go. ``host`` is the operator's ``Host`` field, if any."""

    def __init__(self, base_url: str, host: str | None = None) -> None:
        parts = urlsplit(base_url)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self._base = parts.path.rstrip("/")
        self._own = _spellings(parts.scheme, parts.netloc)
        if host is not None:  # A gateway builds its URLs from the Host field.
            self._own += _spellings(parts.scheme, host) + _spellings("http", host)

    def path(self, raw_path: str) -> str:
        """The path and query at the upstream for those of a client, otherwise as they were sent."""
        path = raw_path
        if self._base and path.startswith("/v1") and path[3:4] in ("", "/", "?"):
            path = self._base + path[3:]
        if not path.isascii():
            path = quote(path.encode("utf-8", "surrogateescape"), safe=_ASCII)
        return path

    def with_our_locations(self, headers: RawHeaders) -> RawHeaders:
        """``headers``, but each ``Location`` at the upstream's own origin is a path of ours."""
        return tuple(
            (name, self._ours(value)) if name.lower() in _LOCATIONS else (name, value)
            for name, value in headers
        )

    def _ours(self, location: bytes) -> bytes:
        """A URL at the upstream's own origin as a path of ours. All else as it is."""
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
    """An origin as a URL may begin with it, lower case: with the scheme's own port, and without."""
    netloc = netloc.rpartition("@")[2].lower()
    port = f":{_PORTS.get(scheme, '')}"
    names = {netloc, netloc.removesuffix(port)}
    if ":" not in netloc.rpartition("]")[2]:
        names.add(netloc + port)
    return [f"{begin}//{name}".encode() for name in names for begin in (f"{scheme}:", "")]


def loggable(raw_path: str) -> str:
    """A client's path without its query and without keys in it."""
    return masked_path(raw_path.partition("?")[0])
