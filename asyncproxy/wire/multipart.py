"""The fields of a ``multipart/form-data`` body, without copying its files. RFC 7578. Pure.

A form that two parsers could read in two ways is refused. The gateway has a parser of its own, which
must not find another model in the form than this parser.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from asyncproxy.wire.steps import Steps

__all__ = ["Field", "InvalidForm", "is_form", "parse"]

# Parts of a form, bytes of the head of a part, and bytes of a value that are read.
_MAX_PARTS: Final = 1000
_MAX_HEAD: Final = 8 * 1024
_MAX_VALUE: Final = 4096

# RFC 2046, section 5.1.1, allows 70 characters.
_MAX_BOUNDARY: Final = 200
_MAX_CONTENT_TYPE: Final = 1024

# Bytes that are searched for the next boundary in one step, and parts that are read in one.
_WINDOW: Final = 256 * 1024
_PARTS_AT_ONCE: Final = 64

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_FIELD: Final = re.compile(rb"(%b):[ \t]*+([^\r\n]*+)" % _TOKEN)
# The last quoted value may end with a backslash: browsers do not escape it.
_QUOTED: Final = rb'"(?:((?:[^"\\]|\\.)*+)"|([^"]*\\)"$)'
_PARAMETER: Final = re.compile(
    rb';[ \t]*+(?:(%b)[ \t]*+=[ \t]*+(?:%b|([^";]*+))[ \t]*+)?+' % (_TOKEN, _QUOTED)
)
_KIND: Final = re.compile(rb"[ \t]*+([^; \t]*+)[ \t]*+")
_ESCAPED: Final = re.compile(rb'\\(["\\])')


class InvalidForm(ValueError):
    """The body is not a valid form. The message says why, and quotes none of the body."""


class Field(NamedTuple):
    """A part of a form."""

    name: str
    value: str
    """The first 4,096 bytes of the content, as text."""
    filename: str | None
    """The name of a file. None for a part that is no file."""
    start: int
    """The offset of the part in the body: behind its boundary."""
    content: int
    """The offset of the content."""
    end: int
    """The end of the content: in front of the line with the next boundary."""


def is_form(content_type: str) -> bool:
    """Whether a body of this type is read as a form."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def parse(content_type: str, body: bytes) -> Steps[list[Field]]:
    """The parts of a form, in order. Raises :class:`InvalidForm`."""
    delimiter = b"\r\n--" + _boundary(content_type)
    at = 2 if body.startswith(b"\r\n") else 0
    if not body.startswith(delimiter[2:], at):
        raise InvalidForm("it does not begin with the boundary of its Content-Type")
    at += len(delimiter) - 2
    fields: list[Field] = []
    while not body.startswith(b"--", at):
        if not body.startswith(b"\r\n", at):
            raise InvalidForm(f"the line of a boundary does not end at byte {at}")
        if len(fields) == _MAX_PARTS:
            raise InvalidForm(f"it has more than {_MAX_PARTS} parts")
        name, filename, content = _head(body, at)
        if body.startswith(delimiter[2:], content):
            raise InvalidForm("a part begins with the boundary")
        end = yield from _find(body, delimiter, content)
        value = body[content : min(end, content + _MAX_VALUE)].decode("utf-8", "replace")
        fields.append(Field(name, value, filename, at, content, end))
        at = end + len(delimiter)
        if len(fields) % _PARTS_AT_ONCE == 0:
            yield
    return fields


def _find(body: bytes, delimiter: bytes, start: int) -> Steps[int]:
    for at in range(start, len(body), _WINDOW):
        found = body.find(delimiter, at, at + _WINDOW + len(delimiter) - 1)
        if found >= 0:
            return found
        yield
    raise InvalidForm("it ends before its closing boundary")


def _head(body: bytes, start: int) -> tuple[str, str | None, int]:
    """The name and the filename of the part that begins at ``start``, and the offset of its content."""
    end = body.find(b"\r\n\r\n", start, start + _MAX_HEAD)
    if end < 0:
        raise InvalidForm(f"the head of a part has no end within {_MAX_HEAD} bytes")
    disposition: bytes | None = None
    for line in body[start + 2 : end].split(b"\r\n"):
        field = _FIELD.fullmatch(line)
        if field is None:
            raise InvalidForm(f"a line in the head of the part at byte {start} is no header field")
        if field[1].lower() == b"content-disposition":
            if disposition is not None:
                raise InvalidForm("a part has two names")
            disposition = field[2]
    kind, parameters = _parameters(disposition or b"")
    name, filename = parameters.get(b"name"), parameters.get(b"filename")
    if kind != b"form-data" or name is None:
        raise InvalidForm("a part has no name")
    return (
        name.decode("utf-8", "replace"),
        None if filename is None else filename.decode("utf-8", "replace"),
        end + 4,
    )


def _boundary(content_type: str) -> bytes:
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise InvalidForm("its Content-Type is too long")
    boundary = _parameters(content_type.encode("utf-8", "surrogateescape"))[1].get(b"boundary")
    if not boundary:
        raise InvalidForm("its Content-Type has no boundary")
    if len(boundary) > _MAX_BOUNDARY:
        raise InvalidForm(f"its boundary has more than {_MAX_BOUNDARY} characters")
    return boundary


def _parameters(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """The first word and the parameters of a field like ``form-data; name="a"``.

    ``filename*`` is a parameter like any other: forms have no extended ones (RFC 7578, section 4.2).
    """
    kind = _KIND.match(value)
    assert kind
    at = kind.end()
    parameters: dict[bytes, bytes] = {}
    while at < len(value):
        found = _PARAMETER.match(value, at)
        if found is None:
            raise InvalidForm("the parameters of a header field cannot be read")
        at = found.end()
        if found[1] is None:
            continue
        key = found[1].lower()
        if key in parameters:
            raise InvalidForm("a header field has a parameter twice")
        quoted, cut, bare = found.group(2, 3, 4)
        parameters[key] = (
            bare.rstrip() if bare is not None else _ESCAPED.sub(rb"\1", quoted or cut or b"")
        )
    return kind[1].lower(), parameters
