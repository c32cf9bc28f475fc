"""A request becomes the parts of a job, or an error. Pure: one pass over the bytes.

The wire contract, section 2: what is checked here is what we need to run the job and what could never
succeed. The upstream is the judge of the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

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
from asyncproxy.wire import json_text, multipart

__all__ = [
    "Submission",
    "check",
    "check_content_type",
    "count_inputs",
    "model_of",
    "with_model",
]


class Submission(msgspec.Struct, frozen=True, gc=False):
    """What a request asks for: ``model``, then each of ``fallbacks``; ``body`` is what is sent."""

    model: str
    body: bytes
    fallbacks: tuple[str, ...] | None = None


class _Fields(msgspec.Struct):
    model: Any = msgspec.UNSET
    input: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    stream: Any = msgspec.UNSET
    stream_format: Any = msgspec.UNSET
    fallbacks: Any = msgspec.UNSET


_FIELDS: Final = msgspec.json.Decoder(_Fields)


class _Input(msgspec.Struct):
    input: msgspec.Raw


_INPUT: Final = msgspec.json.Decoder(_Input)
_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])
# Inputs are counted in bodies up to this size. It takes a millisecond at the most.
_COUNTED_BYTES: Final = 64 * 1024
_OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_QUOTED_NAMES: Final = tuple((name, f'"{name}"'.encode()) for name in _Fields.__struct_fields__)
_ANY_NAME: Final = re.compile(b'"(?:%b)"' % "|".join(_Fields.__struct_fields__).encode())
# Bytes in which all names may be found at once: what is found in them is not much.
_SHORT: Final = 16 * 1024
_BACKSLASH: Final = ord("\\")  # an int is looked for in a quarter of the time that bytes take
_ESCAPED_LETTER: Final = re.compile(rb"\\u00[567]")
_MARKS: Final = b"\x01\x02\x03\x04\x05"
_BETWEEN_MARKS: Final = re.compile(rb"([^\x01-\x05]*)([\x01-\x05])")
# Possessive: the engine would remember each character otherwise, to come back to it.
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_LEAF: Final = re.compile(rb"\{[^{}\[\]]*\}|\[[^{}\[\]]*\]")
_NO_SKELETON: Final = bytes(set(range(256)) - set(b"{}[]" + _MARKS))

# Characters of a model name: it is kept, compared and logged apart from the body.
_MAX_MODEL: Final = 512

# Models tried after the first, at the most.
_MAX_FALLBACKS: Final = 10

_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})


def check(endpoint: Endpoint, content_type: str, body: bytes) -> Submission:
    """What a request asks for, whose content type :func:`check_content_type` has let pass.

    Raises :class:`InvalidJson`, :class:`InvalidForm`, :class:`InvalidType`,
    :class:`MissingParameter` or :class:`StreamingNotSupported`, with the offending field as
    ``param``.
    """
    if content_type.lstrip()[:10].lower() == "multipart/":
        return _check_form(endpoint, content_type, body)
    return _check_json(endpoint, body)


def check_content_type(content_type: str, content_encoding: str | None) -> None:
    """Raise :class:`UnsupportedMediaType` unless a body of this kind can become a job."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in ("application/json", "multipart/form-data"):
        raise UnsupportedMediaType(
            f"The content type {media_type[:100]!r} has no async form. Send application/json."
            if media_type
            else "The request has no content type. Send application/json."
        )
    if content_encoding and content_encoding.strip().lower() != "identity":
        raise UnsupportedMediaType(
            "A compressed body has no async form. Send it without Content-Encoding.",
            headers=(("Accept-Encoding", "identity"),),  # RFC 9110, section 15.5.16
        )


def _check_json(endpoint: Endpoint, body: bytes) -> Submission:
    try:
        fields = json_text.parse(body, _FIELDS)
    except json_text.InvalidText as error:
        raise InvalidJson(f"The body is not valid JSON: {error}.") from None
    except msgspec.ValidationError:
        raise InvalidType("The body is JSON, but not an object. Send an object.") from None
    _refuse_repeated(body)
    model = fields.model
    if not isinstance(model, str) or not 0 < len(model) <= _MAX_MODEL:
        raise _wrong_model(model)
    for name in endpoint.required:
        value: msgspec.Raw | msgspec.UnsetType = getattr(fields, name)
        if isinstance(value, msgspec.UnsetType) or _is_empty(value):
            raise MissingParameter(f"`{name}` is required, and must not be empty.", param=name)
    if fields.stream is True or fields.stream_format == "sse":
        raise _no_stream(endpoint, "stream" if fields.stream is True else "stream_format")
    if fields.fallbacks is msgspec.UNSET:
        return Submission(model, body)
    fallbacks = _fallbacks(fields.fallbacks)
    if json_text.without_half_pairs(body) != body:
        raise InvalidJson(
            "A body with half a surrogate pair cannot be rewritten, as `fallbacks` asks for.",
            param="fallbacks",
        )
    return Submission(model, _without_fallbacks(body), fallbacks)


def _check_form(endpoint: Endpoint, content_type: str, body: bytes) -> Submission:
    try:
        parts = multipart.parse(content_type, body)
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
    if values.get("stream", "").strip().lower() in ("true", "1"):
        raise _no_stream(endpoint, "stream")
    if values.get("stream_format") == "sse":
        raise _no_stream(endpoint, "stream_format")
    return Submission(model, body)


def _wrong_model(model: object) -> ApiError:
    """What is wrong with a ``model`` that is not a text of a length that we take."""
    if model is msgspec.UNSET or model is None or model == "":
        return MissingParameter("`model` is required: a non-empty string.", param="model")
    if not isinstance(model, str):
        return InvalidType("`model` must be a string.", param="model")
    return InvalidType(f"A model has {_MAX_MODEL} characters at the most.", param="model")


def _no_stream(endpoint: Endpoint, param: str) -> StreamingNotSupported:
    instead = "Leave `stream` out" if param == "stream" else 'Send `stream_format: "audio"`'
    return StreamingNotSupported(
        f"A stream has no async form. {instead}, or use {endpoint.sync_path}.", param=param
    )


def _fallbacks(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(model, str) and 0 < len(model) <= _MAX_MODEL for model in value
    ):
        raise InvalidType("`fallbacks` must be a list of model names.", param="fallbacks")
    if len(value) > _MAX_FALLBACKS:
        raise InvalidType(f"`fallbacks` takes {_MAX_FALLBACKS} models at most.", param="fallbacks")
    return tuple(value)


def _without_fallbacks(body: bytes) -> bytes:
    fields = _OBJECT.decode(body)
    del fields["fallbacks"]
    return msgspec.json.encode(fields)


def with_model(body: bytes, model: str) -> bytes:
    """A JSON body that was checked, asking for another model. All other values stay as they were."""
    return msgspec.json.encode({**_OBJECT.decode(body), "model": model})


def model_of(body: bytes) -> str | None:
    """The model that a small JSON body names, or None. Never raises: others judge that request."""
    try:
        model = json_text.parse(body, _FIELDS).model
    except (json_text.InvalidText, msgspec.ValidationError):
        return None
    return model if isinstance(model, str) else None


def count_inputs(endpoint: str, body: bytes) -> int | None:
    """How many inputs a request for embeddings has. None for other requests, and for large ones."""
    if endpoint != "embeddings" or len(body) > _COUNTED_BYTES:
        return None
    try:
        given = bytes(_INPUT.decode(body).input)
        items = _ITEMS.decode(given) if given.startswith(b"[") else []
    except msgspec.DecodeError:
        return None
    is_one = not items or bytes(items[0])[:1].isdigit()  # a text, or the tokens of one
    return 1 if is_one else len(items)


def _is_empty(value: msgspec.Raw) -> bool:
    return len(value) <= 4 and bytes(value) in _EMPTY


def _refuse_repeated(body: bytes) -> None:
    """Refuse an object that has one of our fields twice.

    Which of the two counts is each parser's choice (RFC 8259, section 4): a model that we route by and
    the upstream does not see, or a stream that we do not see, must not get through.
    """
    # A name that stands there once cannot be there twice, unless a letter of it is escaped.
    escaped = _BACKSLASH in body and _ESCAPED_LETTER.search(body) is not None
    if not escaped:
        if len(body) <= _SHORT:
            found = _ANY_NAME.findall(body)
        else:  # if one more is found than there are names, one of them is there twice
            first = islice(_ANY_NAME.finditer(body), len(_QUOTED_NAMES) + 1)
            found = [match[0] for match in first]
        if len(set(found)) == len(found):
            return
    suspects = [name for name, quoted in _QUOTED_NAMES if escaped or body.count(quoted) > 1]
    for name, times in zip(suspects, _times_at_the_top(suspects, body), strict=True):
        if times > 1:
            raise InvalidJson(f"The body has `{name}` twice. Send it once.", param=name)


def _letter(letter: str) -> str:
    """A pattern for a letter of a name, as it is or escaped."""
    code = f"{ord(letter):02x}"
    digits = (f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in code)
    return rf"(?:{letter}|\\u00{''.join(digits)})"


def _times_at_the_top(names: Sequence[str], body: bytes) -> list[int]:
    """How often the object that ``body`` is has each key, itself and not in what it holds.

    No value is built: names are marked, strings dropped, and brackets counted, all of it by the
    functions of ``bytes`` and ``re``. The text is known to be JSON.
    """
    text = body
    for mark, name in zip(_MARKS, names, strict=False):
        # A quote behind a backslash is inside of another name.
        key = rf'(?<!\\)"{"".join(map(_letter, name))}"\s*:'.encode()
        text = re.sub(key, bytes([mark]), text)  # which no JSON text holds
    skeleton = _STRING.sub(b"", text).translate(None, _NO_SKELETON)[1:-1]
    for _ in range(3):  # most is in small objects: they are taken out whole
        skeleton = _LEAF.sub(b"", skeleton)
    times = dict.fromkeys(_MARKS, 0)
    depth = 0
    for piece, mark in _BETWEEN_MARKS.findall(skeleton):
        depth += piece.count(b"{") + piece.count(b"[") - piece.count(b"}") - piece.count(b"]")
        times[mark[0]] += depth == 0
    return [times[mark] for mark, _ in zip(_MARKS, names, strict=False)]
