"""Which header says who a client is, and what is kept of it."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from asyncproxy import credentials
from asyncproxy.credentials import KeyRing

KEY = b"k" * 32


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, None),
        ({"Authorization": "Bearer sk-1"}, ("Authorization", "sk-1")),
        ({"authorization": "bearer   sk-1 "}, ("Authorization", "sk-1")),
        ({"Authorization": "Basic c2s="}, ("Authorization", "Basic c2s=")),
        ({"Authorization": "sk-1"}, ("Authorization", "sk-1")),
        ({"X-API-Key": "sk-1"}, ("x-api-key", "sk-1")),
        ({"api-key": "sk-1"}, ("api-key", "sk-1")),
        ({"x-goog-api-key": "sk-1"}, ("x-goog-api-key", "sk-1")),
        ({"x-bf-vk": "vk", "Authorization": "Bearer sk-1"}, ("x-bf-vk", "vk")),
        ({"x-goog-api-key": "g", "api-key": "a", "x-api-key": "x"}, ("x-api-key", "x")),
        ({"Authorization": "", "x-api-key": "sk-1"}, ("x-api-key", "sk-1")),
        ({"Authorization": "Bearer ", "x-api-key": "sk-1"}, ("x-api-key", "sk-1")),
        ({"Authorization": "Bearer"}, None),
        ({"Cookie": "sk-1"}, None),
    ],
)
def test_the_first_header_that_is_there_counts(
    headers: dict[str, str], found: tuple[str, str] | None
) -> None:
    assert credentials.find(CIMultiDict(headers)) == found


def test_a_digest_tells_credentials_apart_and_nothing_else() -> None:
    digest = credentials.digest("sk-1", KEY)
    assert len(digest) == 16
    assert digest == credentials.digest("sk-1", KEY)
    assert digest != credentials.digest("sk-2", KEY)
    assert digest != credentials.digest("sk-1", b"x" * 32)
    assert credentials.same(digest, credentials.digest("sk-1", KEY))
    assert not credentials.same(digest, b"")
    assert credentials.digest("caf\udce9", KEY)


def test_keys_that_are_let_in() -> None:
    keys = KeyRing(["one", "two"], KEY)
    assert keys
    assert "one" in keys
    assert "two" in keys
    for other in ("", "three", "on", "onee", "ONE", None, 1):
        assert other not in keys
    assert not KeyRing([], KEY)


def test_no_key_is_kept() -> None:
    assert "one" not in str(vars(KeyRing(["one"], KEY)))
