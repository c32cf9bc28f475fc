"""Who a client is: the header that counts, and what is kept of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from asyncproxy.wire.credentials import (
    HEADERS,
    KeyRing,
    digest,
    find,
    fingerprint,
    masked,
    masked_path,
    same,
    secrets,
    without_quotes,
)

KEY = b"k" * 32


def found(*headers: tuple[str, str]) -> tuple[str, str] | None:
    return find(CIMultiDict(headers))


def credential(*headers: tuple[str, str]) -> str | None:
    result = found(*headers)
    return None if result is None else result[1]


def test_the_first_of_the_five_headers_counts_whatever_their_order() -> None:
    headers = [
        ("x-goog-api-key", "5"),
        ("api-key", "4"),
        ("X-Api-Key", "3"),
        ("authorization", "Bearer 2"),
        ("X-BF-VK", "1"),
    ]
    for count in range(5, 0, -1):
        assert credential(*headers[:count]) == str(6 - count)
    assert found() is None


def test_the_name_of_the_header_that_counts_is_given() -> None:
    assert [name.lower() for name in HEADERS] == [
        "x-bf-vk",
        "authorization",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
    ]
    for name in HEADERS:
        result = found(("Accept", "x"), (name.upper(), "secret"))
        assert result is not None
        assert result[0].lower() == name.lower()


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   "])
def test_bearer_and_the_bare_key_are_the_same_credential(scheme: str) -> None:
    assert credential(("Authorization", f"{scheme}sk-1")) == "sk-1"
    for name in HEADERS:
        assert credential((name, "sk-1")) == "sk-1"
        assert credential((name, " sk-1 ")) == "sk-1"


def test_another_scheme_is_part_of_the_credential() -> None:
    assert credential(("Authorization", "Basic c2s6MQ==")) == "Basic c2s6MQ=="
    assert credential(("Authorization", "Bearerish sk")) == "Bearerish sk"
    assert credential(("Authorization", "sk Bearer")) == "sk Bearer"


def test_a_key_may_hold_spaces() -> None:
    assert credential(("Authorization", "Bearer a b")) == "a b"


@pytest.mark.parametrize("value", ["", " ", "Bearer ", "Bearer", "bearer    "])
def test_a_header_without_a_credential_is_as_if_it_were_absent(value: str) -> None:
    assert found(("x-bf-vk", value)) is None
    assert found(("Authorization", value), ("api-key", "sk-1")) == ("api-key", "sk-1")


def test_other_headers_are_no_credentials() -> None:
    assert found(("Cookie", "a"), ("Proxy-Authorization", "Bearer x"), ("api_key", "x")) is None


def test_a_digest_tells_credentials_apart_and_holds_none() -> None:
    assert digest("sk-1", KEY) == digest("sk-1", KEY)
    assert len(digest("sk-1", KEY)) == 16
    assert len({digest(f"sk-{i}", KEY) for i in range(1000)}) == 1000
    assert b"sk-1" not in digest("sk-1", KEY)


def test_a_digest_depends_on_the_key() -> None:
    assert digest("sk-1", KEY) != digest("sk-1", b"x" * 32)


def test_a_credential_that_is_not_utf_8_has_a_digest() -> None:
    one, two = (raw.decode("utf-8", "surrogateescape") for raw in (b"\xff", b"\xfe"))
    assert digest(one, KEY) != digest(two, KEY)
    assert one not in KeyRing(["sk-1"], KEY)


@given(st.binary(max_size=20), st.binary(max_size=20))
@settings(max_examples=100, deadline=None)
def test_digests_are_the_same_when_their_bytes_are(a: bytes, b: bytes) -> None:
    assert same(a, b) == (a == b)
    assert same(a, bytes(bytearray(a)))


def test_a_ring_knows_its_keys_and_no_others() -> None:
    ring = KeyRing(["sk-1", "sk-2", "é"], KEY)
    for known in ("sk-1", "sk-2", "é"):
        assert known in ring
    for unknown in ("", "sk", "sk-3", "sk-1 ", "SK-1", "sk-1sk-2", None, b"sk-1", 1):
        assert unknown not in ring


def test_an_empty_ring_is_false_and_knows_nobody() -> None:
    ring = KeyRing([], KEY)
    assert not ring
    assert "" not in ring
    assert bool(KeyRing(["sk-1"], KEY)) is True


def test_a_ring_keeps_no_key_that_it_was_given() -> None:
    ring = KeyRing(["sk-secret"], KEY)
    assert "sk-secret" not in repr(vars(ring))


@pytest.mark.parametrize(
    ("headers", "query", "expected"),
    [
        ([("Authorization", "Bearer k1")], "", {"Bearer k1", "k1"}),
        ([("X-Api-Key", "k1"), ("x-bf-vk", " k2 ")], "", {"k1", "k2"}),
        ([("Cookie", "session=1; b=2")], "", {"session=1; b=2", "b=2", "1", "2"}),
        (
            [("Authorization", "Basic dXNlcjpwYXNzOjE=")],
            "",
            {"Basic dXNlcjpwYXNzOjE=", "dXNlcjpwYXNzOjE=", "user:pass:1", "pass:1"},
        ),
        ([("Authorization", "basic c2tfeDo=")], "", {"basic c2tfeDo=", "c2tfeDo=", "sk_x:", "sk_x"}),
        ([("Authorization", "Basic \xff=")], "", {"Basic \xff=", "\xff=", ""} - {""}),
        ([("X-Gateway-Token", "Token abc"), ("whatever", "x")], "", {"Token abc", "abc", "x"}),
        ([("Helicone-Auth", "Bearer k")], "", {"Bearer k", "k"}),
        (
            [("X-Stainless-OS", "Linux"), ("Sec-Fetch-Mode", "cors"), ("X-Forwarded-For", "::1")],
            "",
            set(),
        ),
        ([("Content-Type", "application/json"), ("X-Request-Id", "r")], "", set()),
        ([], "api-version=1&api-key=a%2Fb&x", {"a%2Fb", "a/b"}),
        ([], "access_token=t+1", {"t+1", "t 1"}),
        ([("Authorization", "")], "key=", set()),
    ],
)
def test_what_may_be_a_credential(
    headers: list[tuple[str, str]], query: str, expected: set[str]
) -> None:
    assert secrets(headers, query) == expected


@pytest.mark.parametrize(
    ("text", "hidden", "expected"),
    [
        ("no such key: abcdefgh!", {"abcdefgh"}, "no such key: ***!"),
        ("xabcdefghx", {"abcdefgh"}, "x***x"),
        ("Bearer abcdefgh", {"abcdefgh", "Bearer abcdefgh"}, "***"),
        ("a key that is a, and another", {"a"}, "*** key that is ***, and another"),
        ("regex [.*] as it is", {"[.*]"}, "regex [.*] as it is".replace("[.*]", "***")),
        ("Incorrect key: sk-proj-12ab", (), "Incorrect key: ***"),
        ("got bearer xyz, no", (), "got bearer ***, no"),
        ("nothing of the kind", (), "nothing of the kind"),
        ("", {"abcdefgh"}, ""),
    ],
)
def test_credentials_are_masked(text: str, hidden: set[str], expected: str) -> None:
    assert masked(text, hidden, limit=512) == expected


def test_what_is_cut_leaves_no_part_of_a_secret() -> None:
    """Wherever it stands, and also behind another one, whose mask is shorter than it was."""
    secret, longer = "s3cr3t-of-a-client", "x" * 1000
    for before in range(40, 60):
        for text in ("." * before + secret, longer + "." * before + secret + longer):
            shown = masked(text, {secret, longer}, limit=50 if text[0] == "." else 1050)
            assert "s3" not in shown
            assert len(shown) <= 1050


def test_with_very_many_secrets_nothing_is_shown() -> None:
    assert masked("a text", {str(number) for number in range(1000)}, limit=512) == "***"


class Counted(str):
    """A text that counts the characters that are looked at to mask something in it."""

    __slots__ = ()
    seen = 0

    def __getitem__(self, index: Any) -> Counted:
        return Counted(super().__getitem__(index))

    def replace(self, *arguments: Any) -> Counted:
        Counted.seen += len(self)
        return Counted(super().replace(*arguments))


def test_what_masking_takes_does_not_grow_with_the_text() -> None:
    """An upstream may write an error of 64 MiB."""
    hidden = {"a-secret-of-a-client", "another-one"}
    seen = []
    for size in (10_000, 20_000, 10_000_000):
        Counted.seen = 0
        masked(Counted("x" * size), hidden, limit=512)
        seen.append(Counted.seen)
    assert seen[0] == seen[1] == seen[2] < 2000


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/embeddings", "/v1/embeddings"),
        ("/v1/images/generations", "/v1/images/generations"),
        ("/v1/key/sk-abcd1234/info", "/v1/key/***/info"),
        ("/v1/key/%73k%2Dabcd1234/info", "/v1/key/***/info"),
        ("/key/88dc28d0f030c55ed4ab77ed8faf098196cb1c05/info", "/key/***/info"),
        ("/key/info", "/key/info"),
        ("/api-keys/regenerate", "/api-keys/regenerate"),
        ("/v1/files/file-abc123", "/v1/files/file-abc123"),
        ("/v1/responses/resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b", None),
        ("/v1/models/BAAI%2Fbge-m3", None),
        ("/v1/models/task-1", None),
        ("/u/eyJhbGciOiJIUzI1NiJ9.e30.x/v1/models", "/u/***/v1/models"),
        ("/v1beta/AIzaSyD-abcdefgh:embed", "/v1beta/***"),
        ("", ""),
        ("*", "*"),
        ("//", "//"),
    ],
)
def test_keys_in_a_path_are_masked(path: str, expected: str | None) -> None:
    assert masked_path(path) == (path if expected is None else expected)


def test_a_fingerprint_is_six_digits_of_the_digest() -> None:
    assert fingerprint(b"\x01\x02\xff" + bytes(13)) == "0102ff"
    assert fingerprint(b"") == ""
    assert KeyRing([], KEY).fingerprint(("x-api-key", "sk-1")) == digest("sk-1", KEY).hex()[:6]
    assert KeyRing([], KEY).fingerprint(None) == ""


@given(st.text(), st.sets(st.text(min_size=8), max_size=4))
def test_no_long_credential_is_left(text: str, hidden: set[str]) -> None:
    """But where the mask itself would be one."""
    quoted = masked(text + " ".join(hidden), hidden, limit=1_000_000)
    assert not [secret for secret in hidden if secret in quoted and "*" not in secret]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Got more than 8 bytes when reading: b'secret'...", "Got more than 8 bytes when reading"),
        (
            "Got more than 8 bytes when reading: bytearray(b'secret').",
            "Got more than 8 bytes when reading",
        ),
        ("Bad status line 'secret'", "Bad status line"),
        ('Bad status line "secret\'s"', "Bad status line"),
        ("Invalid header token:\n\n  b'X secret'\n  ^", "Invalid header token"),
        ("A length can't be here", "A length can't be here"),
        ("'secret'", ""),
        ("", ""),
        ("x" * 300, "x" * 200),
    ],
)
def test_what_a_parser_quotes_is_left_out(message: str, expected: str) -> None:
    assert without_quotes(message) == expected


def steps(run: Callable[[], object]) -> int:
    """How many functions are called, those of C included."""
    count = 0

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "run",
    [
        lambda size: masked_path("/sk-abcd/%41/key" * size),
        lambda size: secrets([("Cookie", "a=b; " * size), ("X-Key", "a " * size)], "key=a&" * size),
        lambda size: without_quotes("b 'a' " * size),
    ],
    ids=["path", "secrets", "quotes"],
)
def test_twice_the_bytes_take_twice_the_steps(run: Callable[[int], object]) -> None:
    run(1)
    assert steps(lambda: run(4000)) <= 2.1 * steps(lambda: run(2000))
