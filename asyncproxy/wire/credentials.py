"""The credential of a request, its digest, and secrets masked for the log. Pure.

The wire contract, section 7: the credential is in the first of ``x-bf-vk``, ``Authorization``,
``x-api-key``, ``api-key`` and ``x-goog-api-key`` that the request has. A key after ``Bearer`` and the
same key in another of these headers are the same credential.
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

# Fields whose values may be logged. Every other field counts as a secret: gateways take keys in headers
# that are not known here.
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

# The beginnings of the keys of providers and gateways, and of a JSON Web Token.
_KEY: Final = (
    r"sk-[\w-]{4,}"
    r"|(?:sk_|pk[-_]|rk[-_]|xai-|hf_|gsk_|pplx-|nvapi-|ghp_|glpat-|tgp_|r8_|AIza|eyJ)[\w.-]{8,}"
)
_LOOKS_SECRET: Final = re.compile(rf"(?<=bearer )[^\s\"',;]+|\b(?:{_KEY})", re.IGNORECASE)
_LONG_SECRET: Final = 8

# A long segment of a path after one of these words is a key: `/key/…/info`.
_BEFORE_KEY: Final = re.compile("keys?|tokens?|secrets?|api-?keys?", re.IGNORECASE)
_LONG_SEGMENT: Final = 16
_NO_KEY: Final = re.compile("(?:/(?:v1|[a-z]{1,15}))*+")  # nearly all paths, in a tenth of the time

# The text is searched for each secret. With more secrets than this, the whole text is masked.
_MAX_SECRETS: Final = 512
_COVERED: Final = re.compile("\0+")


# Where a parser's message begins to quote: a line break, or a quotation mark that is no apostrophe.
_QUOTE: Final = re.compile(r"""\n|\b(?:bytearray\()?b['"]|(?<!\w)['"]""")
_LONGEST_REASON: Final = 200


def find(headers: MultiMapping[str]) -> tuple[str, str] | None:
    """The name of the header that holds the credential, and the credential. None if there is none."""
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
    """The parts of a request that may be credentials: values of headers and of the query string."""
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
        yield password or user  # some services take their key as the user name


def masked(text: str, hidden: Collection[str], *, limit: int) -> str:
    """``text`` with ``***`` in place of each secret of ``hidden``, and of each word like a key.

    For an upstream's text in the log: some upstreams quote the key that they refuse. At most ``limit``
    characters are shown. The text is read to at most the length of the longest secret beyond them.
    """
    if len(hidden) > _MAX_SECRETS:
        return "***"
    # Secrets are covered before the text is cut, so that no part of a secret is left at the end.
    text = text[: limit + max(map(len, hidden), default=0)]
    short: list[str] = []
    for secret in sorted(hidden, key=len, reverse=True):
        if len(secret) >= _LONG_SECRET:
            text = text.replace(secret, "\0" * len(secret))
        elif secret:
            short.append(re.escape(secret))
    text = text[: limit + _LONG_SECRET]
    if short:  # as whole words: a key of one letter would cover most of the text
        text = re.sub(rf"(?<!\w)(?:{'|'.join(short)})(?!\w)", _covered, text)
    return _COVERED.sub("***", _LOOKS_SECRET.sub(_covered, text)[:limit])


def _covered(found: re.Match[str]) -> str:
    return "\0" * len(found[0])


def without_quotes(message: str) -> str:
    """A parser's error message without the bytes that it quotes."""
    return _QUOTE.split(message, maxsplit=1)[0].strip(" :")[:_LONGEST_REASON]


def masked_path(path: str) -> str:
    """A path with ``***`` in place of each segment that is a key: ``/v1/key/***/info``."""
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
    """The keyed hash of a credential, 16 bytes. Without ``key`` it reveals nothing."""
    data = credential.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, key=key, digest_size=16).digest()


def fingerprint(digest: bytes) -> str:
    """Six hex digits of a digest, to tell credentials apart in the log. Empty for an empty digest."""
    return digest[:3].hex()


def same(a: bytes, b: bytes) -> bool:
    """Whether two digests are equal, compared in constant time."""
    return hmac.compare_digest(a, b)


class KeyRing:
    """The keys that a client may present (``auth.keys``). Empty: every client is accepted."""

    def __init__(self, keys: Iterable[str], key: bytes) -> None:
        self._key = key
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """Accept other keys from now on. ``digests`` becomes another tuple."""
        self.digests = tuple(digest(key, self._key) for key in keys)

    def fingerprint(self, found: tuple[str, str] | None) -> str:
        """The fingerprint of the credential that :func:`find` found, in the ring or not."""
        return fingerprint(digest(found[1], self._key)) if found else ""

    def __bool__(self) -> bool:
        return bool(self.digests)

    def __contains__(self, credential: object) -> bool:
        if not isinstance(credential, str):
            return False
        presented = digest(credential, self._key)
        found = False
        for known in self.digests:  # no early exit: the time must not tell which key matched
            found |= hmac.compare_digest(presented, known)
        return found
