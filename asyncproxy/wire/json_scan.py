"""Finds the members of a JSON object, or the items of an array, in a text. RFC 8259. Pure.

The scan checks the whole text and builds no values: a body of 32 MiB is scanned in steps of a few
milliseconds and in constant memory. Regular expressions match values that are nested up to three levels
deep, as many at once as a window holds. Deeper values are walked bracket by bracket, with a stack. The
scan is linear: at most four matches look at each byte.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Generator
from typing import ClassVar, Final, TypeAlias

from asyncproxy.wire.json_text import InvalidText
from asyncproxy.wire.steps import Steps

__all__ = ["NotAnObject", "Span", "members", "spans"]

# The place of a member: start and end of its name, with the quotes, then start and end of its value.
# The name of an array's item is empty.
Span: TypeAlias = tuple[int, int, int, int]

# Bytes that one match looks at, and bytes of the longest number (RFC 8259, section 9 allows a limit).
_WINDOW: Final = 64 * 1024
_LONGEST_NUMBER: Final = 256 * 1024

# Work between two pauses: bytes that were scanned, and rounds of the walk, of some µs each.
_PAUSE_BYTES: Final = 64 * 1024
_PAUSE_ROUNDS: Final = 1024

# The highest number of open brackets. The json module of Python has about the same limit.
_DEEPEST: Final = 1000

# Each repetition is possessive (++, *+): otherwise the engine would store each step for backtracking.
# A number has to be followed by another character, because it may go on behind the end of a window.
_SPACE: Final = r"[ \t\r\n]*+"
_PLAIN: Final = r'[^"\\\x00-\x1f]'
_ESCAPE: Final = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_STRING: Final = rf'"{_PLAIN}*+(?:{_ESCAPE}{_PLAIN}*+)*+"'
_NUMBER: Final = r"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+(?=[ \t\r\n,\]}])"
_SCALAR: Final = rf"{_STRING}|{_NUMBER}|true|false|null"
_NAME: Final = rf"{_STRING}{_SPACE}:{_SPACE}"


def _items(value: str) -> str:
    """A pattern for items of an array. Each item is followed by a comma or by the closing bracket."""
    return rf"(?:(?:{value}){_SPACE}(?:,{_SPACE}(?=[^\]])|(?=\])))*+"


def _members(value: str) -> str:
    """A pattern for members of an object. Each is followed by a comma or by the closing bracket."""
    return rf'(?:{_NAME}(?:{value}){_SPACE}(?:,{_SPACE}(?=")|(?=\}})))*+'


def _holding(value: str) -> str:
    """A pattern for ``value``, or an array or object that holds such values."""
    return rf"{value}|\[{_SPACE}{_items(value)}\]|\{{{_SPACE}{_members(value)}\}}"


_ANY: Final = _holding(_holding(_holding(_SCALAR)))


_Match: TypeAlias = Callable[[bytes, int, int], re.Match[bytes] | None]


def _compiled(pattern: str) -> re.Pattern[bytes]:
    return re.compile(pattern.encode())


_ITEMS_AT: Final = _compiled(_items(_ANY)).match
_MEMBERS_AT: Final = _compiled(_members(_ANY)).match
_VALUE_AT: Final = _compiled(_ANY).match
_SCALAR_AT: Final = _compiled(_SCALAR).match
_MEMBER_AT: Final = _compiled(rf"({_STRING}){_SPACE}:{_SPACE}({_ANY})?+").match
_NAME_AT: Final = _compiled(_NAME).match
_STRING_AT: Final = _compiled(_STRING).match
_IN_STRING_AT: Final = _compiled(rf"(?:{_PLAIN}++|{_ESCAPE})*+").match
_SPACE_AT: Final = _compiled(_SPACE).match
_OPENING_AT: Final = _compiled(r"(?:\[[ \t\r\n]*+)*+\{?+").match
_CLOSING_AT: Final = _compiled(r"[\]}]++").match
_SPACES: Final = b" \t\r\n"

_PARTNER: Final = bytes.maketrans(b"[{", b"]}")
_OBJECT, _QUOTE, _COMMA, _COLON_BYTE = b'{",:'
_LAST_SPACE: Final = ord(" ")
_CLOSERS: Final = b"]}"


class NotAnObject(ValueError):
    """A text that does not begin with an object. The text may or may not be JSON."""


def members(text: bytes) -> Generator[Span | None, None, None]:
    """Yields the members of the JSON object ``text``, in order, and None where a pause is due.

    Only a scan that ends without an error shows that the text is JSON, whatever was yielded before.
    Raises :class:`InvalidText` with the place of the error, and :class:`NotAnObject`.
    """
    yield from _check_utf8(text)
    start = yield from _skip_space(text, 0)
    if start == len(text):
        raise InvalidText("it is empty")
    if text[start] != _OBJECT:
        raise NotAnObject
    end = yield from spans(text, start)
    end = yield from _skip_space(text, end)
    if end < len(text):
        raise InvalidText(f"something follows the object at byte {end}")


def _check_utf8(text: bytes) -> Steps[None]:
    if text.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _PAUSE_BYTES):
        waiting = len(decoder.getstate()[0])
        try:
            decoder.decode(text[start : start + _PAUSE_BYTES], final=start + _PAUSE_BYTES >= len(text))
        except UnicodeDecodeError as error:
            raise InvalidText(f"invalid UTF-8 at byte {start - waiting + error.start}") from None
        yield


def spans(text: bytes, start: int = 0) -> Generator[Span | None, None, int]:
    """Yields the members or items of the object or array at ``start``, and None where a pause is due.

    Returns the end of the object or array. ``text`` has to be UTF-8. Raises :class:`InvalidText` with
    the place of the error.
    """
    walk = _Walk(text, start)
    rounds, pause_at = 0, start + _PAUSE_BYTES
    while walk.opened:
        rounds += 1
        if rounds >= _PAUSE_ROUNDS or walk.at >= pause_at:
            rounds, pause_at = 0, walk.at + _PAUSE_BYTES
            yield None
        span = walk.round()
        if span is not None:
            yield span
    return walk.at


def _skip_space(text: bytes, at: int) -> Steps[int]:
    while (space := _SPACE_AT(text, at, at + _WINDOW)) and space.end() > at:
        at = space.end()
        yield
    return at


# The states of a walk: what comes next.
_AFTER_VALUE, _FIRST_ITEM, _ITEM, _IN_NAME, _COLON, _VALUE, _IN_VALUE = range(7)


class _Walk:
    """A walk over one object or array. Each round is short: it looks at a few windows at most."""

    __slots__ = ("_name", "_start", "_state", "_text", "at", "opened")

    def __init__(self, text: bytes, start: int) -> None:
        if text[start : start + 1] not in (b"[", b"{"):
            raise InvalidText(f"no array or object at byte {start}")
        self._text = text
        self.at = start + 1
        self.opened = bytearray(text[start : start + 1])  # the brackets that are open here
        self._state = _FIRST_ITEM
        # The next member or item to yield: the place of its name, and the start of its value.
        self._name = (0, 0)
        self._start = 0

    def round(self) -> Span | None:
        """Scan the next piece. Returns the member or item that ends here, if it is to be yielded."""
        if self.at >= len(self._text):
            raise InvalidText("it ends too early")
        byte = self._text[self.at]
        if byte <= _LAST_SPACE and self._state is not _IN_NAME and self._state is not _IN_VALUE:
            self._take(_SPACE_AT, "an unexpected character")
            return None
        return self._ROUNDS[self._state](self, byte)

    def _take(self, match: _Match, error: str) -> None:
        found = match(self._text, self.at, self.at + _WINDOW)
        if found is None or found.end() == self.at:
            raise InvalidText(f"{error} at byte {self.at}")
        self.at = found.end()

    def _completed(self) -> Span | None:
        """A value ends here."""
        self._state = _AFTER_VALUE
        return (*self._name, self._start, self.at) if len(self.opened) == 1 else None

    def _after_value(self, byte: int) -> Span | None:
        """At a comma, or at the closing bracket."""
        if byte == _COMMA:
            self._state = _ITEM
            self.at += 1
            return None
        if byte not in _CLOSERS:
            raise InvalidText(f"no comma or closing bracket at byte {self.at}")
        opened, at = self.opened, self.at
        closing = _CLOSING_AT(self._text, at, at + _WINDOW)
        assert closing
        # The bracket that ends a yielded value, or the whole object, gets a round of its own.
        count = max(1, min(closing.end() - at, len(opened) - 2))
        if opened[-count:].translate(_PARTNER)[::-1] != self._text[at : at + count]:
            raise InvalidText(f"a bracket that closes no other at byte {at}")
        del opened[-count:]
        self.at = at + count
        return self._completed()

    def _first_item(self, byte: int) -> Span | None:
        """Behind an opening bracket: at an item, or at the closing bracket."""
        if byte in _CLOSERS:
            return self._after_value(byte)
        return self._item(byte)

    def _item(self, byte: int) -> Span | None:
        """At an item of an array, or at the name of a member."""
        of_object = self.opened[-1] == _OBJECT
        if of_object and byte != _QUOTE:
            raise InvalidText(f"no name in quotes at byte {self.at}")
        if len(self.opened) == 1:
            return self._listed_member() if of_object else self._listed_item(byte)
        run = (_MEMBERS_AT if of_object else _ITEMS_AT)(self._text, self.at, self.at + _WINDOW)
        if run and run.end() > self.at:
            self.at = run.end()
            self._state = _AFTER_VALUE if self._text[self.at] in _CLOSERS else _ITEM
            return None
        if not of_object:
            return self._value(byte)
        if name := _NAME_AT(self._text, self.at, self.at + _WINDOW):
            self.at = name.end()
            self._state = _VALUE
        else:
            self.at += 1
            self._state = _IN_NAME
        return None

    def _listed_member(self) -> Span | None:
        at = self.at
        member = _MEMBER_AT(self._text, at, at + _WINDOW)
        if member is None:
            self._name = (at, at)
            self.at += 1
            self._state = _IN_NAME
            return None
        self._name, self._start, self.at = member.span(1), member.start(2), member.end()
        if self._start >= 0:
            return self._completed()
        self._state = _VALUE
        return None

    def _listed_item(self, byte: int) -> Span | None:
        self._name, self._start = (self.at, self.at), self.at
        if value := _VALUE_AT(self._text, self.at, self.at + _WINDOW):
            self.at = value.end()
            return self._completed()
        return self._value(byte)

    def _in_name(self, byte: int) -> Span | None:
        """In a name that is longer than a window, or malformed."""
        if byte != _QUOTE:
            self._take(_IN_STRING_AT, "no character of a string")
            return None
        self.at += 1
        if len(self.opened) == 1:
            self._name = (self._name[0], self.at)
        self._state = _COLON
        return None

    def _colon(self, byte: int) -> Span | None:
        if byte != _COLON_BYTE:
            raise InvalidText(f"no colon at byte {self.at}")
        self.at += 1
        self._state = _VALUE
        return None

    def _value(self, byte: int) -> Span | None:
        """At a value that is larger than a window or deeply nested, or that follows a long name."""
        if len(self.opened) == 1:
            self._start = self.at
        if byte in b"[{":
            opening = _OPENING_AT(self._text, self.at, self.at + _WINDOW)
            assert opening
            self.opened += opening[0].translate(None, _SPACES)
            if len(self.opened) > _DEEPEST:
                raise InvalidText("nested too deeply")
            self.at = opening.end()
            self._state = _FIRST_ITEM
            return None
        if scalar := _SCALAR_AT(self._text, self.at, self.at + _LONGEST_NUMBER):
            self.at = scalar.end()
            return self._completed()
        if byte != _QUOTE:
            raise InvalidText(f"no value at byte {self.at}")
        self.at += 1
        self._state = _IN_VALUE
        return None

    def _in_value(self, byte: int) -> Span | None:
        """In a string that is longer than a window, or malformed."""
        if byte != _QUOTE:
            self._take(_IN_STRING_AT, "no character of a string")
            return None
        self.at += 1
        return self._completed()

    # By state.
    _ROUNDS: ClassVar = (_after_value, _first_item, _item, _in_name, _colon, _value, _in_value)
