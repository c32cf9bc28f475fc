"""Every key of the YAML: its type, its default, its purpose. The operator's contract.

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


# The end of a base_url that was copied from the URL of a call.
_ENDPOINT: Final = re.compile(rf"(/embeddings|(?<=/v1)/(?:{'|'.join(ENDPOINTS)}))/?$")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TimeoutConfig(_Section):
    connect: Duration = 5.0
    """The time limit for connecting to the upstream, TLS included."""
    total: Duration = 600.0
    """The time limit of one attempt of a job. Of a pass-through request: the longest silence."""


class RetryConfig(_Section):
    attempts: Count = 3
    """Attempts per job, the first included."""
    backoff: DurationOrNone = 0.5
    """The upper bound of the first wait. The bound doubles with each attempt."""
    max_backoff: DurationOrNone = 30.0
    """The upper bound of any wait that the upstream has not asked for."""
    outage: DurationOrNone = 900.0
    """How long a job waits in all for an upstream that is away or limits its rate. Refused calls
    meanwhile are no attempts."""


class UpstreamConfig(_Section):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] = "gateway"
    """The name of the upstream in logs, metrics and errors."""
    base_url: str
    """http://, https:// or unix:/path/to.sock[:/path]. A path replaces the client's /v1."""
    models: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["*"]
    """Shell-style patterns. The first upstream that matches the model gets the request."""
    headers: dict[str, SecretStr] = {}
    """Header fields that replace the client's on every request to the upstream."""
    strip_model_prefix: Annotated[str, Field(max_length=64)] = ""
    """A prefix to remove from the model of a job before the call, as Bifrost does with "openai/"."""
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 64
    """The highest number of background calls in flight."""
    timeout: TimeoutConfig = TimeoutConfig()
    retry: RetryConfig = RetryConfig()
    ca_file: str | None = None
    """A PEM file of certificate authorities to trust instead of the system's."""
    insecure_skip_verify: bool = False
    """Accept any certificate. For tests only."""

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
    """The accepted client keys. If there are any, every request must carry one of them."""


class CorsConfig(_Section):
    allow_origins: list[str] = []
    """Origins whose pages may use the proxy's own paths from a browser. ["*"] allows every origin."""

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
    """The endpoints that have an async form."""
    result_ttl: Duration = 3600.0
    """The lifetime of a result after completion, if the client asks for none."""
    max_result_ttl: Duration = 86400.0
    """The longest lifetime of a result that a client may ask for."""
    deadline: Duration = 86400.0
    """The time limit of a job from its submission. Then the job fails."""
    max_pending: Count = 10_000
    """The highest number of live jobs of all credentials together."""
    max_pending_per_credential: Count = 10_000
    """The highest number of live jobs of one credential."""
    max_request_bytes: Size = 32 * 1024**2
    """The largest request body of a job."""
    max_result_bytes: Size = 64 * 1024**2
    """The largest response body of an upstream to a job."""
    max_wait: Duration = 60.0
    """The longest wait of a poll."""
    relay_hold: Duration = 50.0
    """How long a relayed request waits for its job before it is redirected."""
    relay_max_hops: Annotated[int, Field(ge=1, le=1000)] = 18
    """Redirects of a relayed request before it is answered 503. Clients follow 20 to 30."""

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
    """The limit of results and waiting requests together. Waiting requests may take half of it."""
    encryption_key: SecretStr | None = None
    """Durable stores: 32 bytes in Base64. After a comma: older keys, which only open sealed data."""
    encrypt_results: bool = False
    """Durable stores: encrypt results too. Requests are always encrypted."""
    durability: Literal["full", "normal"] = "full"
    """sqlite: with full, accepted jobs survive a power loss; with normal, the death of the process."""
    prefix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:-]+$")] = (
        "asyncproxy"
    )
    """redis: the prefix of every key, so that several deployments can share one server."""
    lease: Annotated[Duration, Field(ge=1)] = 15.0
    """redis: if a node is silent for this time, other nodes take its jobs."""

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
        """The encryption keys, 32 bytes each. The first one seals."""
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
    """host:port. Port 0 takes a free port. Without a host: all interfaces."""
    admin_listen: str | None = None
    """host:port of a separate listener for the pages under /-/. `listen` does not serve them then."""
    upstreams: Annotated[list[UpstreamConfig], Field(min_length=1)]
    """The gateways. The first one also gets the requests in which the proxy finds no model."""
    auth: AuthConfig = AuthConfig()
    client_timeout: Duration = 60.0
    """The longest silence of a client within a request, and while it reads a response."""
    max_connections: Count = 10_000
    """The highest number of client connections of one process. A further one gets 503 and closes."""
    cors: CorsConfig = CorsConfig()
    jobs: JobsConfig = JobsConfig()
    store: StoreConfig = StoreConfig()
    shutdown_grace: DurationOrNone = 30.0
    """How long calls in flight may continue after SIGTERM."""
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
        """Host and port of ``admin_listen``. None: the pages under ``/-/`` are on ``listen``."""
        return None if self.admin_listen is None else split_address(self.admin_listen)

    @property
    def address(self) -> tuple[str | None, int]:
        """The host to listen on (None: all interfaces) and the port."""
        return split_address(self.listen)
