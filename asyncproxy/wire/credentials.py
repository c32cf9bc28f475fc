"""Which header says who a client is, and what is kept of it to compare. Pure.

The wire contract, section 7: the first present of ``x-bf-vk``, ``Authorization``, ``x-api-key``,
``api-key`` and ``x-goog-api-key``; ``Bearer`` and the bare-key headers with the same key are the
same credential.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from binascii import Error as NotBase64
from binascii import a2b_base64
from collections.abc import Collection, Iterable, Iterator
from typing import Final
from urllib.parse import unquote, unquote_plus

from multidict import MultiMapping, istr

from asyncproxy.wire.headers import OURS

__all__ = [
    "HEADERS",
    "KeyRing",
    "digest",
    "find",
    "fingerprint",
    "masked",
    "masked_path",
    "same",
    "secrets",
    "without_quotes",
]

HEADERS: Final = (
    istr("x-bf-vk"),
    istr("Authorization"),
    istr("x-api-key"),
    istr("api-key"),
    istr("x-goog-api-key"),
)

# Fields that hold no secret, or a text that every log may have. All others do: gateways have keys in
# headers that nobody here has heard of.
_HARMLESS: Final = frozenset(
    {
        *("accept", "accept-charset", "accept-encoding", "accept-language", "cache-control"),
        *("connection", "content-disposition", "content-encoding", "content-language"),
        *("content-length", "content-type", "date", "expect", "forwarded", "from", "host"),
        *("idempotency-key", "max-forwards", "openai-beta", "origin", "pragma", "priority", "te"),
        *("traceparent", "trailer", "transfer-encoding", "upgrade", "upgrade-insecure-requests"),
        *("user-agent", "via", "x-real-ip", "x-request-id"),
        *OURS,
    }
)
_HARMLESS_PREFIXES: Final = ("sec-", "x-forwarded-", "x-stainless-")

_SECRET_PARAMETER: Final = re.compile("key|token|secret|sig|password|auth", re.IGNORECASE)

# How the keys of providers and gateways begin, and a JSON Web Token.
_KEY: Final = (
    r"sk-[\w-]{4,}"
    r"|(?:sk_|pk[-_]|rk[-_]|xai-|hf_|gsk_|pplx-|nvapi-|ghp_|glpat-|tgp_|r8_|AIza|eyJ)[\w.-]{8,}"
)
_LOOKS_SECRET: Final = re.compile(rf"(?<=bearer )[^\s\"',;]+|\b(?:{_KEY})", re.IGNORECASE)
_LONG_SECRET: Final = 8

# A segment of a path that follows one of these is a key, if it is as long as one: `/key/…/info`.
_BEFORE_KEY: Final = re.compile("keys?|tokens?|secrets?|api-?keys?", re.IGNORECASE)
_LONG_SEGMENT: Final = 16
_NO_KEY: Final = re.compile("(?:/(?:v1|[a-z]{1,15}))*+")  # nearly all paths, in a tenth of the time

# Each secret is looked for in a text. With more of them than this, all of the text is masked.
_MAX_SECRETS: Final = 512
_COVERED: Final = re.compile("\0+")


# Where a parser begins to quote, in a `repr` or in lines of their own. An apostrophe is within a word.
_QUOTE: Final = re.compile(r"""\n|\b(?:bytearray\()?b['"]|(?<!\w)['"]""")
_LONGEST_REASON: Final = 200


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
        lowered = name.lower()
        if lowered not in _HARMLESS and not lowered.startswith(_HARMLESS_PREFIXES):
            found.update(_secrets_in(value))
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if _SECRET_PARAMETER.search(name):
            found |= {value, unquote_plus(value)}
    return found - {""}


def _secrets_in(value: str) -> Iterator[str]:
    """A header's value, and the parts of it that are secrets of their own."""
    scheme, _, key = value.partition(" ")
    yield value.strip()
    yield key.strip() or scheme
    for cookie in value.split(";") if "=" in value else ():
        yield cookie.partition("=")[2].strip()
    if scheme.lower() == "basic":  # RFC 7617
        try:
            pair = a2b_base64(key).decode("utf-8", "replace")
        except (NotBase64, ValueError):  # not ASCII
            return
        user, _, password = pair.partition(":")
        yield pair
        yield password or user  # some services want their key in place of the user


def masked(text: str, hidden: Collection[str], *, limit: int) -> str:
    """``text`` with ``***`` for each of ``hidden`` in it, and for what looks like a key.

    For text of an upstream that goes into the log: some quote the key that they refuse. ``limit``: how
    many characters of it are shown; no more than a secret behind them is looked at.
    """
    if len(hidden) > _MAX_SECRETS:
        return "***"
    # Covered before it is cut, at its length, so that no part of a secret is left at the end.
    text = text[: limit + max(map(len, hidden), default=0)]
    short: list[str] = []
    for secret in sorted(hidden, key=len, reverse=True):
        if len(secret) >= _LONG_SECRET:
            text = text.replace(secret, "\0" * len(secret))
        elif secret:
            short.append(re.escape(secret))
    text = text[: limit + _LONG_SECRET]
    if short:  # as a word: a key that is one letter would leave nothing of the text
        text = re.sub(rf"(?<!\w)(?:{'|'.join(short)})(?!\w)", _covered, text)
    return _COVERED.sub("***", _LOOKS_SECRET.sub(_covered, text)[:limit])


def _covered(found: re.Match[str]) -> str:
    return "\0" * len(found[0])


def without_quotes(message: str) -> str:
    """What a parser says of a message that it cannot read, without the bytes of it that it quotes."""
    return _QUOTE.split(message, maxsplit=1)[0].strip(" :")[:_LONGEST_REASON]


def masked_path(path: str) -> str:
    """A path with ``***`` for each segment that is a key, escaped or not: ``/v1/key/***/info``."""
    if _NO_KEY.fullmatch(path):
        return path
    segments = path.split("/")
    before = ""
    for position, segment in enumerate(segments):
        plain = unquote(segment) if "%" in segment else segment
        after_key = len(plain) >= _LONG_SEGMENT and _BEFORE_KEY.fullmatch(before)
        if after_key or _LOOKS_SECRET.search(plain):
            segments[position] = "***"
        before = plain
    return "/".join(segments)


def digest(credential: str, key: bytes) -> bytes:
    """16 bytes that tell a credential from another, and tell nothing else without ``key``."""
    data = credential.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, key=key, digest_size=16).digest()


def fingerprint(digest: bytes) -> str:
    """Six hex digits of a digest, to tell credentials apart in the log. Empty without one."""
    return digest[:3].hex()


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

    def fingerprint(self, found: tuple[str, str] | None) -> str:
        """What the log calls a credential that :func:`find` found, in the ring or not."""
        return fingerprint(digest(found[1], self._key)) if found else ""

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
