"""Turns errors into responses, by a wrapper around each handler.

A middleware of aiohttp would also wrap the routes of a host application, and would cost every request
two more coroutines.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import ParamSpec

from asyncproxy.core.errors import ApiError, InternalError
from asyncproxy.web.wire_response import Response, WireResponse, error_response
from asyncproxy.wire.envelope import error_body

__all__ = ["answering_errors"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")


def answering_errors(
    handler: Callable[P, Awaitable[Response]], *, endpoint: str | None = None
) -> Callable[P, Awaitable[Response]]:
    """``handler``, with its errors answered in the one shape of the wire contract, section 8."""

    async def answering(*args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            response = await handler(*args, **kwargs)
            if isinstance(response, WireResponse) and response.is_streamed:
                await response.begin()
            return response
        except ApiError as error:
            return error_response(error, error_body(error, endpoint=endpoint))
        except Exception:
            logger.exception("an error inside the proxy")
            internal = InternalError("An error inside the proxy. Its log says more.")
            return error_response(internal, error_body(internal, endpoint=endpoint), close=True)

    return answering
