"""Is another attempt worth it, and when?"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncproxy.core import errors
from asyncproxy.core.jobs import UpstreamResponse
from asyncproxy.dispatch import retry
from asyncproxy.dispatch.retry import Ending

NOW = 1_700_000_000.0


def response(status: int, body: bytes = b"", **headers: Any) -> UpstreamResponse:
    raw = tuple((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())
    return UpstreamResponse(status, raw, (body,) if body else ())


def statuses(ending: Ending) -> set[int]:
    return {status for status in range(100, 1000) if retry.ending_of(response(status)) is ending}


def test_each_status_means_one_thing() -> None:
    assert statuses(Ending.SUCCEEDED) == set(range(200, 300))
    assert statuses(Ending.RATE_LIMITED) == {429}
    assert statuses(Ending.AWAY) == {503}
    assert statuses(Ending.AWAY_OR_FAILED) == {502, 504}
    assert statuses(Ending.FAILED) == {408, 409, *range(500, 600)} - {501, 502, 503, 504, 505}


@pytest.mark.parametrize("status", [400, 404, 408, 429, 500, 502, 503])
def test_the_upstream_has_the_last_word(status: int) -> None:
    assert retry.ending_of(response(status, x_should_retry="false")) is Ending.REFUSED
    kept = retry.ending_of(response(status, x_should_retry="true"))
    without = retry.ending_of(response(status))
    assert kept is (Ending.FAILED if without is Ending.REFUSED else without)


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        (b'{"error":{"code":"insufficient_quota","message":"x"}}', Ending.REFUSED),
        (b'{"error":{"type":"insufficient_quota","code":null}}', Ending.REFUSED),
        (b'{"error":{"code":"billing_hard_limit_reached"}}', Ending.REFUSED),
        (b'{"error":{"code":"rate_limit_exceeded"}}', Ending.RATE_LIMITED),
        (b'{"error":{"code":429,"message":"insufficient_quota"}}', Ending.RATE_LIMITED),
        (b'{"error":"insufficient_quota"}', Ending.RATE_LIMITED),
        (b"[" * 100_000, Ending.RATE_LIMITED),
        (b"", Ending.RATE_LIMITED),
    ],
)
def test_no_waiting_cures_a_quota_that_is_used_up(body: bytes, ending: Ending) -> None:
    assert retry.ending_of(response(429, body)) is ending


def unreachable(*, delivered: bool) -> errors.UpstreamUnreachable:
    error = errors.UpstreamUnreachable("x")
    error.delivered = delivered
    return error


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (unreachable(delivered=False), Ending.AWAY),
        (unreachable(delivered=True), Ending.FAILED),
        (errors.UpstreamTimeout("x"), Ending.FAILED),
        (errors.InvalidUpstreamResponse("x"), Ending.REFUSED),
        (errors.ResultTooLarge("x"), Ending.REFUSED),
        (errors.DeadlineExceeded("x"), Ending.REFUSED),
        (errors.Interrupted("x"), Ending.REFUSED),
    ],
)
def test_our_own_errors(error: errors.CallError, ending: Ending) -> None:
    assert retry.ending_of(error) is ending


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "3"}, 3.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"Retry-After-Ms": "1500.5", "Retry-After": "9"}, 1.5005),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9.0),
    ],
)
def test_the_wait_that_an_upstream_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    raw = tuple((name.encode(), value.encode()) for name, value in headers.items())
    assert retry.asked_wait(UpstreamResponse(429, raw, ()), now=NOW) == seconds


def test_an_error_of_ours_asks_for_no_wait() -> None:
    assert retry.asked_wait(errors.UpstreamTimeout("x"), now=NOW) is None


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
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.", None),
        (".", None),
        ("1e3", None),
        ("inf", None),
        ("9" * 5000, 1e9),
        ("0." + "3" * 5000, 1 / 3),
        ("-1", None),
        ("soon", None),
        ("\u0663", None),
        ("9" * 400, 1e9),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 22:12:00 GMT", 0.0),
        ("Tue, 14 Nov 2023 22:13:50", 30.0),
        ("Tue, 14 Nov 2023 22:13:50 -0000", 30.0),
        ("Wed, 15 Nov 2023 00:13:50 +0200", 30.0),
        ("Tue, 14 Nov 2023 17:13:50 -0500", 30.0),
        ("Tue, 99 Nov 2023 22:13:50 GMT", None),
        ("1 Jan 99999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 0001 00:00:00 +2300", 0.0),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry.retry_after(value, now=NOW) == (None if seconds is None else pytest.approx(seconds))


@given(st.text(max_size=40))
def test_rubbish_in_retry_after_never_raises(value: str) -> None:
    found = retry.retry_after(value, now=NOW)
    assert found is None or found >= 0
