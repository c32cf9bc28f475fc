"""The memory that slow readers of a large response take: ``python -m benchmarks.slow_readers``.

A job has a result of 58 MiB. 200 clients ask for it at once, read the first 64 KiB, and then nothing
more. A row has the most memory that the proxy took beyond what it had when the job was done.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.servers import Server, nginx_files, proxy, redis

__all__: list[str] = []

_READERS: Final = 200
_RESULT_BYTES: Final = 58 * 1024**2
_READ_BYTES: Final = 64 * 1024
_BUFFER_BYTES: Final = 16 * 1024  # of a reader's socket
_HOLD_S: Final = 5.0
_LIMIT_S: Final = 120.0
_MIB: Final = 1024**2
_SUBMIT: Final = ("POST", "/v1/async/embeddings", '{"model":"m","input":"x"}')


@contextmanager
def _store(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The ``store`` section of a configuration, for a store of its own."""
    if name == "redis":
        with redis(core=None, folder=folder) as url:
            yield {"url": url, "encryption_key": base64.b64encode(os.urandom(32)).decode()}
    else:
        yield {"url": f"sqlite://{folder}/jobs.db" if name == "sqlite" else "memory://"}


def _finished(address: str) -> str:
    """The path of a job that is completed."""
    connection = http.client.HTTPConnection(address, timeout=_LIMIT_S)
    method, path, body = _SUBMIT
    connection.request(method, path, body, {"Content-Type": "application/json"})
    location = f"{path}/{json.load(connection.getresponse())['id']}"
    while True:
        connection.request("GET", f"{location}?wait=30", headers={"Connection": "close"})
        answer = connection.getresponse()
        if b'"completed"' in answer.read(4096):
            connection.close()
            return location
        time.sleep(0.2)
        connection.close()


def _reader(stack: ExitStack, address: str, location: str, version: str) -> socket.socket:
    host, _, port = address.partition(":")
    reader = stack.enter_context(socket.socket())
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    reader.settimeout(_LIMIT_S)
    reader.connect((host, int(port)))
    reader.sendall(f"GET {location} {version}\r\nHost: {address}\r\n\r\n".encode())
    return reader


def _peak_bytes(server: Server, location: str, version: str) -> int:
    process = Path(f"/proc/{server.process.pid}")
    (process / "clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = server.rss_bytes()
    with ExitStack() as stack:
        readers = [_reader(stack, server.address, location, version) for _ in range(_READERS)]
        for reader in readers:
            seen = 0
            while seen < _READ_BYTES:
                seen += len(reader.recv(_READ_BYTES))
        time.sleep(_HOLD_S)
    lines = (process / "status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return max(0, peak - before)


def _measured(name: str, version: str) -> int:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body = b'{"data":"' + b"x" * _RESULT_BYTES + b'"}'
        gateway = stack.enter_context(nginx_files(body, core=None, folder=folder))
        changes: dict[str, Any] = {}
        if name != "pass-through":
            changes["store"] = stack.enter_context(_store(name, folder))
        server = stack.enter_context(
            proxy(f"{gateway.url}/v1", core=None, folder=folder, changes=changes)
        )
        location = "/v1/models" if name == "pass-through" else _finished(server.address)
        return _peak_bytes(server, location, version)


def main() -> None:
    """Print the table."""
    print(f"| {_READERS} readers of | HTTP/1.0, MiB | HTTP/1.1, MiB |")
    print("| - | -: | -: |")
    for name in ("memory", "sqlite", "redis", "pass-through"):
        cells = [f"{_measured(name, f'HTTP/1.{minor}') / _MIB:.0f}" for minor in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
