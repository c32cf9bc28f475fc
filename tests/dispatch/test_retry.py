"""Is another attempt worth it, and when?"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncproxy.core import errors
from asyncproxy.dispatch import retry

NOW = 1_700_000_000.0


def test_the_statuses_that_are_tried_again() -> None:
    retried = {status for status in range(100, 1000) if retry.is_retryable(status)}
    assert retried == {408, 429, 500, 502, 503, 504}


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (errors.UpstreamUnreachable("x"), True),
        (errors.UpstreamTimeout("x"), True),
        (errors.InvalidUpstreamResponse("x"), False),
        (errors.ResultTooLarge("x"), False),
        (errors.DeadlineExceeded("x"), False),
        (errors.Interrupted("x"), False),
    ],
)
def test_our_own_errors(error: errors.CallError, again: bool) -> None:  # noqa: FBT001
    assert retry.is_retryable(error) is again


@given(
    attempt=st.integers(1, 10_000),
    base_s=st.floats(0, 100),
    max_s=st.floats(0, 100),
    seed=st.integers(0, 99),
)
def test_a_wait_stays_below_its_doubling_bound(
    attempt: int, base_s: float, max_s: float, seed: int
) -> None:
    wait = retry.backoff(attempt, base_s=base_s, max_s=max_s, rng=random.Random(seed))
    assert 0 <= wait <= max_s
    if attempt < 30:
        assert wait <= base_s * 2 ** (attempt - 1)


def test_the_jitter_is_full() -> None:
    rng = random.Random(1)
    waits = [retry.backoff(3, base_s=1, max_s=30, rng=rng) for _ in range(1000)]
    assert min(waits) < 0.1
    assert max(waits) > 3.9


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("1.5", None),
        ("-1", None),
        ("soon", None),
        ("\u0663", None),
        ("9" * 400, 1e9),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 22:12:00 GMT", 0.0),
        ("Tue, 14 Nov 2023 22:13:50", 30.0),
        ("Tue, 99 Nov 2023 22:13:50 GMT", None),
        ("1 Jan 99999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 0001 00:00:00 +2300", 0.0),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry.retry_after(value, now=NOW) == seconds


@given(st.text(max_size=40))
def test_rubbish_in_retry_after_never_raises(value: str) -> None:
    found = retry.retry_after(value, now=NOW)
    assert found is None or found >= 0
