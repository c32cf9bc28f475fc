"""Loads and checks a YAML configuration, and prints it as YAML with the secrets masked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from asyncproxy.config.model import Config
from asyncproxy.config.problems import problems_of, shown
from asyncproxy.core.errors import ConfigError

__all__ = ["dump_config", "json_schema", "load_config"]


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], *, environ: Mapping[str, str] | None = None
) -> Config:
    """A configuration from a YAML file, or from a mapping of the same form.

    ``${NAME}`` and ``${NAME:-default}`` are replaced from ``environ`` (default: ``os.environ``). Raises
    :class:`ConfigError` with all problems.
    """
    if isinstance(source, Mapping):
        data: object = dict(source)
    else:
        data = _read(Path(source))
    problems: list[str] = []
    try:
        data = _expand(data, "", os.environ if environ is None else environ, problems)
    except RecursionError:
        raise ConfigError(["the file holds itself, by an alias; expected a tree"]) from None
    if not isinstance(data, dict):
        raise ConfigError([f"found {shown(data)}; expected a mapping with `upstreams`"])
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        # For a value that could not be expanded, only that problem is reported, and not its type.
        unset = {problem.partition(":")[0] for problem in problems}
        problems += [p for p in problems_of(error) if p.partition(":")[0] not in unset]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def dump_config(config: Config) -> str:
    """The effective configuration as YAML, secrets masked."""
    data = _escaped(config.model_dump(mode="json"))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _escaped(node: Any) -> Any:
    """``node`` with each dollar doubled, so that loading it gives the same values."""
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    return node.replace("$", "$$") if isinstance(node, str) else node


def json_schema() -> str:
    """The JSON Schema of the YAML, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice. PyYAML's own loaders silently keep the last value."""

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002  PyYAML's signature
    ) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key != "<<" and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"`{key}` is here twice", problem_mark=key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from None
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except ValueError as error:  # a scalar in the form of a number or date, with an impossible value
        raise ConfigError([f"{path}: {error}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not YAML"
        raise ConfigError([f"{path}{where}: {what}"]) from None


_VARIABLE: Final = re.compile(r"\$(?:(\$)|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})")


def _expand(node: Any, path: str, environ: Mapping[str, str], problems: list[str]) -> Any:
    if isinstance(node, Mapping):
        return {
            k: _expand(v, f"{path}.{k}" if path else str(k), environ, problems) for k, v in node.items()
        }
    if isinstance(node, list):
        return [_expand(v, f"{path}[{i}]", environ, problems) for i, v in enumerate(node)]
    if not isinstance(node, str):
        return node

    def value_of(match: re.Match[str]) -> str:
        dollar, name, default = match.groups()
        if dollar:
            return "$"
        value = environ.get(name)
        if not value and default is not None:
            value = default
        if value is None:
            problems.append(
                f"{path}: the environment variable {name} is not set; "
                f"set it, or write ${{{name}:-default}}"
            )
            return ""
        return value

    return _VARIABLE.sub(value_of, node)
