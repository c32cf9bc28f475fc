"""The target of a request line, as one path for every part of the proxy. Pure.

A target has four forms (RFC 9112, section 3.2). A firewall or nginx in front of the proxy judges a path
after resolving its dot segments (RFC 3986, section 5.2.4), and so does a gateway. Both have to see the
same path.
"""

from __future__ import annotations

import re
from typing import Final

from asyncproxy.core.errors import InvalidRequest, MethodNotAllowed

__all__ = ["METHODS", "forwarded_prefix", "resolved"]

# The ``Allow`` field for a refused TRACE or CONNECT. TRACE would echo the fields that the proxy adds.
# CONNECT is for a forward proxy.
METHODS: Final = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")

# A segment of dots. A gateway may decode `%2e`, `%2f` and `%5c` before it resolves segments.
_DOT_SEGMENT: Final = re.compile(r"(?:/|\\|%2f|%5c)(?:\.|%2e){1,2}(?=/|\\|%2f|%5c|\Z)", re.IGNORECASE)

_DOTS: Final = {".": 1, "%2e": 1, "..": 2, ".%2e": 2, "%2e.": 2, "%2e%2e": 2}

# The segments of a path, without any character that a browser could read as more than a path.
_PREFIX: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~-]+)+")
_LONGEST_PREFIX: Final = 256


def resolved(method: str, target: str) -> str:
    """The path and query of a request with dot segments resolved, otherwise unchanged.

    Raises :class:`MethodNotAllowed` for ``CONNECT``, and :class:`InvalidRequest` for a target that has
    no path or that leaves the root.
    """
    if method == "CONNECT":
        error = MethodNotAllowed("CONNECT does not go through this proxy.", allow=METHODS)
        error.close = True  # the client speaks another protocol next
        raise error
    if not target.startswith("/"):
        if target == "*":
            raise InvalidRequest(f"{method} * has no answer here. Ask for a path.")
        origin = _ORIGIN.match(target)
        if origin is None:
            raise InvalidRequest("The target of the request is not a path, as /v1/models is.")
        target = target[origin.end() :]
        if not target.startswith("/"):
            target = "/" + target
    path, mark, query = target.partition("?")
    if "." not in path and "%2" not in path:
        return target
    if _DOT_SEGMENT.search(path) is None:
        return target
    path = _without_dots(path)
    if _DOT_SEGMENT.search(path) is not None:
        raise InvalidRequest("The path has dots between encoded slashes. Write it without.")
    return path + mark + query


def _without_dots(path: str) -> str:
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        dots = _DOTS.get(segment.lower(), 0)
        if dots == 0:
            kept.append(segment)
        elif dots == 2:
            if not kept:
                raise InvalidRequest("The path leaves the root by its dots.")
            kept.pop()
    if segments[-1].lower() in _DOTS:
        kept.append("")  # `/a/..` is a folder, as `/` is
    return "/" + "/".join(kept)


def forwarded_prefix(given: str | None) -> str:
    """The prefix that an earlier proxy has stripped: ``X-Forwarded-Prefix``. Empty if none is valid."""
    if not given or len(given) > _LONGEST_PREFIX:
        return ""
    prefix = given.rstrip("/") if given.endswith("/") else given
    return prefix if _PREFIX.fullmatch(prefix) else ""
