"""Header fields: which travel, which stay behind, and that none can split a message."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncproxy.core.errors import InvalidRequest
from asyncproxy.wire import headers
from asyncproxy.wire.headers import HOP_BY_HOP, OURS, hop_by_hop, response_lines

STAY_BEHIND = [
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "HTTP2-Settings",
]


def lines(*raw: tuple[bytes, bytes], limit: int | None = None) -> list[bytes]:
    """The lines of an answer, without their CRLF."""
    text = response_lines(raw, limit=limit)
    assert not text or text.endswith(b"\r\n")
    return text.split(b"\r\n")[:-1]


def encoded(items: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in items]


def added(
    *given: tuple[str, str], peer: str | None = "192.0.2.1", host: str = "proxy.example"
) -> list[tuple[str, str]]:
    fields = headers.request_headers(
        encoded(given), connection=[], peer=peer, scheme="https", host=host, request_id="id-1"
    )
    return headers.texts(fields)


def request_headers(
    items: list[tuple[str, str]], *, connection: list[str], without: frozenset[str] = frozenset()
) -> list[tuple[str, str]]:
    """What is left of the fields of a request, without what is added."""
    fields = headers.request_headers(
        encoded(items),
        connection=connection,
        peer=None,
        scheme="https",
        host="",
        request_id="",
        without=without,
    )
    sent = headers.texts(fields)
    assert sent[-2:] == [("X-Forwarded-Proto", "https"), ("X-Request-Id", "")]
    return sent[:-2]


@pytest.mark.parametrize("name", STAY_BEHIND)
def test_hop_by_hop_fields_stay_behind(name: str) -> None:
    for spelled in (name, name.lower(), name.upper()):
        items = [(spelled, "x"), ("Accept", "y")]
        assert request_headers(items, connection=[]) == [("Accept", "y")]
        assert lines((spelled.encode(), b"x"), (b"Server", b"y")) == [b"Server: y"]


def test_fields_that_connection_names_stay_behind() -> None:
    items = [("X-One", "1"), ("x-two", "2"), ("X-Three", "3"), ("X-Four", "4")]
    kept = request_headers(items, connection=["keep-alive, x-one ,, X-TWO", "x-three"])
    assert kept == [("X-Four", "4")]


def test_fields_that_connection_names_stay_behind_in_answers() -> None:
    assert lines(
        (b"Connection", b"close, X-One"),
        (b"x-one", b"1"),
        (b"X-Two", b"2"),
        (b"X-Three", b"3"),
        (b"CONNECTION", b"x-TWO"),
    ) == [b"X-Three: 3"]


@pytest.mark.parametrize(
    "connection", [[], [""], ["close"], ["keep-alive"], ["Keep-Alive, close", ","]]
)
def test_a_usual_connection_names_nothing_more(connection: list[str]) -> None:
    items = [("Accept", "x"), ("Authorization", "Bearer k"), ("Set-Cookie", "a=1")]
    assert request_headers(items, connection=connection) == items
    assert hop_by_hop(connection) - {"close", "keep-alive"} == HOP_BY_HOP - {"keep-alive"}
    assert "x-one" in hop_by_hop([*connection, "X-One"])


def test_content_length_and_host_cannot_be_declared_hop_by_hop() -> None:
    assert hop_by_hop(["Content-Length, HOST, x"]) >= {"x"}
    assert not {"content-length", "host"} & hop_by_hop(["Content-Length, HOST, x"])
    assert lines((b"Connection", b"content-length"), (b"Content-Length", b"5")) == [
        b"Content-Length: 5"
    ]


def test_repeated_fields_stay_repeated_and_in_order() -> None:
    items = [("X-A", "1"), ("X-B", "2"), ("x-a", "3"), ("X-A", "1")]
    assert request_headers(items, connection=[]) == items
    assert lines(
        (b"Set-Cookie", b"a=1"), (b"X", b""), (b"set-cookie", b"b=2"), (b"Set-Cookie", b"a=1")
    ) == [
        b"Set-Cookie: a=1",
        b"X: ",
        b"set-cookie: b=2",
        b"Set-Cookie: a=1",
    ]


@pytest.mark.parametrize(
    "name", ["Host", "Expect", "Content-Length", "host", "EXPECT", "content-length"]
)
def test_what_is_written_anew_for_each_hop_stays_behind_in_requests(name: str) -> None:
    assert request_headers([(name, "x"), ("Accept", "y")], connection=[]) == [("Accept", "y")]


def test_further_fields_stay_behind_when_asked_to() -> None:
    items = [(name, "x") for name in (*OURS, "Prefer", "X-BF-Async-Id", "Idempotency-Key")]
    kept = request_headers(items, connection=[], without=OURS)
    assert kept == [("Idempotency-Key", "x")]
    raw = ((b"Date", b"today"), (b"DATE", b"today"), (b"Age", b"1"))
    assert response_lines(raw, without=frozenset({"date"})) == b"Age: 1\r\n"


def test_the_credential_and_the_trace_travel() -> None:
    items = [("Authorization", "Bearer k"), ("x-bf-vk", "k"), ("traceparent", "00-1"), ("Cookie", "a")]
    assert request_headers(items, connection=["close"], without=OURS) == items


def test_a_request_field_in_utf_8_travels() -> None:
    assert request_headers([("X-Name", "é 😀")], connection=[]) == [("X-Name", "é 😀")]


@pytest.mark.parametrize("raw", [b"\xff", b"caf\xe9", b"\xc3", b"a\xed\xa0\x80"])
def test_a_field_that_is_not_utf_8_cannot_be_text(raw: bytes) -> None:
    value = raw.decode("utf-8", "surrogateescape")
    with pytest.raises(InvalidRequest, match="X-Name") as caught:
        request_headers([("X-Name", value)], connection=[])
    assert caught.value.status == 400
    assert value not in caught.value.message


def test_a_field_that_stays_behind_may_be_anything() -> None:
    assert request_headers([("Keep-Alive", "\udcff")], connection=[]) == []


@pytest.mark.parametrize("head", [["Connection"], [f"X-{n}" for n in range(200)], ["X-" + "x" * 4000]])
def test_what_a_client_can_make_large_is_not_remembered(head: list[str]) -> None:
    before = headers._plan.cache_info().currsize
    items = [(name, "close, x-one") for name in head]
    connection = [value for name, value in items if name == "Connection"]
    request_headers(items, connection=connection)
    assert headers._plan.cache_info().currsize == before


def test_a_field_that_is_operators_is_not_added() -> None:
    without = frozenset({"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-request-id"})
    given = encoded([("X-Forwarded-For", "10.0.0.1"), ("Accept", "x")])
    fields = headers.request_headers(
        given, connection=[], peer="::1", scheme="http", host="h", request_id="i", without=without
    )
    assert fields == [(b"Accept", b"x")]


def test_the_fields_of_a_request_travel_byte_for_byte() -> None:
    raw = [(b"X-Latin", b"caf\xe9 \xff"), (b"x-TAB", b"a\tb")]
    fields = headers.request_headers(
        raw, connection=[], peer=None, scheme="http", host="", request_id=None
    )
    assert headers.raw_lines(fields[:-1]) == b"X-Latin: caf\xe9 \xff\r\nx-TAB: a\tb\r\n"


def test_a_host_that_is_not_utf_8_cannot_be_text() -> None:
    with pytest.raises(InvalidRequest, match="Host"):
        added(("Host", "\udcff"), host="\udcff")


def test_what_the_next_hop_should_know_is_added() -> None:
    assert added(("Accept", "x")) == [
        ("Accept", "x"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "proxy.example"),
        ("X-Request-Id", "id-1"),
    ]


def test_the_peer_is_appended_to_the_proxies_before_us() -> None:
    result = added(
        ("X-Forwarded-For", "203.0.113.7, 198.51.100.2"),
        ("Accept", "x"),
        ("x-forwarded-for", "10.0.0.1"),
    )
    assert [value for name, value in result if name.lower() == "x-forwarded-for"] == [
        "203.0.113.7, 198.51.100.2, 10.0.0.1, 192.0.2.1"
    ]


def test_what_a_proxy_before_us_has_set_is_kept() -> None:
    before = [
        ("x-forwarded-proto", "http"),
        ("X-FORWARDED-HOST", "a.example"),
        ("x-request-id", "theirs"),
    ]
    assert added(*before) == [*before, ("X-Forwarded-For", "192.0.2.1")]


def test_an_unknown_peer_or_host_adds_nothing() -> None:
    names = [name for name, _ in added(peer=None, host="")]
    assert names == ["X-Forwarded-Proto", "X-Request-Id"]
    kept = added(("X-Forwarded-For", "203.0.113.7"), peer=None)
    assert ("X-Forwarded-For", "203.0.113.7") in kept


def test_the_fields_of_an_answer_travel_byte_for_byte() -> None:
    assert lines((b"x-LaTin", b"caf\xe9 \xff"), (b"X-Utf", "é".encode()), (b"X-Tab", b"a\tb ")) == [
        b"x-LaTin: caf\xe9 \xff",
        b"X-Utf: \xc3\xa9",
        b"X-Tab: a\tb ",
    ]


@pytest.mark.parametrize(
    "value", [b"a\r\nSet-Cookie: b", b"a\nb", b"a\rb", b"\r", b"\n", b"\r\n\r\nbody"]
)
def test_a_value_that_would_split_the_answer_is_left_out(value: bytes) -> None:
    assert lines((b"X-Bad", value), (b"X-Good", b"1")) == [b"X-Good: 1"]


@pytest.mark.parametrize("name", [b"X\r\nSet-Cookie", b"X\n", b"\rX"])
def test_a_name_that_would_split_the_answer_is_left_out(name: bytes) -> None:
    assert lines((name, b"1"), (b"X-Good", b"1")) == [b"X-Good: 1"]


TOKENS = st.text("abcXYZ-", min_size=1, max_size=8).map(str.encode)
VALUES = st.binary(max_size=8) | st.sampled_from([b"\r\n", b"a\r\nX: y", b"\x0b", b"\x85"])


@given(st.lists(st.tuples(TOKENS, VALUES), max_size=8), st.none() | st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_an_answer_has_as_many_lines_as_fields_that_got_through(
    raw: list[tuple[bytes, bytes]], limit: int | None
) -> None:
    whole = [
        name + b": " + value
        for name, value in raw
        if name.lower().decode() not in HOP_BY_HOP and b"\r" not in value and b"\n" not in value
    ]
    kept = lines(*raw, limit=limit)
    assert kept == whole[: len(kept)]
    if limit is None:
        assert kept == whole
    else:
        assert sum(len(line) + 2 for line in kept) <= limit
        assert kept == whole or sum(len(line) + 2 for line in whole[: len(kept) + 1]) > limit


def test_fields_beyond_the_limit_are_left_out_whole() -> None:
    raw = [(b"X-%d" % i, b"v" * 994) for i in range(10)]  # 1,001 bytes each
    assert len(response_lines(raw, limit=3003)) == 3003
    assert len(response_lines(raw, limit=3002)) == 2002
    assert lines(*raw, limit=1000) == []


def test_nothing_is_squeezed_in_after_the_first_field_that_does_not_fit() -> None:
    raw = [(b"X-Small", b"1"), (b"X-Large", b"v" * 100), (b"X-Late", b"1")]
    assert lines(*raw, limit=60) == [b"X-Small: 1"]


def test_a_field_that_stays_behind_does_not_count_against_the_limit() -> None:
    raw = [(b"Keep-Alive", b"v" * 100), (b"X-Bad", b"\n" * 100), (b"X", b"1")]
    assert lines(*raw, limit=6) == [b"X: 1"]
