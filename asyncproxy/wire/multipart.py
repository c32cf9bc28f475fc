"""The fields of a ``multipart/form-data`` body, without copying its files. Pure. RFC 7578."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

__all__ = ["Field", "InvalidForm", "contents", "parse"]

# Parts of a form, and the length of a value that is looked at.
_MAX_PARTS = 1000
_MAX_VALUE = 4096


class InvalidForm(ValueError):
    """Not a form. The message says what is wrong, and holds none of it."""


class Field(NamedTuple):
    """A part: its name, and its value as far as it is short text. A file has a ``filename``."""

    name: str
    value: str
    filename: str | None


def parse(content_type: str, body: bytes) -> list[Field]:
    """The parts of a form, in order. Raises :class:`InvalidForm`."""
    boundary = _boundary(content_type)
    if not boundary:
        raise InvalidForm("its Content-Type has no boundary")
    reader = _Reader()
    parser = MultipartParser(boundary, reader.callbacks())
    try:
        parser.write(body)
    except FormParserError as error:
        raise InvalidForm(f"it cannot be read at byte {getattr(error, 'offset', 0)}") from None
    if not reader.ended:
        raise InvalidForm("it ends before its closing boundary")
    return reader.fields


def contents(content_type: str, body: bytes) -> list[bytes]:
    """What stands between the boundaries: the same for equal forms, whose boundaries are random."""
    boundary = _boundary(content_type)
    return body.split(b"--" + boundary) if boundary else [body]


def _boundary(content_type: str) -> bytes | None:
    try:
        return parse_options_header(content_type)[1].get(b"boundary")
    except UnicodeError:
        return None


class _Reader:
    """Gathers the headers and the short values of the parts."""

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self.ended = False
        self._name = b""
        self._header = b""
        self._disposition = b""
        self._value = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_header_field": self._on_field,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_end": self._on_end,
        }

    def _begin(self) -> None:
        self._disposition = self._name = self._header = b""
        self._value.clear()

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._header
        self._name = self._header = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        room = _MAX_VALUE - len(self._value)
        if room > 0:
            self._value += data[start : min(end, start + room)]

    def _end(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if kind != b"form-data" or name is None:
            raise InvalidForm("a part has no name")
        if len(self.fields) == _MAX_PARTS:
            raise InvalidForm(f"it has more than {_MAX_PARTS} parts")
        filename = options.get(b"filename")
        self.fields.append(
            Field(
                name.decode("utf-8", "replace"),
                self._value.decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
            )
        )

    def _on_end(self) -> None:
        self.ended = True
