"""Where the members of a JSON object, or the items of an array, stand in a text. RFC 8259. Pure.

The text is checked on the way, all of it, and no value is built: a body of 32 MiB is walked in steps of
a few milliseconds and in constant memory. Regular expressions take what is nested up to three levels
deep in one piece, as many items at once as a window holds. What is deeper is walked bracket by bracket,
with a stack. All of it is linear: each byte is looked at by four matches at the most.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Generator
from typing import ClassVar, Final, TypeAlias

from asyncproxy.wire.json_text import InvalidText
from asyncproxy.wire.steps import Steps

__all__ = ["NotAnObject", "Span", "members", "spans"]

# Where a member stands: the start and the end of its name, with the quotes, and those of its value.
# An item of an array has an empty name.
Span: TypeAlias = tuple[int, int, int, int]

# How far one match looks, and what the longest number may be (RFC 8259, section 9, leaves that to us).
_WINDOW: Final = 64 * 1024
_LONGEST_NUMBER: Final = 256 * 1024

# Work up to a pause: bytes that were passed, and rounds of the walk, of some µs each.
_PAUSE_BYTES: Final = 64 * 1024
_PAUSE_ROUNDS: Final = 1024

# Open brackets. The json module of Python gives up at about as many.
_DEEPEST: Final = 1000

# Each repetition is possessive (++, *+): otherwise the engine would remember each of its steps.
# A number ends where something else can be seen, for it may go on behind the end of a window.
_SPACE: Final = r"[ \t\r\n]*+"
_PLAIN: Final = r'[^"\\\x00-\x1f]'
_ESCAPE: Final = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_STRING: Final = rf'"{_PLAIN}*+(?:{_ESCAPE}{_PLAIN}*+)*+"'
_NUMBER: Final = r"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+(?=[ \t\r\n,\]}])"
_SCALAR: Final = rf"{_STRING}|{_NUMBER}|true|false|null"
_NAME: Final = rf"{_STRING}{_SPACE}:{_SPACE}"


def _items(value: str) -> str:
    """A pattern for items of an array, each with the comma behind it or in front of the end."""
    return rf"(?:(?:{value}){_SPACE}(?:,{_SPACE}(?=[^\]])|(?=\])))*+"


def _members(value: str) -> str:
    """The same for members of an object."""
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
    """A text that begins as anything but an object. Whether it is JSON at all was not looked at."""


def members(text: bytes) -> Generator[Span | None, None, None]:
    """The members of the object that ``text`` is, in their order. None between them: a pause is due.

    What comes last is no less a part of the text: the members before an error stand for nothing.
    Raises :class:`InvalidText` with the place of what is wrong, and :class:`NotAnObject`.
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
    """The members of the object, or the items of the array, that begins at ``start``, in their order.

    None between them: a pause is due. Returns the end of the container. Raises :class:`InvalidText`,
    with the place of what is wrong; that the text is UTF-8 has to be known.
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


# What comes next in a walk.
_AFTER_VALUE, _FIRST_ITEM, _ITEM, _IN_NAME, _COLON, _VALUE, _IN_VALUE = range(7)


class _Walk:
    """A walk over one container. Its rounds are short: none looks further than some windows."""

    __slots__ = ("_name", "_start", "_state", "_text", "at", "opened")

    def __init__(self, text: bytes, start: int) -> None:
        if text[start : start + 1] not in (b"[", b"{"):
            raise InvalidText(f"no array or object at byte {start}")
        self._text = text
        self.at = start + 1
        self.opened = bytearray(text[start : start + 1])  # the brackets that are open here
        self._state = _FIRST_ITEM
        # Of the member or item that is listed next: where its name stands, and where its value begins.
        self._name = (0, 0)
        self._start = 0

    def round(self) -> Span | None:
        """Pass what comes next. Returns the member or item that it completes, if it is to be listed."""
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
        """At a comma, or at the end of the container."""
        if byte == _COMMA:
            self._state = _ITEM
            self.at += 1
            return None
        if byte not in _CLOSERS:
            raise InvalidText(f"no comma or closing bracket at byte {self.at}")
        opened, at = self.opened, self.at
        closing = _CLOSING_AT(self._text, at, at + _WINDOW)
        assert closing
        # The end of one that is listed, or of all, is a round of its own.
        count = max(1, min(closing.end() - at, len(opened) - 2))
        if opened[-count:].translate(_PARTNER)[::-1] != self._text[at : at + count]:
            raise InvalidText(f"a bracket that closes no other at byte {at}")
        del opened[-count:]
        self.at = at + count
        return self._completed()

    def _first_item(self, byte: int) -> Span | None:
        """At an item, or at the end of the container that was just opened."""
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
        """In a name that is longer than a window, or that is none."""
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
        """At a value that is larger than a window or nested deeply, or behind a name that is long."""
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
        """In a string that is longer than a window, or that is none."""
        if byte != _QUOTE:
            self._take(_IN_STRING_AT, "no character of a string")
            return None
        self.at += 1
        return self._completed()

    # By state.
    _ROUNDS: ClassVar = (_after_value, _first_item, _item, _in_name, _colon, _value, _in_value)
