"""The address of a Redis: reads the URL and connects, through Sentinel if the URL names one."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    ResponseError,
)

from asyncproxy.core.errors import StartupError

__all__ = ["Address"]

_SENTINEL: Final = "redis+sentinel"
_SENTINEL_PORT: Final = 26379


class Address:
    """A server, or the master of a Sentinel's service: ``redis+sentinel://user:pass@host:port,…/name/0``.

    ``str()`` gives the address without the password. Raises :class:`StartupError` for a URL that cannot
    be used.
    """

    def __init__(self, url: str, *, connect_s: float) -> None:
        self._options: dict[str, Any] = {
            "socket_connect_timeout": connect_s,
            "socket_timeout": None,  # a pipeline has its own timeout, and a listener may hear nothing
            "socket_keepalive": True,
            "health_check_interval": 0,
            "retry": Retry(NoBackoff(), 0),  # the ConnectionManager retries, with all connections
            "protocol": 2,
        }
        self._sentinels: list[tuple[str, int]] = []
        self._service = ""
        self._kind: type[Connection] = Connection
        try:
            self._read(url)
        except ValueError as error:
            raise StartupError(f"store.url cannot be used: {error}") from None

    def __str__(self) -> str:
        if self._sentinels:
            hosts = ",".join(f"{host}:{port}" for host, port in self._sentinels)
            return f"{_SENTINEL}://{hosts}/{self._service}"
        host, port = self._options.get("host", "localhost"), self._options.get("port", 6379)
        return f"redis://{host}:{port}/{self._options.get('db', 0)}"

    async def connect(self, count: int, key: str) -> list[Connection]:
        """Open ``count`` connections to the server that has ``key``, with their handshake done.

        In a cluster this server is the master of the key's slot, whichever node the URL names. Raises
        the errors of redis-py. Then no connection stays open.
        """
        options = self._options
        if self._sentinels:
            host, port = await self._master()
            options = options | {"host": host, "port": port}
        try:
            return await self._connect(options, count, key)
        except MovedError as moved:
            return await self._connect(options | {"host": moved.host, "port": moved.port}, count, key)

    async def _connect(self, options: dict[str, Any], count: int, key: str) -> list[Connection]:
        connections = [self._kind(**options) for _ in range(count)]
        try:
            for connection in connections:
                await connection.connect()  # type: ignore[no-untyped-call]
            await _must_be_master(connections[0])
            await connections[0].send_command("EXISTS", key)
            await connections[0].read_response()
        except BaseException:
            for connection in connections:
                await connection.disconnect(nowait=True)
            raise
        return connections

    def _read(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != _SENTINEL:
            options = dict(parse_url(url))
            kind: Any = options.pop("connection_class", Connection)
            self._kind = kind
            self._options |= options
            return
        userinfo, _, hosts = parts.netloc.rpartition("@")
        for host in hosts.split(","):
            name, _, port = host.partition(":")
            self._sentinels.append((name, int(port or _SENTINEL_PORT)))
        self._service, _, database = parts.path.strip("/").partition("/")
        if not self._service:
            raise ValueError(
                f"{_SENTINEL}://host:26379,host2:26379/name-of-the-master/0 names a master"
            )
        username, _, password = userinfo.partition(":")
        self._options |= {
            "db": int(database or 0),
            "username": unquote(username) or None,
            "password": unquote(password) or None,
        }

    async def _master(self) -> tuple[str, int]:
        """The current master. Sentinel gets the credentials of the URL too, if it asks for any."""
        try:
            return await self._ask({})
        except AuthenticationError:
            known = {key: self._options[key] for key in ("username", "password")}
            return await self._ask(known)

    async def _ask(self, credentials: dict[str, Any]) -> tuple[str, int]:
        timeout = self._options["socket_connect_timeout"]
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            self._sentinels,
            sentinel_kwargs={
                "socket_timeout": timeout,
                "socket_connect_timeout": timeout,
                **credentials,
            },
        )
        try:
            host, port = await sentinel.discover_master(self._service)
        finally:
            clients: list[Redis] = sentinel.sentinels
            for client in clients:
                await client.aclose()
        return str(host), int(port)


async def _must_be_master(connection: Connection) -> None:
    """Raise :class:`ReadOnlyError` for a replica: perhaps the master until a moment ago."""
    try:
        await connection.send_command("ROLE")
        role: Any = await connection.read_response(disable_decoding=True)
    except NoPermissionError:
        return  # this user may not run ROLE; a write will fail on a replica
    except ResponseError as error:
        if "unknown command" in str(error):
            return  # this service has no ROLE; a write will fail on a replica
        raise
    if role[0] != b"master":
        raise ReadOnlyError("this server is a replica")
