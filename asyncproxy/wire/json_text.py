"""Checks JSON text (RFC 8259) in one pass over the bytes, without building values. Pure."""

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
# Escapes of surrogates. Each pattern begins with a literal, which the engine searches for fast.
_DIGITS: Final = rb"[0-9a-fA-F][0-9a-fA-F]"
_HIGH: Final = rb"\\u[dD][89abAB]" + _DIGITS
_LOW: Final = rb"\\u[dD][c-fC-F]" + _DIGITS
# Half a surrogate pair: a high one with no low one after it, or a low one with no high one before.
_HALF_A_PAIR: Final = re.compile(
    rb"\\u[dD](?:[89abAB]%b(?!%b)|(?<!%b\\u[dD])[c-fC-F]%b)" % (_DIGITS, _LOW, _HIGH, _DIGITS)
)
# The start of an escape that is not the second of a pair.
_BETWEEN_PAIRS: Final = re.compile(rb"\\(?:(?<!%b\\)|(?!%b))" % (_HIGH, _LOW.removeprefix(b"\\\\")))
_WINDOW: Final = 64 * 1024


class InvalidText(ValueError):
    """The text is not JSON. The message says where and why, and quotes none of the text."""


def check(text: bytes) -> None:
    """Raise :class:`InvalidText` unless ``text`` is one JSON value in UTF-8."""
    parse(text, _RAW)


class Arriving:
    """Checks JSON text while it arrives, in steps of about ``step_bytes``.

    A step ends at the last comma so far. The slice between the ends of two steps is checked alone:
    prefixed with the brackets that are open at its start, and followed by the brackets that close those
    open at its end. Usually the same brackets are open at both, so that case is tried first. Some
    slices cannot be decided so: the comma is in a string, or brackets change in a slice with escapes.
    Then the whole text is left to :func:`check`, which also gives the reason for an error.
    """

    def __init__(self, step_bytes: int) -> None:
        self._step_bytes = self._due = step_bytes
        self._opened = b""  # the brackets that are open where the rest begins
        self._rest: list[bytes] = []
        self._size = 0
        self._sure = True

    def add(self, piece: bytes) -> bool:
        """Add the next piece. Returns whether there is enough text for a :meth:`step`."""
        if self._sure:
            self._rest.append(piece)
            self._size += len(piece)
        return self._size >= self._due

    def step(self) -> None:
        """Check the text so far, up to its last comma."""
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
        # The rest is searched again only when it has doubled: otherwise the search would be quadratic.
        self._due = max(self._step_bytes, 2 * self._size)

    def end(self) -> bool:
        """Whether the whole text is known to be JSON. False: no step was made, or one was undecided."""
        if not (self._sure and self._opened):
            return False
        return _is_valid(_before(self._opened) + b"".join(self._rest))

    def _after(self, piece: bytes) -> tuple[bytes, bool]:
        """The brackets that are open after ``piece``, and whether ``piece`` is known to be valid."""
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
    """The beginning of a JSON text, up to a comma behind which the brackets ``opened`` are open."""
    if not opened:
        return b""
    outer = opened[:-1].replace(b"{", b'{"":')
    return outer + (b'{"":0,' if opened.endswith(b"{") else b"[0,")


def _behind(opened: bytes) -> bytes:
    """The end of a JSON text, from such a comma on."""
    another = b',"":0' if opened.endswith(b"{") else b",0"
    return another + opened.translate(_CLOSING)[::-1]


def _open_after(opened: bytes, text: bytes) -> bytes | None:
    """The brackets that are open after ``text``, if ``opened`` are open before it.

    None if the text ends in a string, closes a bracket that is not open, or is nested too deeply.
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
    for mark in _MARKS:  # find() skips the text between two marks: most of a response of numbers
        at = text.find(mark)
        while at >= 0:
            if len(found) == _FEW:
                return text.translate(None, _NO_MARKS)
            found.append((at, mark))
            at = text.find(mark, at + 1)
    return bytes(mark for _, mark in sorted(found))


def parse(text: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode ``text`` by ``decoder``.

    Raises :class:`InvalidText`, or :class:`msgspec.ValidationError` if the text is JSON but not of the
    decoder's type.
    """
    if not text.isascii():  # msgspec does not check the strings that it skips
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise InvalidText(f"invalid UTF-8 at byte {error.start}") from None
    try:
        return _decode(text, decoder)
    except msgspec.ValidationError:
        _decode(text, _RAW)  # msgspec stops at a wrong type, and the rest may be malformed
        raise


def without_half_pairs(text: bytes) -> bytes:
    r"""``text`` with ``\ufffd`` for each half of a surrogate pair. The same bytes if there is none.

    RFC 8259 allows half a pair (section 8.2), and msgspec refuses it. A model writes half a pair when
    its output is cut off in the middle of an emoji.
    """
    if (b"\\ud" not in text and b"\\uD" not in text) or b"\x01" in text:
        return text  # the byte 01 is never in a JSON text
    # Escaped backslashes are hidden meanwhile: the text after one is no escape.
    hidden = text.replace(b"\\\\", b"\x01\x01")
    # One window at a time, so that the matches of one search stay few.
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
