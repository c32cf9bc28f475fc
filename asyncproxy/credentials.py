"""Which header says who a client is, and what is kept of it to compare. Pure.

The wire contract, section 7: the first present of ``x-bf-vk``, ``Authorization``, ``x-api-key``,
``api-key`` and ``x-goog-api-key``; ``Bearer`` and the bare-key headers with the same key are the
same credential.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from multidict import MultiMapping, istr

__all__ = ["HEADERS", "KeyRing", "digest", "find", "same"]

HEADERS: Final = (
    istr("x-bf-vk"),
    istr("Authorization"),
    istr("x-api-key"),
    istr("api-key"),
    istr("x-goog-api-key"),
)


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
        self._digests = tuple(digest(k, key) for k in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, credential: object) -> bool:
        if not isinstance(credential, str):
            return False
        presented = digest(credential, self._key)
        found = False
        for known in self._digests:  # all of them: the time must not tell which one matched
            found |= hmac.compare_digest(presented, known)
        return found
