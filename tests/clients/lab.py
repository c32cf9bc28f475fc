"""The servers of ``make clients``: an upstream, proxies, nginx before them, and a cutter of connections."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from tests import gateway as gateways
from tests.clients.upstream import Upstream

__all__ = ["Lab", "cutting", "lab", "nginx_binary"]

# A call takes longer than nginx allows, and nginx allows longer than the relay holds.
UPSTREAM_S = 5.0
_NGINX_S = 2
_RELAY_HOLD_S = 1
_FEW_HOPS = 2

_PROXY = """\
listen: 127.0.0.1:0
upstreams:
  - base_url: {gateway}/v1
    retry: {{attempts: 1}}
jobs: {{relay_hold: {hold}s, relay_max_hops: {hops}}}
shutdown_grace: 1s
"""

# The first server is nginx as it comes (HTTP/1.0 to what is behind it), the other one keeps connections.
_NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
{user}
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/client;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream few {{ server {few}; keepalive 8; }}
  proxy_read_timeout {timeout}s;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://{many}; }}
  }}
  server {{
    listen 127.0.0.1:{few_port};
    location / {{
      proxy_pass http://few;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
    }}
  }}
}}
"""


class Lab:
    """Where things listen. ``direct`` is the upstream without anything before it."""

    def __init__(self, upstream: Upstream, direct: str, proxied: str, few_hops: str) -> None:
        self.upstream = upstream
        self.direct = direct
        self.proxied = proxied
        self.few_hops = few_hops


def nginx_binary() -> str | None:
    """nginx, which is not on everybody's path."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")


@asynccontextmanager
async def lab(folder: Path) -> AsyncIterator[Lab]:
    """Everything started and answering; gone at the end."""
    async with gateways.running() as gateway:
        gateway.behaviour = upstream = Upstream(UPSTREAM_S)
        async with (
            _proxy(folder / "many", gateway.url, hops=18) as many,
            _proxy(folder / "few", gateway.url, hops=_FEW_HOPS) as few,
            _nginx(folder, many, few) as (proxied, few_hops),
        ):
            yield Lab(upstream, gateway.url, proxied, few_hops)


@asynccontextmanager
async def _proxy(name: Path, gateway: str, *, hops: int) -> AsyncIterator[str]:
    config = name.with_suffix(".yaml")
    config.write_text(_PROXY.format(gateway=gateway, hold=_RELAY_HOLD_S, hops=hops))
    with name.with_suffix(".log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "asyncproxy", "serve", "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(20):
                line = (await process.stdout.readline()).decode()
            if " listens on " not in line:
                raise RuntimeError(f"the proxy does not start: {name.with_suffix('.log').read_text()}")
            yield line.split(" listens on http://")[1].split(",")[0]
        finally:
            await _end(process)


@asynccontextmanager
async def _nginx(folder: Path, many: str, few: str) -> AsyncIterator[tuple[str, str]]:
    port, few_port = _free_port(), _free_port()
    config = folder / "nginx.conf"
    config.write_text(
        _NGINX.format(
            folder=folder,
            user="user root;" if os.geteuid() == 0 else "",
            timeout=_NGINX_S,
            many=many,
            few=few,
            port=port,
            few_port=few_port,
        )
    )
    binary = nginx_binary()
    assert binary is not None
    process = await asyncio.create_subprocess_exec(
        binary,
        *("-p", str(folder), "-c", str(config), "-e", str(folder / "nginx.log")),
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        urls = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{few_port}"
        for url in urls:
            await _until_ready(f"{url}/-/ready", process)
        yield urls
    finally:
        await _end(process)


async def _until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(20), aiohttp.ClientSession() as session:
        while process.returncode is None:
            with suppress(aiohttp.ClientConnectionError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)
    raise RuntimeError("nginx does not start; what it says stands above")


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and SIGKILL if that is not enough."""
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cutter:
    """How many connections were cut."""

    def __init__(self) -> None:
        self.cut = 0
        self.timer: asyncio.TimerHandle | None = None
        self.writers: set[asyncio.StreamWriter] = set()

    def begin(self, after_s: float) -> None:
        """Cut what is open in so long. Only the first connection counts."""
        if self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(after_s, self._cut)

    def _cut(self) -> None:
        for writer in self.writers:
            self.cut += 1
            writer.transport.abort()


@asynccontextmanager
async def cutting(url: str, after_s: float) -> AsyncIterator[tuple[str, Cutter]]:
    """An address that leads to ``url``, whose connections break ``after_s`` the first one was made."""
    host, port = url.removeprefix("http://").split(":")
    cutter = Cutter()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        cutter.begin(after_s)
        onward = None
        try:
            there, onward = await asyncio.open_connection(host, int(port))
            cutter.writers |= {writer, onward}
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, onward))
                group.create_task(_pump(there, writer))
        except* (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, onward):
                if each is not None:
                    cutter.writers.discard(each)
                    each.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", cutter
    finally:
        server.close()
        if cutter.timer is not None:
            cutter.timer.cancel()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError
