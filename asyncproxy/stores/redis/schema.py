"""Checks the schema and the key of the data in Redis, and whether Redis is configured to keep it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from redis.exceptions import RedisError, ResponseError

from asyncproxy.core.errors import StartupError, StoreUnavailable
from asyncproxy.stores.codec import Codec

__all__ = ["SCHEMA", "check_schema", "look_after", "prepare_schema"]

logger = logging.getLogger(__name__)

# Raise this number if the version before cannot work with the new data. A new field of a job's record
# is no reason, if the version before can do without it. A new field of a ``Call`` is one: a fallback
# writes the call anew. 2: nodes keep the unknown fields of a record, which nodes of schema 1 drop.
SCHEMA: Final = 2


class Server(Protocol):
    """Sends a command to Redis."""

    async def call(self, *args: bytes | str | int) -> Any: ...


async def prepare_schema(
    link: Server, run: Callable[..., Awaitable[Any]], prefix: str, codec: Codec
) -> None:
    """Raise the schema number in Redis to :data:`SCHEMA`.

    ``run`` runs a script. Running nodes of an earlier version claim no more jobs (``SCHEMA`` in the
    scripts). Raises :class:`StartupError` if the data has a newer schema or another key.
    """
    key = f"{prefix}meta"
    try:
        await link.call("HSETNX", key, "schema", SCHEMA)
        await link.call("HSETNX", key, "probe", codec.probe())
        await check_schema(link, prefix, codec)
        # The probe is written with the first key, so that the older keys can be dropped one day. A
        # newer node may have joined between the two steps.
        if (held := await run("join", codec.probe())) > SCHEMA:
            raise _refused(prefix, str(held))
    except (RedisError, StoreUnavailable) as error:
        detail = error.detail if isinstance(error, StoreUnavailable) else str(error)
        raise StartupError(f"the store cannot be used: {detail}") from None


async def check_schema(link: Server, prefix: str, codec: Codec) -> None:
    """Raise :class:`StartupError` if the data has a newer schema or another key. No data is fine."""
    schema, probe = await link.call("HMGET", f"{prefix}meta", "schema", "probe")
    if schema is not None and (not schema.isdigit() or int(schema) > SCHEMA):
        raise _refused(prefix, schema.decode(errors="replace"))
    if probe is not None:
        codec.check(probe)


def _refused(prefix: str, schema: str) -> StartupError:
    return StartupError(
        f"Redis holds data under {prefix} with schema {schema!r}, and this version of asyncproxy knows "
        f"{SCHEMA}. A newer one wrote it, or another program: bring this one up to date, or set "
        "store.prefix to another"
    )


async def look_after(link: Server) -> None:
    """Log a warning if the configuration of Redis can lose jobs, as far as it can be read."""
    found = {}
    for name in ("maxmemory", "maxmemory-policy", "appendonly"):
        try:
            reply = await link.call("CONFIG", "GET", name)
        except (ResponseError, StoreUnavailable):
            return  # managed services do not show it
        found[name] = reply[1].decode() if len(reply) == 2 else ""
    if found["maxmemory-policy"] not in ("noeviction", "") and found["maxmemory"] != "0":
        logger.warning(
            "Redis evicts keys when its memory is full (maxmemory-policy %s): accepted jobs and "
            "results can be lost. Set it to noeviction",
            found["maxmemory-policy"],
        )
    if found["appendonly"] == "no":
        logger.warning(
            "Redis does not write what it is told to disk (appendonly no): accepted jobs are lost when "
            "it restarts. Set appendonly to yes"
        )
