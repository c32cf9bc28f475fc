"""Which upstream gets a request, and under which URL. Pure.

The operator's contract: the first upstream whose patterns match the model; a ``base_url`` with a
path stands for the client's ``/v1``; paths outside ``/v1`` go to the host of the first upstream.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import quote, urlsplit

from asyncproxy.errors import ModelNotFound

__all__ = ["ModelRoutes", "Target", "loggable"]


class ModelRoutes:
    """Shell-style patterns per upstream, in the order of the configuration."""

    def __init__(self, patterns: Sequence[tuple[str, Sequence[str]]]) -> None:
        self.replace(patterns)

    def replace(self, patterns: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Go by other patterns from now on."""
        if not patterns:
            raise ValueError("at least one upstream is needed")
        self._routes = [
            (name, re.compile("|".join(fnmatch.translate(p) for p in globs)))
            for name, globs in patterns
        ]
        self.first = patterns[0][0]
        self.needs_model = "*" not in patterns[0][1]
        # Clients name the same few models again and again, and any of them may name a million.
        self._find = lru_cache(maxsize=1024)(self._search)

    def upstream_for(self, model: str) -> str:
        """The name of the first upstream that takes ``model``. Raises :class:`ModelNotFound`."""
        if not self.needs_model:
            return self.first
        name = self._find(model) if len(model) <= 256 else self._search(model)
        if name is None:
            raise ModelNotFound(
                f"No upstream serves the model {model[:256]!r}. "
                "Use a model that `upstreams[].models` of the proxy names.",
                param="model",
            )
        return name

    def _search(self, model: str) -> str | None:
        return next((name for name, globs in self._routes if globs.match(model)), None)


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
    """A client's path without its query, where a key may stand."""
    return raw_path.partition("?")[0]
