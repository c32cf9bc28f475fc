"""Ids that nobody can guess."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Final

__all__ = ["RandomIds"]

_AT_ONCE: Final = 256

_PARTS: Final = struct.Struct("8s4s4s4s12s")

# Tables that set the version in the upper four bits of a random octet, or the variant in the upper two.
_VERSIONS: Final = bytes(octet & 0x0F | 0x40 for octet in range(256))
_VARIANTS: Final = bytes(octet & 0x3F | 0x80 for octet in range(256))


class RandomIds:
    """Makes UUIDs of version 4 (RFC 9562, section 5.4). Each has 122 random bits.

    256 ids are made at a time, because the system call costs more than the rest of an id.
    ``random`` returns as many random bytes as it is asked for.
    """

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random
        self._left: list[str] = []

    def __call__(self) -> str:
        if not self._left:
            self._left = _uuids(self._random(16 * _AT_ONCE))
        return self._left.pop()


def _uuids(random: bytes) -> list[str]:
    octets = bytearray(random)
    octets[6::16] = octets[6::16].translate(_VERSIONS)
    octets[8::16] = octets[8::16].translate(_VARIANTS)
    parts = _PARTS.iter_unpack(octets.hex().encode())
    return b" ".join(map(b"-".join, parts)).decode().split(" ")
