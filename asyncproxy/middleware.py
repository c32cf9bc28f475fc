"""What surrounds each of our handlers: who may come in, and what an error looks like.

It wraps our own handlers, and not the application: a middleware of aiohttp would wrap the routes of a
host application too, and costs every request two more coroutines.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import ParamSpec

from aiohttp import web
from aiohttp.hdrs import CONNECTION, HOST

from asyncproxy import credentials, headers
from asyncproxy.credentials import KeyRing
from asyncproxy.envelope import error_body
from asyncproxy.errors import ApiError, InternalError, InvalidApiKey
from asyncproxy.responses import error_response

__all__ = ["Handler", "answering_errors", "authenticate", "upstream_headers"]

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

P = ParamSpec("P")


def authenticate(request: web.BaseRequest, keys: KeyRing) -> tuple[str, str] | None:
    """The header that counts and the credential in it, or None if the client has none.

    Raises :class:`InvalidApiKey` if ``keys`` are set and the credential is not one of them.
    """
    found = credentials.find(request.headers)
    if keys and (found is None or found[1] not in keys):
        raise InvalidApiKey(
            "This key is not valid. Send one that the operator of this proxy gave you."
            if found
            else "A key is required. Send it as `Authorization: Bearer <key>`."
        )
    return found


def upstream_headers(
    request: web.BaseRequest,
    keys: KeyRing,
    credential_header: str | None,
    *,
    request_id: str | None,
    without: frozenset[str] = frozenset(),
) -> list[tuple[str, str]]:
    """The header fields that a request goes upstream with, but for its ``Content-Length``.

    ``credential_header`` is the one that let the client in: if our own ``keys`` did, it was for us.
    ``without`` names further ones that stay behind, lower case. No ``request_id``: none is added.
    """
    given = request.headers
    if keys and credential_header is not None:
        without = without | {credential_header.lower()}
    return headers.request_headers(
        tuple(given.items()),
        connection=given.getall(CONNECTION, ()),
        peer=request.remote,
        scheme=request.scheme,
        host=given.get(HOST, ""),
        request_id=request_id,
        without=without,
    )


def answering_errors(
    handler: Callable[P, Awaitable[web.StreamResponse]], *, endpoint: str | None = None
) -> Callable[P, Awaitable[web.StreamResponse]]:
    """``handler``, with its errors answered in the one shape of the wire contract, section 8."""

    async def answering(*args: P.args, **kwargs: P.kwargs) -> web.StreamResponse:
        try:
            return await handler(*args, **kwargs)
        except ApiError as error:
            return error_response(error, error_body(error, endpoint=endpoint))
        except Exception:
            logger.exception("an error inside the proxy")
            internal = InternalError("An error inside the proxy. Its log says more.")
            return error_response(internal, error_body(internal, endpoint=endpoint), close=True)

    return answering
