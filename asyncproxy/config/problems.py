"""The problems of a configuration, a line each: the key, the value, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from asyncproxy.config.model import Config
from asyncproxy.config.values import URL_SECRET

__all__ = ["problems_of", "shown"]


def problems_of(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        loc = item["loc"]
        path = ""
        for part in loc:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        kind = item["type"]
        if kind == "extra_forbidden":
            known = _keys_beside(loc)
            close = difflib.get_close_matches(str(loc[-1]), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "known here are " + ", ".join(known)
            yield f"{path}: unknown key; {hint}"
        elif kind == "missing":
            yield f"{path}: missing; it has no default"
        else:
            right = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            right = _PLAIN_WORDS.get(kind, right)
            found = "a secret" if _is_secret(loc) else shown(item["input"])
            yield f"{path or 'the file'}: found {found}; expected {right}"


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    """The known keys of the section that has an unknown key."""
    model: Any = Config
    for part in loc[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next(iter(getattr(annotation, "__args__", ())), annotation)
    return list(model.model_fields)


_PLAIN_WORDS: Final = {
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "string_type": "text",
    "too_short": "at least one",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores",
}


def _is_secret(loc: tuple[int | str, ...]) -> bool:
    """Whether the value of a key is a secret, or may be one by an easy mistake."""
    return "headers" in loc or "encryption_key" in loc or loc[:1] == ("auth",)


def shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "nothing"
    if isinstance(value, BaseModel):
        return "these values together"
    text = URL_SECRET.sub("***", repr(value))
    return text if len(text) <= 80 else text[:79] + "…"
