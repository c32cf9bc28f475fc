"""Is this JSON text? RFC 8259, in one pass over the bytes and without building a value. Pure."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

__all__ = ["InvalidText", "check", "parse"]

T = TypeVar("T")

_RAW: Final = msgspec.json.Decoder(msgspec.Raw)
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class InvalidText(ValueError):
    """Not JSON text. The message says where and why, and holds none of the text."""


def check(text: bytes) -> None:
    """Raise :class:`InvalidText` unless ``text`` is one JSON value in UTF-8."""
    parse(text, _RAW)


def parse(text: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """``text`` decoded by ``decoder``.

    Raises :class:`InvalidText`, or :class:`msgspec.ValidationError` where the text is JSON but not of
    the decoder's type.
    """
    try:
        value = _decode(text, decoder)
    except msgspec.ValidationError:
        check(text)  # a wrong type is found before the rest is read, and the rest may be malformed
        raise
    if not text.isascii():  # msgspec does not look into the strings that it skips
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise InvalidText(f"invalid UTF-8 at byte {error.start}") from None
    return value


def _decode(text: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        raise
    except RecursionError:
        raise InvalidText("nested too deeply") from None
    except msgspec.DecodeError as error:
        # The one thing that msgspec refuses and RFC 8259 allows (section 8.2) is half a surrogate
        # pair, which a model writes when it is cut off in the middle of an emoji.
        replaced, count = _SURROGATE.subn(rb"\\ufffd", text)
        if count and replaced != text:
            return _decode(replaced, decoder)
        reason = str(error).removeprefix("JSON is malformed: ") if text.strip() else "it is empty"
        raise InvalidText(reason) from None
