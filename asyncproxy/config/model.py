"""The YAML, typed: the operator's contract. Only ``app`` and ``cli`` know this module.

Everything wrong is reported at once, each with the path of its key, what was found and what would
be right. Secrets are masked wherever a configuration is shown.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import ssl
from base64 import b64decode
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from asyncproxy.core.endpoints import ENDPOINTS
from asyncproxy.core.errors import ConfigError
from asyncproxy.wire.headers import HOP_BY_HOP

__all__ = ["Config", "dump_config", "json_schema", "load_config"]

_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS: Final = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_NUMBER: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)")
_URL_SECRET: Final = re.compile(r"(?<=://)[^/?#@\s]*(?=@)|(?<=\?).*(?=')")  # user:password@, ?query
_URLSAFE: Final = str.maketrans("-_", "+/")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _duration(value: object) -> object:
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        factor = _DURATION_UNITS.get(match[2] or "s")
        if factor is not None:
            return float(match[1]) * factor
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a duration like 500ms, 5s, 10m, 1h or 7d, or a number of seconds")
    return value


def _size(value: object) -> object:
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        factor = _SIZE_UNITS.get(match[2] or "B")
        if factor is not None:
            return int(Decimal(match[1]) * factor)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a size like 64KiB, 32MiB or 1GiB, or a number of bytes")
    return value


def _show_duration(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        if seconds % _DURATION_UNITS[unit] == 0:
            return f"{int(seconds / _DURATION_UNITS[unit])}{unit}"
    exact = Decimal(repr(seconds))
    milliseconds = exact * 1000
    return f"{int(milliseconds)}ms" if milliseconds == int(milliseconds) else f"{exact:f}s"


def _show_size(size: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return str(size)


# Ten years: what is longer is a slip, and overflows a date.
_LONGEST: Final = 3650 * 86400.0
_DURATION_SCHEMA: Final = {
    "anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?(ms|s|m|h|d)?$"}, {"type": "number"}]
}

Duration = Annotated[
    float,
    BeforeValidator(_duration),
    Field(gt=0, le=_LONGEST, allow_inf_nan=False),
    PlainSerializer(_show_duration),
    WithJsonSchema(_DURATION_SCHEMA),
]
DurationOrNone = Annotated[
    float,
    BeforeValidator(_duration),
    Field(ge=0, le=_LONGEST, allow_inf_nan=False),
    PlainSerializer(_show_duration),
    WithJsonSchema(_DURATION_SCHEMA),
]
Size = Annotated[
    int,
    BeforeValidator(_size),
    Field(gt=0),
    PlainSerializer(_show_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^\d+(\.\d+)?(B|KiB|MiB|GiB|TiB)?$"},
                {"type": "integer"},
            ]
        }
    ),
]
Count = Annotated[int, Field(ge=1)]


def _without_secret(url: str) -> str:
    return _URL_SECRET.sub("***", url)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TimeoutConfig(_Section):
    connect: Duration = 5.0
    """To connect to the upstream, TLS included."""
    total: Duration = 600.0
    """For one attempt of a job; for a pass-through request, the longest silence between bytes."""


class RetryConfig(_Section):
    attempts: Count = 3
    """Calls per job at the most, the first included."""
    backoff: DurationOrNone = 0.5
    """The upper bound of the first wait; it doubles with each attempt."""
    max_backoff: DurationOrNone = 30.0
    """The upper bound of any wait that the upstream has not asked for."""


class UpstreamConfig(_Section):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] = "gateway"
    """Shows up in logs, metrics and errors."""
    base_url: str
    """With a path it stands for the client's /v1. http://, https:// or unix:/path/to.sock[:/path]."""
    models: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["*"]
    """Shell-style patterns. The first upstream that matches the model gets the request."""
    headers: dict[str, SecretStr] = {}
    """Set on every request to it, over the client's."""
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 64
    """Background calls in flight."""
    timeout: TimeoutConfig = TimeoutConfig()
    retry: RetryConfig = RetryConfig()
    ca_file: str | None = None
    """A PEM file of certificate authorities to trust instead of the system's."""
    insecure_skip_verify: bool = False
    """Take any certificate. For tests only."""

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        right = "a URL like http://127.0.0.1:4000/v1, https://host/v1 or unix:/path/to.sock"
        try:
            parts = urlsplit(value)
            known = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port
        except ValueError:
            raise ValueError(right) from None
        if not value.isascii() or re.search(r"[\x00-\x20\x7f]", value):
            raise ValueError(right)
        if parts.scheme == "unix" and not parts.netloc:
            if not re.fullmatch(r"/[^:]+(:(/.*)?)?", parts.path):
                raise ValueError(right)
            return value
        if not known:
            raise ValueError(right)
        if parts.username is not None or parts.password is not None:
            raise ValueError("a URL without credentials; they belong into `headers`")
        if parts.query or parts.fragment:
            raise ValueError("a URL without query and fragment")
        return value

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("each header once")
        for name, secret in value.items():
            if name.lower() in HOP_BY_HOP | {"content-length"}:
                raise ValueError(f"headers that travel end to end, unlike {name}")
            if not _TOKEN.fullmatch(name):
                raise ValueError(f"header names, which {name!r} is not")
            if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", secret.get_secret_value()):
                raise ValueError(f"header values without control characters, unlike that of {name}")
        return value

    @field_validator("ca_file")
    @classmethod
    def _exists(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ssl.create_default_context(cafile=value)
            except OSError:  # ssl.SSLError is one too
                raise ValueError("the path of a PEM file with certificates") from None
        return value


class AuthConfig(_Section):
    keys: list[Annotated[SecretStr, Field(min_length=1)]] = []
    """When set, every request must carry one of them."""


class JobsConfig(_Section):
    endpoints: Annotated[list[str], Field(min_length=1)] = list(ENDPOINTS)
    """The endpoints that have an async twin."""
    result_ttl: Duration = 3600.0
    """How long a result lives after completion, if the client does not say."""
    max_result_ttl: Duration = 86400.0
    """The longest that a client may ask for."""
    deadline: Duration = 86400.0
    """A job that is not done so long after its submission fails."""
    max_pending: Count = 10_000
    """Live jobs, all credentials together."""
    max_pending_per_credential: Count = 10_000
    """Live jobs of one credential."""
    max_request_bytes: Size = 32 * 1024**2
    """The largest body of a job."""
    max_result_bytes: Size = 64 * 1024**2
    """The largest answer of an upstream to a job."""
    max_wait: Duration = 60.0
    """The longest that a poll is held for a client that asks to wait."""
    relay_hold: Duration = 50.0
    """How long a relayed request is held before it is redirected."""
    relay_max_hops: Annotated[int, Field(ge=1, le=1000)] = 18
    """Redirects of a relayed request before it is answered 503: clients follow 20 to 30."""

    @field_validator("endpoints")
    @classmethod
    def _are_known(cls, value: list[str]) -> list[str]:
        unknown = [name for name in value if name not in ENDPOINTS]
        if unknown:
            raise ValueError("names out of " + ", ".join(ENDPOINTS))
        return value

    @model_validator(mode="after")
    def _ttl_fits(self) -> JobsConfig:
        if self.result_ttl > self.max_result_ttl:
            raise ValueError(
                f"a result_ttl ({_show_duration(self.result_ttl)}) of at most max_result_ttl "
                f"({_show_duration(self.max_result_ttl)})"
            )
        return self


class StoreConfig(_Section):
    url: Annotated[str, PlainSerializer(_without_secret)] = "memory://"
    """memory://, sqlite:///path/jobs.db, redis://host:6379/0, rediss:// or redis+sentinel://."""
    max_bytes: Size = 1024**3
    """What results and waiting requests may take; waiting requests half of it at the most."""
    encryption_key: SecretStr | None = None
    """Durable stores: 32 bytes in Base64. After a comma: older keys, to open what they sealed."""
    encrypt_results: bool = False
    """Durable stores: seal results too. Requests always are."""
    durability: Literal["full", "normal"] = "full"
    """sqlite: what an accepted job survives: full is a power loss, normal the death of the process."""
    prefix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:-]+$")] = (
        "asyncproxy"
    )
    """redis: of every key, so that several deployments can share one server."""
    lease: Annotated[Duration, Field(ge=1)] = 15.0
    """redis: the jobs of a node that is silent for so long go to the others."""

    @field_validator("url")
    @classmethod
    def _is_known(cls, value: str) -> str:
        right = "memory://, sqlite:///path/jobs.db or redis://host:6379/0"
        try:
            parts = urlsplit(value)
            _ = parts.port if parts.scheme in ("redis", "rediss") else None
        except ValueError:
            raise ValueError(right) from None
        if value == "memory://":
            return value
        if parts.scheme == "sqlite":
            if parts.netloc or parts.query or parts.fragment or not parts.path.strip("/"):
                raise ValueError("sqlite:///path/jobs.db, the path of a file")
            return value
        if parts.scheme not in ("redis", "rediss", "redis+sentinel") or not parts.hostname:
            raise ValueError(right)
        if "password=" in parts.query:
            raise ValueError("a URL with its credentials before the @")
        return value

    @field_validator("encryption_key")
    @classmethod
    def _are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _keys_in(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _redis_has_a_key(self) -> StoreConfig:
        if self.url.startswith("redis") and self.encryption_key is None:
            raise ValueError(
                "an encryption_key for redis://, the same on every node, as `openssl rand -base64 32` "
                "makes one"
            )
        return self

    @property
    def encryption_keys(self) -> tuple[bytes, ...]:
        """The encryption keys, 32 bytes each, the one to seal with first."""
        return () if self.encryption_key is None else _keys_in(self.encryption_key.get_secret_value())


def _keys_in(value: str) -> tuple[bytes, ...]:
    keys = []
    for text in value.split(","):
        try:
            key = b64decode(text.strip().translate(_URLSAFE), validate=True)
        except ValueError:
            key = b""
        if len(key) != 32:
            raise ValueError("32 bytes in Base64, as `openssl rand -base64 32` prints them")
        keys.append(key)
    return tuple(keys)


class LogConfig(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Config(_Section):
    """The configuration of a proxy."""

    listen: str = "127.0.0.1:8080"
    """host:port. Port 0 takes a free one; no host means all interfaces."""
    admin_listen: str | None = None
    """host:port for what is under /-/, which is then not on `listen` any more."""
    upstreams: Annotated[list[UpstreamConfig], Field(min_length=1)]
    """The gateways. The first gets what belongs to none in particular."""
    auth: AuthConfig = AuthConfig()
    client_timeout: Duration = 60.0
    """For the head of a request, and between pieces of its body."""
    jobs: JobsConfig = JobsConfig()
    store: StoreConfig = StoreConfig()
    shutdown_grace: DurationOrNone = 30.0
    """How long calls in flight may go on after SIGTERM."""
    log: LogConfig = LogConfig()

    @field_validator("listen", "admin_listen")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            _split_address(value)
        return value

    @field_validator("upstreams")
    @classmethod
    def _names_differ(cls, value: list[UpstreamConfig]) -> list[UpstreamConfig]:
        if len({upstream.name for upstream in value}) < len(value):
            raise ValueError("upstreams that each have a `name` of their own")
        return value

    @model_validator(mode="after")
    def _addresses_differ(self) -> Config:
        if self.admin_address == self.address and self.address[1] != 0:
            raise ValueError("an admin_listen with a port of its own")
        return self

    @property
    def admin_address(self) -> tuple[str | None, int] | None:
        """The same of our own pages, if they have an address of their own."""
        return None if self.admin_listen is None else _split_address(self.admin_listen)

    @property
    def address(self) -> tuple[str | None, int]:
        """The host to listen on (None: all interfaces) and the port."""
        return _split_address(self.listen)


def _split_address(value: str) -> tuple[str | None, int]:
    host, colon, port = value.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError("host:port, like 127.0.0.1:8080 or [::1]:8080")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("host:port, with brackets around an IPv6 address")
    return host or None, int(port)


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], *, environ: Mapping[str, str] | None = None
) -> Config:
    """A configuration from a YAML file, or from a mapping of the same form.

    ``${NAME}`` and ``${NAME:-default}`` are taken from ``environ`` (``os.environ``). Raises
    :class:`ConfigError` with everything that is wrong.
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
        raise ConfigError([f"found {_shown(data)}; expected a mapping with `upstreams`"])
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        # A value that could not be expanded is wrong for that reason, and not for its type.
        unset = {problem.partition(":")[0] for problem in problems}
        problems += [p for p in _problems(error) if p.partition(":")[0] not in unset]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def dump_config(config: Config) -> str:
    """The effective configuration as YAML, secrets masked."""
    data = _escaped(config.model_dump(mode="json"))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _escaped(node: Any) -> Any:
    """``node`` with each dollar as it has to be written, so that it loads again as it is."""
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    return node.replace("$", "$$") if isinstance(node, str) else node


def json_schema() -> str:
    """The JSON Schema of the YAML, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice; YAML's loaders keep the last one and say nothing."""

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
    except ValueError as error:  # a scalar that looks like a number or a date and is none
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


def _problems(error: ValidationError) -> Iterator[str]:
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
            found = "a secret" if _is_secret(loc) else _shown(item["input"])
            yield f"{path or 'the file'}: found {found}; expected {right}"


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the section of an unknown key has."""
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
    """Whether a secret belongs there, or stands there by a mistake that is easily made."""
    return "headers" in loc or "encryption_key" in loc or loc[:1] == ("auth",)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "nothing"
    if isinstance(value, BaseModel):
        return "these values together"
    text = _URL_SECRET.sub("***", repr(value))
    return text if len(text) <= 80 else text[:79] + "…"
