"""Checks a request body and reads the proxy's own fields from it. Pure: no other value is decoded.

The wire contract, section 2: the check covers what the proxy needs to run the job, and what could never
succeed. The upstream judges the rest.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.errors import (
    ApiError,
    InvalidForm,
    InvalidJson,
    InvalidType,
    MissingParameter,
    StreamingNotSupported,
    UnsupportedMediaType,
)
from asyncproxy.wire import body_fields, content_coding, json_text, multipart
from asyncproxy.wire.json_scan import NotAnObject
from asyncproxy.wire.steps import Steps, at_once

__all__ = [
    "Submission",
    "check",
    "check_in_steps",
    "check_small",
    "codings",
    "count_inputs",
]

_UNSET: Final = msgspec.UNSET


class Submission(msgspec.Struct, frozen=True, gc=False):
    """A checked request body."""

    model: str
    body: bytes
    """The body that goes upstream."""
    fallbacks: tuple[str, ...] | None = None
    """The models to try after ``model``, in order. None: the body has no ``fallbacks``."""
    contents: tuple[tuple[int, int], ...] = ()
    """The offsets of the parts of a form. They identify the request, since its boundary is random."""


class _Fields(msgspec.Struct, gc=False):
    """The proxy's own fields of a body. ``Raw`` is the JSON text of a value, or its beginning."""

    model: str | msgspec.UnsetType = _UNSET
    input: msgspec.Raw | msgspec.UnsetType = _UNSET
    messages: msgspec.Raw | msgspec.UnsetType = _UNSET
    stream: bool | msgspec.UnsetType | None = _UNSET
    stream_format: str | msgspec.UnsetType | None = _UNSET
    fallbacks: msgspec.Raw | msgspec.UnsetType = _UNSET


_FIELDS: Final = msgspec.json.Decoder(_Fields)
_TEXTS: Final = msgspec.json.Decoder(list[str])


class _Input(msgspec.Struct):
    input: msgspec.Raw


_INPUT: Final = msgspec.json.Decoder(_Input)
_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])
# Inputs are counted in bodies up to this size. Counting takes at most a millisecond.
_COUNTED_BYTES: Final = 64 * 1024

_ONE_NAME: Final = re.compile(b'"(?:%b)"' % "|".join(body_fields.ONCE).encode())
_BACKSLASH: Final = ord("\\")  # `int in bytes` takes a quarter of the time of `bytes in bytes`
_ESCAPED_LETTER: Final = re.compile(rb"\\u00[567]")

# A body up to this size is decoded in one step, which takes at most 3 ms.
_SMALL: Final = 256 * 1024

# Characters of a model name. The name is stored, compared and logged apart from the body.
_MAX_MODEL: Final = 512

# The highest number of fallback models, and the bytes of their list.
_MAX_FALLBACKS: Final = 10
_MAX_FALLBACKS_BYTES: Final = 2 * _MAX_FALLBACKS * body_fields.MAX_TEXT_BYTES

_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})
_LONGEST_EMPTY: Final = 4


def codings(content_encoding: str | None) -> tuple[str, ...]:
    """The content codings of a body, in the order in which they were applied.

    Raises :class:`UnsupportedMediaType` for a coding that is not supported.
    """
    if not content_encoding:
        return ()
    found = content_coding.codings_of(content_encoding)
    if found is None:
        known = ", ".join(content_coding.CODINGS)
        raise UnsupportedMediaType(
            f"This Content-Encoding cannot be undone here. Leave it out, or use one of: {known}.",
            headers=(("Accept-Encoding", known),),  # RFC 9110, section 15.5.16
        )
    return found


def check(endpoint: Endpoint, content_type: str, body: bytes) -> Submission:
    """Check a request body in one step.

    Raises :class:`InvalidJson`, :class:`InvalidForm`, :class:`InvalidType`,
    :class:`MissingParameter` or :class:`StreamingNotSupported`, with the offending field as
    ``param``.
    """
    quick = check_small(endpoint, content_type, body)
    return at_once(check_in_steps(endpoint, content_type, body)) if quick is None else quick


def check_small(endpoint: Endpoint, content_type: str, body: bytes) -> Submission | None:
    """Check an ordinary small JSON body. None for any other body: see :func:`check_in_steps`.

    Raises as :func:`check`.
    """
    if len(body) > _SMALL or content_type[:9].lower() == "multipart":
        return None
    try:
        if not body.isascii():
            body.decode()  # msgspec does not check the strings that it skips
        fields = _FIELDS.decode(body)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None  # the body may still be JSON
    if fields.fallbacks is not _UNSET:
        return None
    # Two equal names are found by their text, unless a letter of a name is escaped.
    if _BACKSLASH in body and _ESCAPED_LETTER.search(body) is not None:
        return None
    names = _ONE_NAME.findall(body)
    if len(set(names)) != len(names):
        return None
    return Submission(_checked(endpoint, fields), body)


def check_in_steps(endpoint: Endpoint, content_type: str, body: bytes) -> Steps[Submission]:
    """The same as :func:`check`, in steps of some milliseconds, for a body of any size."""
    if multipart.is_form(content_type):
        return _check_form(endpoint, content_type, body)
    return _check_json(endpoint, body)


def _checked(endpoint: Endpoint, fields: _Fields) -> str:
    """The model, if ``endpoint`` accepts ``fields``. Raises as :func:`check`."""
    model = fields.model
    if not isinstance(model, str) or not 0 < len(model) <= _MAX_MODEL:
        raise _wrong_model(model)
    for name in endpoint.needs_one_of:
        if not _is_empty(getattr(fields, name)):
            break
    else:
        if endpoint.needs_one_of:
            name = endpoint.needs_one_of[0]
            raise MissingParameter(f"`{name}` is required, and must not be empty.", param=name)
    if endpoint.streams:
        if fields.stream is True:
            raise _no_stream(endpoint, "stream")
        if fields.stream_format == "sse":
            raise _no_stream(endpoint, "stream_format")
    return model


def _check_json(endpoint: Endpoint, body: bytes) -> Steps[Submission]:
    body = body.removeprefix(body_fields.BYTE_ORDER_MARK)  # not to be sent: RFC 8259, 8.1
    try:
        found = yield from _found(body)
    except json_text.InvalidText as error:
        raise InvalidJson(f"The body is not valid JSON: {error}.") from None
    fields = _Fields()
    for name in ("input", "messages"):
        if name in found:
            start, end = found[name].value
            setattr(fields, name, msgspec.Raw(body[start : min(end, start + _LONGEST_EMPTY + 1)]))
    if "model" in found:
        fields.model = _model(body, *found["model"].value)
    if "stream" in found:
        start, end = found["stream"].value
        fields.stream = end - start == 4 and body[start:end] == b"true"
    if "stream_format" in found:
        fields.stream_format = body_fields.text_at(body, *found["stream_format"].value)
    model = _checked(endpoint, fields)
    if "fallbacks" not in found:
        return Submission(model, body)
    fallbacks = _fallbacks(body, *found["fallbacks"].value)
    start, end = found["fallbacks"].member
    return Submission(model, body[:start] + body[end:], fallbacks)


def _found(body: bytes) -> Steps[dict[str, body_fields.Place]]:
    try:
        return (yield from body_fields.find(body))
    except body_fields.Repeated as error:
        name = error.name
        raise InvalidJson(f"The body has `{name}` twice. Send it once.", param=name) from None
    except NotAnObject:
        if len(body) <= _SMALL:
            json_text.check(body)  # a body that is no JSON gets the error that says so
        raise InvalidType("The body is JSON, but not an object. Send an object.") from None


def _model(body: bytes, start: int, end: int) -> str | msgspec.UnsetType:
    if (model := body_fields.text_at(body, start, end)) is not None:
        return model
    if body[start : start + 1] == b'"':
        raise _too_long_model()
    if end - start == 4 and body[start:end] == b"null":
        return _UNSET
    raise InvalidType("`model` must be a string.", param="model")


def _check_form(endpoint: Endpoint, content_type: str, body: bytes) -> Steps[Submission]:
    try:
        parts = yield from multipart.parse(content_type, body)
    except multipart.InvalidForm as error:
        raise InvalidForm(f"The body is not a valid form: {error}.") from None
    values: dict[str, str] = {}
    for part in parts:
        name = part.name.removesuffix("[]")  # clients send several images as `image[]`
        if name in ("model", "stream", "stream_format") and name in values:
            raise InvalidForm(f"The form has `{name}` twice. Send it once.", param=name)
        values[name] = part.value
    model = values.get("model", "")
    if not 0 < len(model) <= _MAX_MODEL:
        raise _wrong_model(model)
    for name in endpoint.parts:
        if name not in values:
            raise MissingParameter(f"The form needs a `{name}`.", param=name)
    if endpoint.streams:
        if values.get("stream", "").strip().lower() in ("true", "1"):
            raise _no_stream(endpoint, "stream")
        if values.get("stream_format") == "sse":
            raise _no_stream(endpoint, "stream_format")
    return Submission(model, body, contents=tuple((part.start, part.end) for part in parts))


def _wrong_model(model: str | msgspec.UnsetType) -> ApiError:
    """The error for a ``model`` that is missing, empty or too long."""
    if isinstance(model, str) and model:
        return _too_long_model()
    return MissingParameter("`model` is required: a non-empty string.", param="model")


def _too_long_model() -> ApiError:
    return InvalidType(f"A model has {_MAX_MODEL} characters at the most.", param="model")


def _no_stream(endpoint: Endpoint, param: str) -> StreamingNotSupported:
    instead = "Leave `stream` out" if param == "stream" else 'Send `stream_format: "audio"`'
    return StreamingNotSupported(
        f"A stream has no async form. {instead}, or use {endpoint.sync_path}.", param=param
    )


def _fallbacks(body: bytes, start: int, end: int) -> tuple[str, ...]:
    if end - start > _MAX_FALLBACKS_BYTES:
        raise InvalidType("`fallbacks` is too long.", param="fallbacks")
    try:
        models = json_text.parse(body[start:end], _TEXTS)
    except msgspec.ValidationError:
        models = [""]
    if not all(0 < len(model) <= _MAX_MODEL for model in models):
        raise InvalidType("`fallbacks` must be a list of model names.", param="fallbacks")
    if len(models) > _MAX_FALLBACKS:
        raise InvalidType(f"`fallbacks` takes {_MAX_FALLBACKS} models at most.", param="fallbacks")
    return tuple(models)


def count_inputs(endpoint: str, body: bytes) -> int | None:
    """How many inputs an embeddings request has. None for other endpoints and for large bodies."""
    if endpoint != "embeddings" or len(body) > _COUNTED_BYTES:
        return None
    try:
        given = bytes(_INPUT.decode(body).input)
        items = _ITEMS.decode(given) if given.startswith(b"[") else []
    except msgspec.DecodeError:
        return None
    is_one = not items or bytes(items[0])[:1].isdigit()  # a text, or the tokens of one
    return 1 if is_one else len(items)


def _is_empty(value: msgspec.Raw | msgspec.UnsetType) -> bool:
    return value is _UNSET or (len(value) <= _LONGEST_EMPTY and bytes(value) in _EMPTY)
