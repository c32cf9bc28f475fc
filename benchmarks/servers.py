"""Child processes that are measured or measured against. Each listens on a free loopback port.

Each is started in a session of its own and killed with all that it started when its ``with`` ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import Broken
from benchmarks.machine import on_core, tool

__all__ = [
    "UNLIMITED",
    "Kept",
    "Server",
    "baseline",
    "grown",
    "nginx_files",
    "nginx_proxy",
    "parked",
    "proxy",
    "redis",
    "round_robin",
]

_START_S = 15.0
_STOP_S = 15.0

_URL = re.compile(rb"http://127\.0\.0\.1:\d+")
_LOST = re.compile(r"ends with the process: (\d+) unfinished jobs are lost, (\d+) results")

# More than any figure makes: nothing may be refused while something else is measured.
UNLIMITED = 1 << 40


@dataclass(frozen=True, slots=True)
class Kept:
    """What a store held when its process ended."""

    live: int
    results: int

    def check(self, *, live: int, more: int) -> None:
        """See that every job that was answered 202 is there, and no result.

        A load ends with a request under way on each connection: ``more`` may have become jobs as well.
        """
        if not live <= self.live <= live + more or self.results:
            raise Broken(f"{live} live jobs were expected, not {self}")


@dataclass(slots=True, eq=False)
class Server:
    """A child process that listens at ``url``. ``submitted`` counts the POSTs that it answered."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    submitted: int = 0

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url.removeprefix("http://")

    def cpu_s(self) -> float | None:
        """Processor time that it has used, all threads. None where that cannot be known."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Its resident memory."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1]
        except OSError:
            raise Broken("the memory of a process can only be read from /proc") from None
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> Kept:
        """End a proxy as an operator does, and read from its log what its memory store lost."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise Broken("the proxy does not stop") from None
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if "Traceback" in text:
            raise Broken(f"an error in the proxy: {text.strip()[-500:]}")
        found = _LOST.search(text)
        return Kept(int(found[1]), int(found[2])) if found else Kept(0, 0)


@contextmanager
def proxy(
    upstream_url: str,
    *,
    core: int | None,
    folder: Path,
    log_level: str = "warning",
    interpreter: Sequence[str] = (sys.executable,),
    changes: Mapping[str, Any] | None = None,
) -> Iterator[Server]:
    """Our proxy, run by its own command. ``changes`` replaces sections of its configuration."""
    config: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "upstreams": [{"base_url": upstream_url}],
        "jobs": {
            "max_pending": UNLIMITED,
            "max_pending_per_credential": UNLIMITED,
        },
        "store": {"max_bytes": UNLIMITED},
        "shutdown_grace": "10ms",
        "log": {"level": log_level},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config | dict(changes or {})), encoding="utf-8")  # JSON is YAML
    command = [*interpreter, "-m", "asyncproxy", "serve", "--config", str(path)]
    with _child(command, core=core, folder=folder) as server:
        yield server
        if server.process.poll() is None:
            server.stop()  # else a profiler in it would write nothing


@contextmanager
def baseline(role: str, *arguments: str, core: int | None, folder: Path) -> Iterator[Server]:
    """One of the handlers of :mod:`benchmarks.baselines`."""
    command = [sys.executable, "-m", "benchmarks.baselines", role, *arguments]
    with _child(command, core=core, folder=folder) as server:
        yield server


@contextmanager
def grown(interpreter: Sequence[str], *, core: int | None, folder: Path) -> Iterator[Server]:
    """:mod:`benchmarks.growth`, which is its own load, and prints what it measured."""
    with _child([*interpreter, "-m", "benchmarks.growth"], core=core, folder=folder) as server:
        yield server


@contextmanager
def parked() -> Iterator[str]:
    """The URL of an upstream that takes connections and never answers.

    It is a socket that listens; the kernel takes the connections, nobody reads them.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def nginx_files(body: bytes, *, core: int | None, folder: Path) -> Iterator[Server]:
    """An upstream that answers every request, POST too, with the JSON text ``body``."""
    (folder / "files").mkdir(exist_ok=True)
    (folder / "files" / "body.json").write_bytes(body)
    location = """
        root files;
        default_type application/json;
        open_file_cache max=16;
        etag off;
        location / { rewrite ^ /body.json break; error_page 405 =200 /body.json; }
    """
    with _nginx("files", "", location, core=core, folder=folder) as server:
        yield server


@contextmanager
def nginx_proxy(upstream_url: str, *, core: int | None, folder: Path) -> Iterator[Server]:
    """nginx's own reverse proxy, set up as its manual says: HTTP/1.1 and kept connections."""
    with round_robin([upstream_url], core=core, folder=folder) as server:
        yield server


@contextmanager
def round_robin(urls: Sequence[str], *, core: int | None, folder: Path) -> Iterator[Server]:
    """nginx before several servers, which get the requests in turn."""
    addresses = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    pool = f"upstream behind {{ {addresses} keepalive 128; keepalive_requests 100000000; }}"
    location = """
        location / {
            proxy_pass http://behind;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffers 16 8k;
        }
    """
    with _nginx("proxy", pool, location, core=core, folder=folder) as server:
        yield server


@contextmanager
def redis(*, core: int | None, folder: Path) -> Iterator[str]:
    """The URL of a Redis of its own, empty, that writes all it is told to disk each second."""
    port = _free_port()
    own = folder / f"redis-{port}"
    own.mkdir()
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(own),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
    }
    command = [tool("redis-server"), *(part for k, v in options.items() for part in (f"--{k}", v))]
    try:
        with _child(command, core=core, folder=folder, port=port) as server:
            yield f"redis://{server.address}/0"
    finally:
        shutil.rmtree(own)


@contextmanager
def _nginx(name: str, http: str, server: str, *, core: int | None, folder: Path) -> Iterator[Server]:
    port = _free_port()
    temporary = "\n".join(
        f"{kind}_temp_path {name}-{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / f"{name}.conf"
    config.write_text(
        f"""
        daemon off;
        master_process off;
        pid {name}.pid;
        error_log stderr warn;
        events {{ worker_connections 4096; }}
        http {{
            access_log off;
            sendfile on;
            tcp_nopush on;
            keepalive_requests 100000000;
            {temporary}
            {http}
            server {{ listen 127.0.0.1:{port} backlog=4096; {server} }}
        }}
        """,
        encoding="utf-8",
    )
    command = [tool("nginx"), "-p", str(folder), "-e", "stderr", "-c", str(config)]
    with _child(command, core=core, folder=folder, port=port) as child:
        yield child


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@contextmanager
def _child(
    command: Sequence[str], *, core: int | None, folder: Path, port: int | None = None
) -> Iterator[Server]:
    """Run ``command`` until the ``with`` ends. Without a ``port`` it prints its URL when it listens."""
    log = folder / f"{time.monotonic_ns()}.log"
    with log.open("wb") as stderr, on_core(core):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is ours to handle, and a whole group can be killed
        )
    try:
        url = _printed_url(process) if port is None else _accepting(process, port)
        if url is None:
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            raise Broken(f"{Path(command[0]).name} did not start: {text[-500:]}")
        yield Server(url, process, log)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _printed_url(process: subprocess.Popen[bytes]) -> str | None:
    assert process.stdout is not None
    end = time.monotonic() + _START_S
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < end and selector.select(end - time.monotonic()):
            piece = os.read(process.stdout.fileno(), 4096)
            seen += piece
            if found := _URL.search(seen):
                return found[0].decode()
            if not piece:
                return None
    return None


def _accepting(process: subprocess.Popen[bytes], port: int) -> str | None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.01)
        else:
            return f"http://127.0.0.1:{port}"
    return None
