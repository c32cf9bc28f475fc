"""A request becomes the parts of a job, or an error. Pure: one pass over the bytes.

The wire contract, section 2: what is checked here is what we need to run the job and what could never
succeed. The upstream is the judge of the rest.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from asyncproxy import jsontext
from asyncproxy.endpoints import Endpoint
from asyncproxy.errors import (
    InvalidJson,
    InvalidType,
    MissingParameter,
    StreamingNotSupported,
    UnsupportedMediaType,
)

__all__ = ["check_content_type", "check_json", "model_of", "ttl"]


class _Fields(msgspec.Struct):
    model: Any = msgspec.UNSET
    input: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    stream: Any = msgspec.UNSET
    stream_format: Any = msgspec.UNSET


_FIELDS: Final = msgspec.json.Decoder(_Fields)
_QUOTED_NAMES: Final = tuple(f'"{name}"'.encode() for name in _Fields.__struct_fields__)
_EMPTY: Final = frozenset({b"null", b'""', b"[]", b"{}"})


def check_content_type(content_type: str, content_encoding: str | None) -> None:
    """Raise :class:`UnsupportedMediaType` unless a body of this kind can become a job."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
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


def check_json(endpoint: Endpoint, body: bytes) -> str:
    """The model that a JSON body asks for.

    Raises :class:`InvalidJson`, :class:`InvalidType`, :class:`MissingParameter` or
    :class:`StreamingNotSupported`, with the offending field as ``param``.
    """
    try:
        fields = jsontext.parse(body, _FIELDS)
    except jsontext.InvalidText as error:
        raise InvalidJson(f"The body is not valid JSON: {error}.") from None
    except msgspec.ValidationError:
        raise InvalidType("The body is JSON, but not an object. Send an object.") from None
    _refuse_repeated(body)
    model = fields.model
    if model is msgspec.UNSET or model is None or model == "":
        raise MissingParameter("A model is needed: a non-empty string.", param="model")
    if not isinstance(model, str):
        raise InvalidType("`model` must be a string.", param="model")
    for name in endpoint.required:
        value: msgspec.Raw | msgspec.UnsetType = getattr(fields, name)
        if isinstance(value, msgspec.UnsetType) or _is_empty(value):
            raise MissingParameter(f"`{name}` is needed, and not empty.", param=name)
    if fields.stream is True:
        raise StreamingNotSupported(
            f"A stream has no async form. Leave `stream` out, or use {endpoint.sync_path}.",
            param="stream",
        )
    if fields.stream_format == "sse":
        raise StreamingNotSupported(
            f'A stream has no async form. Send `stream_format: "audio"`, or use {endpoint.sync_path}.',
            param="stream_format",
        )
    return model


def model_of(body: bytes) -> str | None:
    """The model that a small JSON body names, or None. Never raises: others judge that request."""
    try:
        model = jsontext.parse(body, _FIELDS).model
    except (jsontext.InvalidText, msgspec.ValidationError):
        return None
    return model if isinstance(model, str) else None


def ttl(value: str | None, *, default_s: int, max_s: int) -> int:
    """Seconds that a result lives after completion, given ``x-bf-async-job-result-ttl``.

    Missing, not a number, zero or negative: the default. Over the maximum: the maximum.
    """
    if value is None or not (value.isascii() and value.isdecimal()):
        return default_s
    seconds = int(value) if len(value) < 10 else max_s
    return min(seconds, max_s) if seconds > 0 else default_s


def _is_empty(value: msgspec.Raw) -> bool:
    view = memoryview(value)
    return len(view) <= 4 and bytes(view) in _EMPTY


def _refuse_repeated(body: bytes) -> None:
    """Refuse an object that has one of our fields twice.

    Which of the two counts is each parser's choice (RFC 8259, section 4): a model that we route by and
    the upstream does not see, or a stream that we do not see, must not get through.
    """
    # A name that stands there once cannot be there twice, unless a letter of it is escaped.
    escaped = b"\\u006" in body or b"\\u007" in body or b"\\u005" in body
    if not escaped and all(body.count(name) <= 1 for name in _QUOTED_NAMES):
        return
    pairs: list[tuple[str, Any]] = json.loads(body, object_pairs_hook=list)
    seen = set()
    for name, _ in pairs:
        if name in _Fields.__struct_fields__ and name in seen:
            raise InvalidJson(f"The body has `{name}` twice. Send it once.", param=name)
        seen.add(name)
