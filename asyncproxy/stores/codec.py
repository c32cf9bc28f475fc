"""The data that durable stores write: calls sealed, outcomes plain or sealed.

Sealed data is a Fernet token (AES-128-CBC and HMAC-SHA256, https://github.com/fernet/spec): it cannot
be read or changed without the key. With several keys the first one seals and any of them opens, so keys
can be rotated.
"""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Final

import msgspec

from asyncproxy.core.errors import StartupError
from asyncproxy.core.jobs import Call, Job, Outcome

__all__ = ["Codec", "Unreadable", "require"]

# Names of header fields may be a subclass of str. msgspec needs a hook for it.
_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=str)
_CALLS: Final = msgspec.msgpack.Decoder(Call)
_JOBS: Final = msgspec.msgpack.Decoder(Job)
_OUTCOMES: Final = msgspec.msgpack.Decoder(Outcome)

_PROBE: Final = b"asyncproxy"

# The first byte of a part that is not sealed. A token is Base64, so it never begins with this byte.
_PLAIN: Final = b"\0"


class Unreadable(Exception):
    """Stored data is damaged, or was sealed with a key that is not configured."""


def require(*, extra: str) -> None:
    """Raise :class:`StartupError` if ``cryptography`` is missing. ``extra`` installs it."""
    try:
        import cryptography.fernet  # noqa: F401
    except ImportError:
        raise StartupError(
            f"this store needs a library that is missing: pip install 'asyncproxy[{extra}]'"
        ) from None


class Codec:
    """Turns jobs, calls and outcomes into bytes at rest, and back.

    ``keys`` are 32 secret bytes each. Raises :class:`StartupError` if the library is missing; ``extra``
    is the extra of this package that installs it.
    """

    def __init__(self, keys: Sequence[bytes], *, seal_outcomes: bool, extra: str) -> None:
        require(extra=extra)
        from cryptography.fernet import Fernet, InvalidToken, MultiFernet

        self._fernet = MultiFernet([Fernet(urlsafe_b64encode(key)) for key in keys])
        self._invalid = InvalidToken
        self._seal_outcomes = seal_outcomes
        # Derived from the keys: processes that share the keys share these too.
        self.credential_keys = tuple(
            hashlib.blake2b(b"asyncproxy credentials", key=key, digest_size=32).digest() for key in keys
        )

    def pack_job(self, job: Job) -> bytes:
        """A packed job. It is not sealed, because it holds no secret."""
        return _ENCODER.encode(job)

    def unpack_job(self, data: bytes) -> Job:
        """Raises :class:`Unreadable`."""
        try:
            return _JOBS.decode(data)
        except (msgspec.MsgspecError, ValueError) as error:
            raise Unreadable(str(error)) from None

    def update_job(self, record: bytes, job: Job) -> bytes:
        """``record``, a packed job, with the values of ``job``. Raises :class:`Unreadable`.

        Fields that only a newer version knows keep their values, in the job and in its fallbacks. The
        fallbacks of ``job`` are the last ones of the record: the earlier ones have been tried.
        """
        try:
            before = msgspec.msgpack.decode(record)
            after = msgspec.msgpack.decode(self.pack_job(job))
            left = before.get("fallbacks", [])
            left = left[len(left) - len(job.fallbacks) :]
            after["fallbacks"] = [
                {**old, **new} for old, new in zip(left, after["fallbacks"], strict=True)
            ]
            return _ENCODER.encode({**before, **after})
        except (msgspec.MsgspecError, ValueError) as error:
            raise Unreadable(str(error)) from None

    def seal_call(self, call: Call) -> bytes:
        """A sealed call. It holds the client's credential and text."""
        return self._fernet.encrypt(_ENCODER.encode(call))

    def open_call(self, data: bytes) -> Call:
        """Raises :class:`Unreadable`."""
        try:
            return _CALLS.decode(self._open(data))
        except (msgspec.MsgspecError, ValueError) as error:
            raise Unreadable(str(error)) from None

    def pack_outcome(self, outcome: Outcome) -> bytes:
        """A packed outcome without its parts, sealed if ``seal_outcomes`` is set."""
        if outcome.parts:
            outcome = msgspec.structs.replace(outcome, parts=(), part_sizes=outcome.sizes)
        return self._sealed(_ENCODER.encode(outcome))

    def pack_parts(self, outcome: Outcome) -> list[bytes]:
        """The parts of an outcome, each sealed if ``seal_outcomes`` is set."""
        return [self._sealed(part) if self._seal_outcomes else _PLAIN + part for part in outcome.parts]

    def unpack_outcome(self, data: bytes) -> Outcome:
        """Takes plain and sealed data: the setting may have changed. Raises :class:`Unreadable`."""
        try:
            # A token is Base64 and begins with the letter g. A plain outcome begins with a msgpack map.
            return _OUTCOMES.decode(self._open(data) if data[:1] == b"g" else data)
        except (msgspec.MsgspecError, ValueError) as error:
            raise Unreadable(str(error)) from None

    def unpack_part(self, data: bytes) -> bytes:
        """Takes plain and sealed data: the setting may have changed. Raises :class:`Unreadable`."""
        return data[1:] if data[:1] == _PLAIN else self._open(data)

    def _sealed(self, data: bytes) -> bytes:
        return self._fernet.encrypt(data) if self._seal_outcomes else data

    def probe(self) -> bytes:
        """A token for a store to keep. :meth:`check` needs it to tell whether the keys are right."""
        return self._fernet.encrypt(_PROBE)

    def check(self, probe: bytes) -> None:
        """Raise :class:`StartupError` if the probe of a store was made with none of the keys."""
        try:
            right = self._open(probe) == _PROBE
        except Unreadable:
            right = False
        if not right:
            raise StartupError(
                "the store was written with another encryption key. Set store.encryption_key to that "
                "one, or to the new one and that one, with a comma between them"
            )

    def _open(self, data: bytes) -> bytes:
        try:
            return self._fernet.decrypt(data)
        except self._invalid:
            raise Unreadable("sealed with another key, or damaged") from None
