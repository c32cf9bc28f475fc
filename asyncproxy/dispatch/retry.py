"""How a call has ended, and how long to wait before the next one. Pure.

The clock and the random source are passed in.
"""

from __future__ import annotations

import enum
import random
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

from asyncproxy.core.errors import CallError, UpstreamTimeout, UpstreamUnreachable
from asyncproxy.core.jobs import UpstreamResponse

__all__ = ["Ending", "asked_wait", "backoff", "ending_of", "retry_after"]

# Statuses after which the same call may succeed, beside the 5xx. 520 to 529 are those of CDNs.
_WORTH_ANOTHER: Final = frozenset({408, 409})
_PERMANENT: Final = frozenset({501, 505})
_RATE_LIMITED: Final = 429
_UNAVAILABLE: Final = 503
# A gateway in front says so of the gateway behind it: away, or broken by this very request.
_BAD_GATEWAY: Final = frozenset({502, 504})

# Codes of a 429 that no waiting cures: the quota is used up. OpenAI and those that copy its errors.
_QUOTA_CODES: Final = frozenset(
    {
        "access_terminated",
        "billing_hard_limit_reached",
        "billing_not_active",
        "budget_exceeded",
        "insufficient_balance",
        "insufficient_credits",
        "insufficient_quota",
        "quota_exceeded",
    }
)

_LONGEST_ASKED_S: Final = 1e9


class Ending(enum.Enum):
    """How a call has ended, by what that means for its job."""

    SUCCEEDED = enum.auto()
    """A 2xx."""
    REFUSED = enum.auto()
    """The status or error is final: the same call would end in the same way."""
    FAILED = enum.auto()
    """The call may have failed by chance: another attempt is worth it."""
    AWAY = enum.auto()
    """The upstream took no call: nothing is said about the request."""
    AWAY_OR_FAILED = enum.auto()
    """A 502 or 504: the upstream is away if nothing else gets through, or else the call has failed."""
    RATE_LIMITED = enum.auto()
    """The upstream is asked too often: nothing is said about the request."""


def ending_of(outcome: UpstreamResponse | CallError) -> Ending:
    """How a call has ended (the operator's contract, "Worth another attempt")."""
    if isinstance(outcome, CallError):
        if isinstance(outcome, UpstreamUnreachable):
            return Ending.FAILED if outcome.delivered else Ending.AWAY
        return Ending.FAILED if isinstance(outcome, UpstreamTimeout) else Ending.REFUSED
    status = outcome.status
    if 200 <= status < 300:
        return Ending.SUCCEEDED
    should_retry = (outcome.header(b"x-should-retry") or "").strip().lower()
    if should_retry == "false":
        return Ending.REFUSED
    if status == _RATE_LIMITED:
        return Ending.REFUSED if _is_quota(outcome) else Ending.RATE_LIMITED
    if status == _UNAVAILABLE:
        return Ending.AWAY
    if status in _BAD_GATEWAY:
        return Ending.AWAY_OR_FAILED
    if status in _WORTH_ANOTHER or (500 <= status < 600 and status not in _PERMANENT):
        return Ending.FAILED
    return Ending.FAILED if should_retry == "true" else Ending.REFUSED


class _Coded(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None


class _CodedBody(msgspec.Struct):
    error: _Coded


_CODED: Final = msgspec.json.Decoder(_CodedBody)


def _is_quota(response: UpstreamResponse) -> bool:
    try:
        error = _CODED.decode(response.body).error
    except msgspec.MsgspecError:
        return False
    return error.code in _QUOTA_CODES or error.type in _QUOTA_CODES


def backoff(attempt: int, *, base_s: float, max_s: float, rng: random.Random) -> float:
    """Seconds to wait after ``attempt`` (from 1) failed: exponential, with full jitter.

    Full jitter spreads the retries of jobs that failed together over the whole interval (Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """
    ceiling = min(max_s, base_s * 2.0 ** min(attempt - 1, 32))
    return rng.uniform(0, ceiling)


def asked_wait(outcome: UpstreamResponse | CallError, *, now: float) -> float | None:
    """Seconds that the upstream asks to wait: ``retry-after-ms`` or ``Retry-After``. None: it does not.

    ``now`` is in seconds since the epoch.
    """
    if not isinstance(outcome, UpstreamResponse):
        return None
    milliseconds = _number(outcome.header(b"retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    return retry_after(outcome.header(b"retry-after"), now=now)


def retry_after(value: str | None, *, now: float) -> float | None:
    """Seconds from now that a ``Retry-After`` field asks for (RFC 9110, section 10.2.3).

    Fractions of a second are taken too: some gateways send them. ``now`` is in seconds since the epoch.
    None if the field is missing or rubbish.
    """
    if value is None:
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(value.strip())
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - now)


def _number(value: str | None) -> float | None:
    """A number without sign or exponent. None: the text is none."""
    whole, dot, fraction = (value or "").strip().partition(".")
    if not (whole + fraction).isdecimal() or not (whole + fraction).isascii() or (dot and not fraction):
        return None
    return min(float(f"{whole[:40] or 0}.{fraction[:40] or 0}"), _LONGEST_ASKED_S)
