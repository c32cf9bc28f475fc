"""Who may come in, and with which header fields a request goes on to an upstream."""

from __future__ import annotations

from aiohttp import web
from aiohttp.hdrs import CONNECTION, HOST

from asyncproxy.core.errors import InvalidApiKey
from asyncproxy.wire import credentials, headers
from asyncproxy.wire.credentials import KeyRing

__all__ = ["authenticate", "is_preflight", "upstream_headers"]


def authenticate(request: web.BaseRequest, keys: KeyRing) -> tuple[str, str] | None:
    """The header that counts and the credential in it, or None if the client has none.

    Raises :class:`InvalidApiKey` if ``keys`` are set and the credential is not one of them. A preflight
    needs none: a browser never sends one with it.
    """
    found = credentials.find(request.headers)
    if keys and (found is None or found[1] not in keys) and not is_preflight(request):
        raise InvalidApiKey(
            "This key is not valid. Send one that the operator of this proxy gave you."
            if found
            else "A key is required. Send it as `Authorization: Bearer <key>`."
        )
    return found


def is_preflight(request: web.BaseRequest) -> bool:
    """Whether a browser asks for leave before a page's request (the Fetch standard, 3.3.2)."""
    return (
        request.method == "OPTIONS"
        and "Origin" in request.headers
        and "Access-Control-Request-Method" in request.headers
        and not request.can_read_body
    )


def upstream_headers(
    request: web.BaseRequest,
    keys: KeyRing,
    credential_header: str | None,
    *,
    request_id: str | None,
    without: frozenset[str] = frozenset(),
) -> list[tuple[bytes, bytes]]:
    """The header fields that a request goes upstream with, but for its ``Content-Length``.

    ``credential_header`` is the one that let the client in: if our own ``keys`` did, it was for us.
    ``without`` names further ones that stay behind, lower case. No ``request_id``: none is added.
    """
    given = request.headers
    if keys and credential_header is not None:
        without = without | {credential_header.lower()}
    return headers.request_headers(
        request.raw_headers,
        connection=given.getall(CONNECTION, ()),
        peer=request.remote,
        scheme=request.scheme,
        host=given.get(HOST, ""),
        request_id=request_id,
        without=without,
    )
