"""Finds the proxy's own fields in a JSON body, and changes one without touching other bytes. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from asyncproxy.wire import json_scan, json_text, multipart
from asyncproxy.wire.json_scan import Span
from asyncproxy.wire.steps import Steps

__all__ = [
    "BYTE_ORDER_MARK",
    "MAX_TEXT_BYTES",
    "ONCE",
    "Place",
    "Repeated",
    "find",
    "model_of",
    "text_at",
    "with_model",
    "without_model_prefix",
]

# Fields that a body must not have twice, and one more that is looked for.
ONCE: Final = ("model", "input", "stream", "stream_format", "fallbacks")
_NAMES: Final = {f'"{name}"'.encode(): name for name in (*ONCE, "messages")}

# Each letter of a name may be an escape of six bytes.
_LONGEST_NAME: Final = 6 * max(map(len, _NAMES))

# Bytes of the longest string that is read: 512 characters, each of up to two escapes of six bytes.
MAX_TEXT_BYTES: Final = 12 * 512 + 2

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"

_QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")


class _Model(msgspec.Struct, gc=False):
    model: str | None = None


_TEXT: Final = msgspec.json.Decoder(str)
_MODEL: Final = msgspec.json.Decoder(_Model)


class Repeated(ValueError):
    """A body has the field ``name`` twice."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Place(NamedTuple):
    """The place of a field in a body, as offsets: start and end."""

    value: tuple[int, int]
    """The value."""
    member: tuple[int, int]
    """The bytes to cut to remove the field, with the comma before it (after it, for the first)."""


def find(body: bytes) -> Steps[dict[str, Place]]:
    """The proxy's own fields among the members of the object ``body``. Nested objects do not count.

    Raises :class:`InvalidText`, :class:`NotAnObject`, and :class:`Repeated`. Of two equal names, each
    parser may take either (RFC 8259, section 4). Then the upstream could read another model than the
    proxy routes by, or a ``stream`` that the proxy has not seen.
    """
    found: dict[str, Place] = {}
    last_end = 0  # of the member before; 0 for the first
    first: str | None = None  # the name of the first member, until the second
    for span in json_scan.members(body):
        if span is None:
            yield
            continue
        name_start, _, start, end = span
        if first is not None:
            value, (cut, _) = found[first]
            found[first] = Place(value, (cut, name_start))
            first = None
        name = _name(body, span)
        if name is not None:
            if name in found and name in ONCE:
                raise Repeated(name)
            found[name] = Place((start, end), (last_end or name_start, end))
            first = None if last_end else name
        last_end = end
    return found


def _name(body: bytes, span: Span) -> str | None:
    """The proxy's own field that a member is, also if its name is written with escapes."""
    start, end = span[:2]
    if end - start > _LONGEST_NAME:
        return None
    name = body[start:end]
    if _BACKSLASH in name:
        name = f'"{json_text.parse(name, _TEXT)}"'.encode()
    return _NAMES.get(name)


def text_at(body: bytes, start: int, end: int) -> str | None:
    """The string between two offsets. None if there is another value, or a longer string."""
    if body[start] != _QUOTE or end - start > MAX_TEXT_BYTES:
        return None
    return json_text.parse(body[start:end], _TEXT)


def model_of(body: bytes) -> str | None:
    """The model that a small JSON body names. None if the body is malformed or names none."""
    try:
        return json_text.parse(body.removeprefix(BYTE_ORDER_MARK), _MODEL).model
    except (json_text.InvalidText, msgspec.ValidationError):
        return None


def with_model(body: bytes, model: str) -> Steps[bytes]:
    """A checked JSON body with another model. All other bytes stay."""
    start, end = yield from _model_in(body)
    return b"".join((body[:start], msgspec.json.encode(model), body[end:]))


def without_model_prefix(content_type: str, body: bytes, prefix: str) -> Steps[bytes]:
    """A checked body with ``prefix`` removed from its model. All other bytes stay.

    The same body if the model does not begin with the prefix, or is the prefix alone.
    """
    if multipart.is_form(content_type):
        for part in (yield from multipart.parse(content_type, body)):
            if part.name == "model" and part.value.startswith(prefix) and part.value != prefix:
                return body[: part.content] + body[part.content + len(prefix.encode()) :]
        return body
    try:
        start, end = yield from _model_in(body)
    except json_text.InvalidText:  # nested too deeply for the scan: send the body as it was accepted
        return body
    model = text_at(body, start, end)
    if model is None or model == prefix or not model.startswith(prefix):
        return body
    return b"".join((body[:start], msgspec.json.encode(model.removeprefix(prefix)), body[end:]))


def _model_in(body: bytes) -> Steps[tuple[int, int]]:
    for span in json_scan.members(body):
        if span is None:
            yield
        elif _name(body, span) == "model":
            return span[2:]
    raise json_text.InvalidText("it names no model")
