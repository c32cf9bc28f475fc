"""The options of each part, from the configuration: for a start and for a reload."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from asyncproxy.config.model import Config, StoreConfig, UpstreamConfig
from asyncproxy.core.endpoints import ENDPOINTS, Endpoint
from asyncproxy.dispatch.verdict import CallPolicy
from asyncproxy.service import Lifetimes
from asyncproxy.stores.base import Limits
from asyncproxy.upstream.client import UpstreamOptions

__all__ = [
    "Bodies",
    "as_far_as_it_can_change",
    "auth_keys",
    "base_urls",
    "bodies",
    "endpoints",
    "lifetimes",
    "limits",
    "patterns",
    "policy",
    "upstream_options",
]

# Keys that only a restart changes: a process keeps its listeners and its store.
_FIXED: Final = ("listen", "admin_listen", "client_timeout", "max_connections", "cors")
_FIXED_JOBS: Final = ("endpoints",)
_FIXED_STORE: Final = tuple(name for name in StoreConfig.model_fields if name != "max_bytes")


class Bodies(NamedTuple):
    """The limits of request bodies."""

    max_bytes: int
    """Bytes of one body."""
    max_total_bytes: int
    """Bytes of all bodies that are being read."""


def endpoints(config: Config) -> list[Endpoint]:
    """The endpoints that have an async form."""
    return [ENDPOINTS[name] for name in config.jobs.endpoints]


def limits(config: Config) -> Limits:
    """The limits of the store."""
    jobs = config.jobs
    return Limits(jobs.max_pending, jobs.max_pending_per_credential, config.store.max_bytes)


def bodies(config: Config) -> Bodies:
    """The limits of request bodies.

    Waiting requests may take half of the store, so a larger body could never be accepted.
    """
    half = config.store.max_bytes // 2
    return Bodies(min(config.jobs.max_request_bytes, half), half)


def lifetimes(config: Config) -> Lifetimes:
    """How long results live and clients wait."""
    jobs = config.jobs
    return Lifetimes(int(jobs.result_ttl) or 1, int(jobs.max_result_ttl) or 1, jobs.max_wait)


def auth_keys(config: Config) -> list[str]:
    """The keys that clients may present."""
    return [key.get_secret_value() for key in config.auth.keys]


def base_urls(config: Config) -> dict[str, str]:
    """The URL of each upstream, by its name."""
    return {upstream.name: upstream.base_url for upstream in config.upstreams}


def patterns(config: Config) -> list[tuple[str, list[str]]]:
    """The upstreams in their order, each with its patterns of models."""
    return [(upstream.name, upstream.models) for upstream in config.upstreams]


def upstream_options(config: Config) -> list[UpstreamOptions]:
    """How to reach each upstream."""
    return [
        UpstreamOptions(
            name=upstream.name,
            base_url=upstream.base_url,
            headers=[(name, secret.get_secret_value()) for name, secret in upstream.headers.items()],
            connect_s=upstream.timeout.connect,
            total_s=upstream.timeout.total,
            max_result_bytes=config.jobs.max_result_bytes,
            ca_file=upstream.ca_file,
            insecure_skip_verify=upstream.insecure_skip_verify,
            strip_model_prefix=upstream.strip_model_prefix,
        )
        for upstream in config.upstreams
    ]


def policy(upstream: UpstreamConfig) -> CallPolicy:
    """How jobs of an upstream are sent."""
    # Every value of the operator's headers is masked in the log, as it may be a secret.
    values = [secret.get_secret_value() for secret in upstream.headers.values()]
    hidden = {part for value in values for part in (value, value.rpartition(" ")[2]) if part}
    return CallPolicy(
        concurrency=upstream.concurrency,
        attempts=upstream.retry.attempts,
        backoff_s=upstream.retry.backoff,
        max_backoff_s=upstream.retry.max_backoff,
        outage_s=upstream.retry.outage,
        hidden=frozenset(hidden),
    )


def as_far_as_it_can_change(old: Config, new: Config) -> tuple[Config, list[str]]:
    """``new`` with the values of ``old`` for keys that only a restart changes, and the changed keys."""
    differ: list[str] = []

    def kept(was: Any, is_now: Any, names: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
        differ.extend(prefix + n for n in names if getattr(was, n) != getattr(is_now, n))
        return {name: getattr(was, name) for name in names}

    top = kept(old, new, _FIXED)
    jobs = new.jobs.model_copy(update=kept(old.jobs, new.jobs, _FIXED_JOBS, "jobs."))
    store = new.store.model_copy(update=kept(old.store, new.store, _FIXED_STORE, "store."))
    return new.model_copy(update={**top, "jobs": jobs, "store": store}), differ
