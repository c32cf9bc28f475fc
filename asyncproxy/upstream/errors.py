"""Translates aiohttp's client errors into the proxy's own. No other module knows both.

A message names the upstream, never its address. ``detail`` is for the log and may name the address.
"""

from __future__ import annotations

import aiohttp

from asyncproxy.core.errors import CallError, UpstreamTimeout, UpstreamUnreachable
from asyncproxy.wire.credentials import without_quotes

__all__ = ["NotHttpError", "translate"]


class NotHttpError(aiohttp.ClientError):
    """A response that breaks a rule of HTTP/1.1 or of the exchange. The first line names the rule."""


def translate(error: Exception, upstream: str, *, delivered: bool) -> CallError:
    """The proxy's own error for ``error``. Raise it ``from`` the original.

    ``delivered``: whether any of the request may have reached the upstream.
    """
    ours = _translated(error, upstream)
    ours.detail = _describe(error)
    if isinstance(ours, UpstreamUnreachable):
        ours.delivered = delivered
    return ours


def _describe(error: Exception) -> str:
    """The type and the first line of an error, for the log. The rest may quote the upstream's bytes."""
    if isinstance(error, NotHttpError):
        first_line = without_quotes(str(error))
    else:
        first_line = str(error).partition("\n")[0].strip(" :")[:200]
    if isinstance(error, aiohttp.ServerDisconnectedError):
        first_line = ""  # the text of this error may be the beginning of the response
    return f"{type(error).__name__}: {first_line}".removesuffix(": ")


def _translated(error: Exception, upstream: str) -> CallError:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamUnreachable(f"The upstream {upstream!r} did not take the connection in time.")
    if isinstance(error, TimeoutError):
        return UpstreamTimeout(f"The upstream {upstream!r} did not answer in time.")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return UpstreamUnreachable(f"The upstream {upstream!r} has no certificate that we trust.")
    if isinstance(error, aiohttp.ClientSSLError):
        return UpstreamUnreachable(f"The TLS handshake with the upstream {upstream!r} failed.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamUnreachable(f"The upstream {upstream!r} cannot be reached.")
    if isinstance(error, aiohttp.ClientPayloadError):
        return UpstreamUnreachable(f"The answer of the upstream {upstream!r} broke off.")
    if isinstance(error, NotHttpError):
        return UpstreamUnreachable(f"The upstream {upstream!r} answered with something not HTTP.")
    return UpstreamUnreachable(f"The upstream {upstream!r} closed the connection without an answer.")
