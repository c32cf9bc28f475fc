"""Checks whether a Redis can be used, without becoming a node: writes nothing."""

from __future__ import annotations

from typing import Any, Final

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from asyncproxy.core.errors import StartupError
from asyncproxy.stores.codec import Codec
from asyncproxy.stores.redis.address import Address
from asyncproxy.stores.redis.schema import check_schema, look_after

__all__ = ["probe"]

_CONNECT_S: Final = 5.0


class _Server:
    """A connection that runs one command after the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def call(self, *args: bytes | str | int) -> Any:
        await self._connection.send_command(*args)
        return await self._connection.read_response(disable_decoding=True)


async def probe(url: str, prefix: str, codec: Codec) -> None:
    """Connect as a node does, and check the data under ``prefix``. Logs the warnings of a node.

    Raises :class:`StartupError` if Redis is out of reach, or has data of a newer schema or another key.
    """
    address, key = Address(url, connect_s=_CONNECT_S), f"{{{prefix}}}:"
    try:
        (connection,) = await address.connect(1, key)
        try:
            await check_schema(_Server(connection), key, codec)
            await look_after(_Server(connection))
        finally:
            await connection.disconnect(nowait=True)
    except (TimeoutError, RedisError, OSError) as error:
        said = str(error) or type(error).__name__
        raise StartupError(f"the store {address} cannot be used: {said}") from None
