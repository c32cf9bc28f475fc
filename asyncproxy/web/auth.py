"""Checks the key of a request, and selects the header fields that go upstream."""

from __future__ import annotations

from aiohttp import web
from aiohttp.hdrs import CONNECTION, HOST

from asyncproxy.core.errors import InvalidApiKey
from asyncproxy.wire import credentials, headers
from asyncproxy.wire.credentials import KeyRing

__all__ = ["authenticate", "is_preflight", "upstream_headers"]


def authenticate(request: web.BaseRequest, keys: KeyRing) -> tuple[str, str] | None:
    """The name of the header that holds the credential, and the credential. None: there is none.

    Raises :class:`InvalidApiKey` if ``keys`` are set and the credential is not one of them. A preflight
    needs no credential: a browser never sends one with it.
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
    """Whether the request is a CORS preflight of a browser (the Fetch standard, 3.3.2)."""
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
    """The header fields of a request that go upstream, without its ``Content-Length``.

    ``credential_header`` holds the client's credential. If ``keys`` are set, the credential is for the
    proxy, and the header is dropped. ``without`` names further fields to drop, lower case. A
    ``request_id`` of None is not added.
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
