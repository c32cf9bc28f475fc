"""Is another attempt worth it, and when? Pure: the clock and the random source are passed in."""

from __future__ import annotations

import random
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from asyncproxy.core.errors import CallError, UpstreamTimeout, UpstreamUnreachable

__all__ = ["RATE_LIMITED", "RETRYABLE", "backoff", "is_retryable", "retry_after"]

# Statuses after which the same call may succeed; all others are final.
RETRYABLE: Final = frozenset({408, 429, 500, 502, 503, 504})

# Of these, the ones that say "you are too fast" and so speak of the other jobs of the lane too.
RATE_LIMITED: Final = frozenset({429, 503})


def is_retryable(outcome: int | CallError) -> bool:
    """Whether a call that ended so (a status of the upstream, or our own error) may be repeated."""
    if isinstance(outcome, CallError):
        return isinstance(outcome, UpstreamUnreachable | UpstreamTimeout)
    return outcome in RETRYABLE


def backoff(attempt: int, *, base_s: float, max_s: float, rng: random.Random) -> float:
    """Seconds to wait after ``attempt`` (from 1) failed: exponential, with full jitter.

    Full jitter spreads the retries of jobs that failed together over the whole interval (Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """
    ceiling = min(max_s, base_s * 2.0 ** min(attempt - 1, 32))
    return rng.uniform(0, ceiling)


def retry_after(value: str | None, *, now: float) -> float | None:
    """Seconds from now that a ``Retry-After`` field asks for (RFC 9110, section 10.2.3).

    ``now`` is in seconds since the epoch. None if the field is missing or rubbish.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value) if len(value.lstrip("0")) < 10 else 1e9
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - now)
