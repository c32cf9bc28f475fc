"""Which header says who a client is, and what is kept of it to compare. Pure.

The wire contract, section 7: the first present of ``x-bf-vk``, ``Authorization``, ``x-api-key``,
``api-key`` and ``x-goog-api-key``; ``Bearer`` and the bare-key headers with the same key are the
same credential.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote_plus

from multidict import MultiMapping, istr

__all__ = ["HEADERS", "KeyRing", "digest", "find", "masked", "same", "secrets"]

HEADERS: Final = (
    istr("x-bf-vk"),
    istr("Authorization"),
    istr("x-api-key"),
    istr("api-key"),
    istr("x-goog-api-key"),
)

_SECRET_HEADERS: Final = frozenset(
    {*(name.lower() for name in HEADERS), "cookie", "proxy-authorization"}
)
_SECRET_PARAMETER: Final = re.compile("key|token|secret|sig|password|auth", re.IGNORECASE)
_LOOKS_SECRET: Final = re.compile(r"(?<=bearer )[^\s\"',;]+|\bsk-[\w-]{4,}", re.IGNORECASE)
_LONG_SECRET: Final = 8


def find(headers: MultiMapping[str]) -> tuple[str, str] | None:
    """The name of the header that counts, and the credential in it. None if there is none."""
    for name in HEADERS:
        value = headers.get(name)
        if value is None:
            continue
        scheme, _, key = value.partition(" ")
        credential = (key if scheme.lower() == "bearer" else value).strip()
        if credential:
            return name, credential
    return None


def secrets(headers: Iterable[tuple[str, str]], query: str = "") -> set[str]:
    """What of a request may be a credential: values of its headers, and of its query string."""
    found: set[str] = set()
    for name, value in headers:
        if name.lower() in _SECRET_HEADERS:
            scheme, _, key = value.partition(" ")
            found |= {value.strip(), key.strip() or scheme}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if _SECRET_PARAMETER.search(name):
            found |= {value, unquote_plus(value)}
    return found - {""}


def masked(text: str, hidden: Iterable[str]) -> str:
    """``text`` with ``***`` for each of ``hidden`` in it, and for what looks like a key.

    For text of an upstream that goes into the log: some quote the key that they refuse.
    """
    for secret in sorted(hidden, key=len, reverse=True):
        if len(secret) >= _LONG_SECRET:
            text = text.replace(secret, "***")
        else:  # as a word: a key that is one letter would leave nothing of the text
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return _LOOKS_SECRET.sub("***", text)


def digest(credential: str, key: bytes) -> bytes:
    """16 bytes that tell a credential from another, and tell nothing else without ``key``."""
    data = credential.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, key=key, digest_size=16).digest()


def same(a: bytes, b: bytes) -> bool:
    """Whether two digests are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(a, b)


class KeyRing:
    """The keys that a client may present (``auth.keys``). Empty: every client is let in."""

    def __init__(self, keys: Iterable[str], key: bytes) -> None:
        self._key = key
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """Let in those with other keys from now on. ``digests`` is another tuple then."""
        self.digests = tuple(digest(key, self._key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def __contains__(self, credential: object) -> bool:
        if not isinstance(credential, str):
            return False
        presented = digest(credential, self._key)
        found = False
        for known in self.digests:  # all of them: the time must not tell which one matched
            found |= hmac.compare_digest(presented, known)
        return found
