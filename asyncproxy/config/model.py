"""Every key of the YAML: its type, its default, what it is for. The operator's contract.

Secrets are masked wherever a configuration is shown.
"""

from __future__ import annotations

import re
import ssl
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from asyncproxy.config.values import (
    Count,
    Duration,
    DurationOrNone,
    Size,
    encryption_keys_in,
    known_endpoint,
    show_duration,
    split_address,
    without_secret,
)
from asyncproxy.core.endpoints import ENDPOINTS
from asyncproxy.wire.headers import HOP_BY_HOP

__all__ = ["Config", "StoreConfig", "UpstreamConfig"]

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

# The serialisation of an origin (the HTML standard, section 7.1.1): lower case, and no path.
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")


# What a base_url ends in that was copied from a call.
_ENDPOINT: Final = re.compile(rf"(/embeddings|(?<=/v1)/(?:{'|'.join(ENDPOINTS)}))/?$")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TimeoutConfig(_Section):
    connect: Duration = 5.0
    """To connect to the upstream, TLS included."""
    total: Duration = 600.0
    """For one attempt of a job; for a pass-through request, the longest silence between bytes."""


class RetryConfig(_Section):
    attempts: Count = 3
    """Calls per job that may fail, the first included."""
    backoff: DurationOrNone = 0.5
    """The upper bound of the first wait; it doubles with each attempt."""
    max_backoff: DurationOrNone = 30.0
    """The upper bound of any wait that the upstream has not asked for."""
    outage: DurationOrNone = 900.0
    """How long a job waits in all for an upstream that is away or limits its rate. None of that counts
    as an attempt."""


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

    @field_validator("base_url", mode="before")
    @classmethod
    def _is_url(cls, value: object) -> str:
        right = "a URL like http://127.0.0.1:4000/v1, https://host/v1 or unix:/path/to.sock"
        if not isinstance(value, str):
            raise ValueError(right)
        try:
            parts = urlsplit(value)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            raise ValueError(right) from None
        if endpoint := _ENDPOINT.search(parts.path):
            raise ValueError(f"a URL without {endpoint[1]}, which is in the client's path")
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


class CorsConfig(_Section):
    allow_origins: list[str] = []
    """Origins whose pages may use our own paths from a browser; ["*"] is any."""

    @field_validator("allow_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError('origins as browsers write them, like https://app.example, or "*"')
        return value


class JobsConfig(_Section):
    endpoints: Annotated[list[Annotated[str, AfterValidator(known_endpoint)]], Field(min_length=1)] = (
        list(ENDPOINTS)
    )
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
    def _are_different(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("each endpoint once")
        return value

    @model_validator(mode="after")
    def _ttl_fits(self) -> JobsConfig:
        if self.result_ttl > self.max_result_ttl:
            raise ValueError(
                f"a result_ttl ({show_duration(self.result_ttl)}) of at most max_result_ttl "
                f"({show_duration(self.max_result_ttl)})"
            )
        return self


class StoreConfig(_Section):
    url: Annotated[str, PlainSerializer(without_secret)] = "memory://"
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

    @field_validator("url", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> str:
        right = "memory://, sqlite:///path/jobs.db or redis://host:6379/0"
        if not isinstance(value, str):
            raise ValueError(right)
        try:
            parts = urlsplit(value)
            port = parts.port if parts.scheme in ("redis", "rediss") else None
        except ValueError:
            raise ValueError(right) from None
        if value == "memory://":
            return value
        if parts.scheme == "sqlite":
            if parts.netloc or parts.query or parts.fragment or not parts.path.strip("/"):
                raise ValueError("sqlite:///path/jobs.db, the path of a file")
            return value
        if parts.scheme not in ("redis", "rediss", "redis+sentinel") or not parts.hostname or port == 0:
            raise ValueError(right)
        if "password=" in parts.query:
            raise ValueError("a URL with its credentials before the @")
        return value

    @field_validator("encryption_key")
    @classmethod
    def _are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            encryption_keys_in(value.get_secret_value())
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
        return (
            ()
            if self.encryption_key is None
            else encryption_keys_in(self.encryption_key.get_secret_value())
        )


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
    max_connections: Count = 10_000
    """Client connections of one process. A further one is answered 503 and closed."""
    cors: CorsConfig = CorsConfig()
    jobs: JobsConfig = JobsConfig()
    store: StoreConfig = StoreConfig()
    shutdown_grace: DurationOrNone = 30.0
    """How long calls in flight may go on after SIGTERM."""
    log: LogConfig = LogConfig()

    @field_validator("listen", "admin_listen", mode="before")
    @classmethod
    def _is_address(cls, value: object, info: ValidationInfo) -> object:
        if value is not None or info.field_name == "listen":
            split_address(value)
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
        return None if self.admin_listen is None else split_address(self.admin_listen)

    @property
    def address(self) -> tuple[str | None, int]:
        """The host to listen on (None: all interfaces) and the port."""
        return split_address(self.listen)
