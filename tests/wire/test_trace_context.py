"""traceparent: what is one, and what a client may not make of it."""

from __future__ import annotations

import pytest

from asyncproxy.wire.trace_context import trace_id, valid

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_good_one() -> None:
    assert valid(GOOD) == GOOD
    assert trace_id(GOOD) == TRACE


def test_one_of_a_later_version_may_be_longer() -> None:
    later = f"01-{TRACE}-{SPAN}-01"
    assert valid(later + "-what-comes") == later
    assert trace_id(later + "-" + "x" * 1000) == TRACE


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "00",
        GOOD.upper(),
        GOOD + "-more",
        GOOD + "0",
        GOOD + "\n",
        " " + GOOD,
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00_{TRACE}_{SPAN}_01",
    ],
)
def test_what_is_none_is_nothing(bad: str | None) -> None:
    assert valid(bad) == trace_id(bad) == ""
