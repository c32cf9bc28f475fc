"""The pace of a lane: what a refusal takes from it, and what a call that gets through gives back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncproxy.core.jobs import Lane
from asyncproxy.dispatch.rate_limits import Flight, RateLimits

LANE = Lane("gateway", b"a", "m")
OTHER = Lane("gateway", b"b", "m")


def make(ceiling: int = 64) -> RateLimits:
    return RateLimits(ceiling=ceiling, base_s=0.5, max_s=30.0)


def begin(limits: RateLimits, count: int, lane: Lane = LANE) -> list[Flight]:
    return [limits.began(lane) for _ in range(count)]


def refuse(limits: RateLimits, flight: Flight) -> float:
    gap_s = limits.refused(flight)
    limits.ended(flight, 0.0)
    return gap_s


def pass_through(limits: RateLimits, flight: Flight) -> float:
    gap_s = limits.got_through(flight)
    limits.ended(flight, 0.0)
    return gap_s


def test_a_lane_without_refusals_has_no_limit_and_leaves_nothing() -> None:
    limits = make()
    flights = begin(limits, 100)
    assert limits.room(flights[0]) is None
    for flight in flights:
        assert pass_through(limits, flight) == 0
    assert len(limits) == 0


def test_a_refusal_halves_the_calls_in_flight_once_per_round_trip() -> None:
    limits = make()
    flights = begin(limits, 64)
    assert [refuse(limits, flight) for flight in flights] == [0.0] * 64
    assert flights[0].pace.limit == 32
    again = begin(limits, 32)
    for flight in again:
        refuse(limits, flight)
    assert again[0].pace.limit == 16


def test_calls_that_began_before_the_cut_say_nothing_new() -> None:
    limits = make()
    first, *old = begin(limits, 8)
    refuse(limits, first)
    assert first.pace.limit == 4
    (new,) = begin(limits, 1)
    for flight in old:
        refuse(limits, flight)
    assert new.pace.limit == 4
    refuse(limits, new)
    assert new.pace.limit == 1


def test_a_full_round_that_went_well_allows_one_more() -> None:
    limits = make()
    for flight in begin(limits, 8):
        refuse(limits, flight)
    for limit in (4, 5, 6):
        flights = begin(limits, limit)
        assert limits.room(flights[0]) == 0
        for flight in flights:
            assert flight.pace.limit == limit
            pass_through(limits, flight)
    assert flights[0].pace.limit == 7


def test_the_limit_goes_when_it_reaches_the_ceiling() -> None:
    limits = make(ceiling=3)
    for flight in begin(limits, 3):
        refuse(limits, flight)
    assert len(limits) == 1
    while len(limits):
        (flight,) = begin(limits, 1)
        pass_through(limits, flight)
        assert (flight.pace.limit or 3) <= 3


def test_with_one_call_in_flight_the_gap_doubles_up_to_the_longest_wait() -> None:
    limits = make()
    gaps = [refuse(limits, limits.began(LANE)) for _ in range(9)]
    assert gaps == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_call_that_gets_through_shortens_the_gap_until_there_is_none() -> None:
    limits = make()
    refuse(limits, limits.began(LANE))
    gaps: list[float] = []
    while not gaps or gaps[-1]:
        gaps.append(pass_through(limits, limits.began(LANE)))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == 0.45
    assert len(gaps) > 20


def test_of_a_rate_that_is_found_no_more_than_one_call_in_four_is_refused() -> None:
    """An upstream that takes a call each two seconds, and says nothing about it."""
    limits, now, free_at = make(), 0.0, 0.0
    refused = passed = 0
    while passed < 200:
        flight = limits.began(LANE)
        if now >= free_at:
            free_at = max(free_at, now - 2.0) + 2.0
            gap_s = pass_through(limits, flight)
            passed += 1
        else:
            gap_s = refuse(limits, flight)
            refused += passed > 20
        now += gap_s or 0.01
    assert refused < passed / 4


def test_lanes_do_not_speak_for_each_other() -> None:
    limits = make()
    refuse(limits, limits.began(LANE))
    other = limits.began(OTHER)
    assert limits.room(other) is None
    assert limits.limited == 1


def test_a_quiet_lane_is_forgotten_after_two_of_the_longest_waits() -> None:
    limits = make()
    flight = limits.began(LANE)
    limits.refused(flight)
    limits.ended(flight, 100.0)
    assert limits.tidy(159.0) == []
    assert limits.tidy(160.0) == [LANE]
    assert len(limits) == 0


def test_a_lane_with_a_call_in_flight_is_not_forgotten() -> None:
    limits = make()
    flight = limits.began(LANE)
    limits.refused(flight)
    assert limits.tidy(1e9) == []
    limits.ended(flight, 0.0)
    assert limits.tidy(1e9) == [LANE]


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["begin", "pass", "refuse", "fail"]))
    ),
    ceiling=st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_limit_stays_within_its_bounds_and_nothing_is_left(
    steps: list[tuple[str, str]], ceiling: int
) -> None:
    limits = make(ceiling)
    lanes = {"a": LANE, "b": OTHER}
    flights: dict[str, list[Flight]] = {"a": [], "b": []}
    for name, step in steps:
        if step == "begin":
            flights[name].append(limits.began(lanes[name]))
        elif flights[name]:
            flight = flights[name].pop(0)
            gap_s = 0.0
            if step == "pass":
                gap_s = limits.got_through(flight)
            elif step == "refuse":
                gap_s = limits.refused(flight)
            assert 0 <= gap_s <= 30
            assert flight.pace.limit is None or flight.pace.limit >= 1
            room = limits.room(flight)
            assert room is None or room >= 0
            limits.ended(flight, 0.0)
    for flight in [*flights["a"], *flights["b"]]:
        limits.ended(flight, 0.0)
    limits.tidy(60.0)
    assert len(limits) == 0
