"""Selects the upstream of a model: the first one whose patterns match. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from functools import lru_cache

from asyncproxy.core.errors import ModelNotFound

__all__ = ["ModelRoutes"]


class ModelRoutes:
    """Shell-style patterns per upstream, in the order of the configuration."""

    def __init__(self, patterns: Sequence[tuple[str, Sequence[str]]]) -> None:
        self.replace(patterns)

    def replace(self, patterns: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Use other patterns from now on."""
        if not patterns:
            raise ValueError("at least one upstream is needed")
        self._routes = [
            (name, re.compile("|".join(fnmatch.translate(p) for p in globs)))
            for name, globs in patterns
        ]
        self.first = patterns[0][0]
        self.needs_model = "*" not in patterns[0][1]
        # Most requests name the same few models. The cache is bounded: a client may name a million.
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
