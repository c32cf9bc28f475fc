"""Is this JSON text? RFC 8259, in one pass over the bytes and without building a value. Pure."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

__all__ = ["InvalidText", "check", "parse", "without_half_pairs"]

T = TypeVar("T")

_RAW: Final = msgspec.json.Decoder(msgspec.Raw)
# Half a surrogate pair: a high one with no low one after it, or a low one with no high one before.
_HIGH, _LOW, _HEX = rb"\\u[dD][89abAB]", rb"\\u[dD][c-fC-F]", rb"[0-9a-fA-F]{2}"
_HALF_A_PAIR: Final = re.compile(
    rb"%b%b(?!%b)|(?<!%b%b)%b%b" % (_HIGH, _HEX, _LOW, _HIGH, _HEX.replace(b"{2}", b"") * 2, _LOW, _HEX)
)


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
    if not text.isascii():  # msgspec does not look into the strings that it skips
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise InvalidText(f"invalid UTF-8 at byte {error.start}") from None
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        _decode(text, _RAW)  # a wrong type is found before the rest is read: that may be malformed
        raise
    except (msgspec.DecodeError, RecursionError):
        return _decode(text, decoder)  # what of it is wrong


def without_half_pairs(text: bytes) -> bytes:
    r"""``text`` with ``\ufffd`` for each half of a surrogate pair; the same bytes if there is none.

    It is the one thing that msgspec refuses and RFC 8259 allows (section 8.2), and what a model writes
    that is cut off in the middle of an emoji.
    """
    if (b"\\ud" not in text and b"\\uD" not in text) or b"\x01" in text:
        return text  # no JSON text holds that character
    # Escaped backslashes are hidden meanwhile: what follows one is no escape.
    hidden = text.replace(b"\\\\", b"\x01\x01")
    return _HALF_A_PAIR.sub(rb"\\ufffd", hidden).replace(b"\x01\x01", b"\\\\")


def _decode(text: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        raise
    except RecursionError:
        raise InvalidText("nested too deeply") from None
    except msgspec.DecodeError as error:
        replaced = without_half_pairs(text)
        if replaced != text:
            return _decode(replaced, decoder)
        reason = str(error).removeprefix("JSON is malformed: ") if text.strip() else "it is empty"
        raise InvalidText(reason) from None
