"""Is this JSON text? RFC 8259, in one pass over the bytes and without building a value. Pure."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

__all__ = ["Arriving", "InvalidText", "check", "parse", "without_half_pairs"]

T = TypeVar("T")

_CLOSING: Final = bytes.maketrans(b"[{", b"]}")
_MARKS: Final = b'[]{}"'
_NO_MARKS: Final = bytes(set(range(256)) - set(_MARKS))
_FEW: Final = 1024
_DEEPEST: Final = 16

_RAW: Final = msgspec.json.Decoder(msgspec.Raw)
# Escapes of surrogates. The patterns begin with what the engine can search for fast.
_DIGITS: Final = rb"[0-9a-fA-F][0-9a-fA-F]"
_HIGH: Final = rb"\\u[dD][89abAB]" + _DIGITS
_LOW: Final = rb"\\u[dD][c-fC-F]" + _DIGITS
# Half a surrogate pair: a high one with no low one after it, or a low one with no high one before.
_HALF_A_PAIR: Final = re.compile(
    rb"\\u[dD](?:[89abAB]%b(?!%b)|(?<!%b\\u[dD])[c-fC-F]%b)" % (_DIGITS, _LOW, _HIGH, _DIGITS)
)
# The start of an escape that is not the second one of a pair.
_BETWEEN_PAIRS: Final = re.compile(rb"\\(?:(?<!%b\\)|(?!%b))" % (_HIGH, _LOW.removeprefix(b"\\\\")))
_WINDOW: Final = 64 * 1024


class InvalidText(ValueError):
    """Not JSON text. The message says where and why, and holds none of the text."""


def check(text: bytes) -> None:
    """Raise :class:`InvalidText` unless ``text`` is one JSON value in UTF-8."""
    parse(text, _RAW)


class Arriving:
    """JSON text that is checked while it arrives, a step of about ``step_bytes`` at a time.

    A step ends at the last comma that is there. What is between two such commas is valid where it
    stands exactly if it is with the brackets opened before it that are open there, and those closed
    behind it that it leaves open: mostly the same ones, so that is tried first. What cannot be told in
    this way (the comma is in a string, or brackets change where something is escaped) is left to
    :func:`check`, which also says what is wrong.
    """

    def __init__(self, step_bytes: int) -> None:
        self._step_bytes = self._due = step_bytes
        self._opened = b""  # the brackets that are open where the rest begins
        self._rest: list[bytes] = []
        self._size = 0
        self._sure = True

    def add(self, piece: bytes) -> bool:
        """Take what comes next. Whether there is enough for a :meth:`step`."""
        if self._sure:
            self._rest.append(piece)
            self._size += len(piece)
        return self._size >= self._due

    def step(self) -> None:
        """Check what is there, up to its last comma."""
        rest = self._rest
        for number in reversed(range(len(rest))):
            end = rest[number].rfind(b",")
            if end >= 0:
                last = rest[number]
                piece = b"".join((*rest[:number], memoryview(last)[:end]))
                self._opened, self._sure = self._after(piece)
                self._rest = [last[end + 1 :], *rest[number + 1 :]] if self._sure else []
                self._size = sum(map(len, self._rest))
                break
        # Not before there is twice as much is what is left searched again.
        self._due = max(self._step_bytes, 2 * self._size)

    def end(self) -> bool:
        """Whether all of it is known to be JSON text. False: there was no step, or one left it open."""
        if not (self._sure and self._opened):
            return False
        return _is_valid(_before(self._opened) + b"".join(self._rest))

    def _after(self, piece: bytes) -> tuple[bytes, bool]:
        """The brackets that are open after ``piece``, and whether that is sure."""
        opened = self._opened
        before = _before(opened)
        if opened and _is_valid(b"".join((before, piece, _behind(opened)))):
            return opened, True
        still_open = None if b"\\" in piece else _open_after(opened, piece)
        if still_open is None:
            return opened, False
        return still_open, _is_valid(b"".join((before, piece, _behind(still_open))))


def _is_valid(text: bytes) -> bool:
    try:
        check(text)
    except InvalidText:
        return False
    return True


def _before(opened: bytes) -> bytes:
    """JSON text up to a comma, behind which the brackets ``opened`` are open."""
    if not opened:
        return b""
    outer = opened[:-1].replace(b"{", b'{"":')
    return outer + (b'{"":0,' if opened.endswith(b"{") else b"[0,")


def _behind(opened: bytes) -> bytes:
    """JSON text from such a comma on."""
    another = b',"":0' if opened.endswith(b"{") else b",0"
    return another + opened.translate(_CLOSING)[::-1]


def _open_after(opened: bytes, text: bytes) -> bytes | None:
    """The brackets that are open after ``text``, if ``opened`` are before it.

    None if it ends in a string, closes what is not open, or is too deep to be told.
    """
    parts = _marks(text).split(b'"')
    if len(parts) % 2 == 0:
        return None
    left = opened + b"".join(parts[::2])
    for _ in range(_DEEPEST):
        shorter = left.replace(b"[]", b"").replace(b"{}", b"")
        if shorter == left:
            return None if b"]" in left or b"}" in left else left
        left = shorter
    return None


def _marks(text: bytes) -> bytes:
    """The brackets and quotes of a text, in order."""
    found: list[tuple[int, int]] = []
    for mark in _MARKS:  # each search skips what lies between, and in an answer of numbers that is much
        at = text.find(mark)
        while at >= 0:
            if len(found) == _FEW:
                return text.translate(None, _NO_MARKS)
            found.append((at, mark))
            at = text.find(mark, at + 1)
    return bytes(mark for _, mark in sorted(found))


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
        return _decode(text, decoder)
    except msgspec.ValidationError:
        _decode(text, _RAW)  # a wrong type is found before the rest is read: that may be malformed
        raise


def without_half_pairs(text: bytes) -> bytes:
    r"""``text`` with ``\ufffd`` for each half of a surrogate pair; the same bytes if there is none.

    It is the one thing that msgspec refuses and RFC 8259 allows (section 8.2), and what a model writes
    that is cut off in the middle of an emoji.
    """
    if (b"\\ud" not in text and b"\\uD" not in text) or b"\x01" in text:
        return text  # no JSON text holds that character
    # Escaped backslashes are hidden meanwhile: what follows one is no escape.
    hidden = text.replace(b"\\\\", b"\x01\x01")
    # A window at a time: what the engine finds in one is small.
    replaced: list[bytes] = []
    start = 0
    while start < len(hidden):
        between = _BETWEEN_PAIRS.search(hidden, start + _WINDOW)
        end = len(hidden) if between is None else between.start()
        replaced.append(_HALF_A_PAIR.sub(rb"\\ufffd", hidden[start:end]))
        start = end
    return b"".join(replaced).replace(b"\x01\x01", b"\\\\")


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
