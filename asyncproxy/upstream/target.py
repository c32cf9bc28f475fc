"""The URL of an upstream for the path that a client asked for. Pure.

A ``base_url`` with a path stands for the client's ``/v1``. All other paths go to its host as they are.
"""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from asyncproxy.wire.credentials import masked_path

__all__ = ["Target", "loggable"]


class Target:
    """Where the requests for one upstream go."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self._base = parts.path.rstrip("/")

    def url(self, raw_path: str) -> str:
        """The absolute URL for a client's path and query, which are kept as they were sent."""
        return self.origin + self.path(raw_path)

    def path(self, raw_path: str) -> str:
        """The path and query of :meth:`url`."""
        path = raw_path
        if self._base and path.startswith("/v1") and path[3:4] in ("", "/", "?"):
            path = self._base + path[3:]
        if not path.isascii():
            path = quote(path.encode("utf-8", "surrogateescape"), safe=_ASCII)
        return path


_ASCII = "".join(map(chr, range(0x21, 0x7F)))


def loggable(raw_path: str) -> str:
    """A client's path without its query and without keys in it."""
    return masked_path(raw_path.partition("?")[0])
