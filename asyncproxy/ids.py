"""Ids that nobody can guess."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

__all__ = ["RandomIds"]

_AT_ONCE: Final = 256

# A random digit as one whose upper two bits are those of the variant.
_VARIANTS: Final = {f"{digit:x}": f"{digit & 3 | 8:x}" for digit in range(16)}


class RandomIds:
    """UUIDs of version 4 (RFC 9562, section 5.4): 122 random bits of the operating system each.

    Many are made at once: asking the system costs more than all else about an id.
    ``random`` gives that many random bytes.
    """

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random
        self._left: list[str] = []

    def __call__(self) -> str:
        if not self._left:
            digits = self._random(16 * _AT_ONCE).hex()
            self._left = [_formatted(digits[i : i + 32]) for i in range(0, len(digits), 32)]
        return self._left.pop()


def _formatted(digits: str) -> str:
    variant = _VARIANTS[digits[16]]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
