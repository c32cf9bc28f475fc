"""Whether what is in Redis is ours to read, and whether Redis keeps it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from redis.exceptions import RedisError, ResponseError

from asyncproxy.core.errors import StartupError, StoreUnavailable
from asyncproxy.stores.codec import Codec

__all__ = ["SCHEMA", "check_schema", "look_after", "prepare_schema"]

logger = logging.getLogger(__name__)

# Raised by a version that writes what the version before cannot work with. Another field in a record is
# no reason, if the version before can do without. In a ``Call`` it is: a fallback writes that anew.
# 2: a node keeps the fields of a record that it does not know. Those of schema 1 drop them.
SCHEMA: Final = 2


class Server(Protocol):
    """Sends a command to Redis."""

    async def call(self, *args: bytes | str | int) -> Any: ...


async def prepare_schema(
    link: Server, run: Callable[..., Awaitable[Any]], prefix: str, codec: Codec
) -> None:
    """Raise the schema of what is in Redis to ours. Raises :class:`StartupError` if it is not ours.

    ``run`` runs a script. Nodes of an earlier version that run go on without claiming (``SCHEMA`` in
    the scripts).
    """
    key = f"{prefix}meta"
    try:
        await link.call("HSETNX", key, "schema", SCHEMA)
        await link.call("HSETNX", key, "probe", codec.probe())
        await check_schema(link, prefix, codec)
        # With the first of our keys, so that the older ones can be dropped one day. A newer node may
        # have come between the two steps.
        if (held := await run("join", codec.probe())) > SCHEMA:
            raise _refused(prefix, str(held))
    except (RedisError, StoreUnavailable) as error:
        detail = error.detail if isinstance(error, StoreUnavailable) else str(error)
        raise StartupError(f"the store cannot be used: {detail}") from None


async def check_schema(link: Server, prefix: str, codec: Codec) -> None:
    """See that what is there is ours, if there is anything. Raises :class:`StartupError`."""
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
    """Warn of a Redis that may lose jobs by its configuration, as far as it can be read."""
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
