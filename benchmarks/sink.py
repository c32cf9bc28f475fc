"""Load for large answers, which are thrown away where they arrive.

wrk takes an answer in pieces of 8 KiB: at 3 MB each it has more to do than the server. Here the kernel
drops what comes after the head (``MSG_TRUNC``, on Linux), so that the server is what is measured.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from statistics import quantiles
from urllib.parse import urlsplit

from benchmarks.errors import Broken
from benchmarks.load import Load, Request

__all__ = ["sink"]

_PIECE = 1 << 20
_DROP = socket.MSG_TRUNC if sys.platform == "linux" else 0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_STALL_S = 10.0


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    sent_at: float = 0.0
    missing: int | None = None  # of the answer; None: its head has not arrived
    latencies_s: list[float] = field(default_factory=list)
    received: int = 0


def sink(url: str, request: Request, *, connections: int, seconds: int) -> Load:
    """GET over ``connections`` for ``seconds``. Raises :class:`Broken` if an answer is not a 200."""
    parts = urlsplit(url)
    fields = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    head = f"GET {request.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{fields}\r\n".encode()
    buffer = bytearray(_PIECE)
    address = (parts.hostname or "", parts.port or 80)
    with selectors.DefaultSelector() as selector:
        opened = [
            _Connection(socket.create_connection(address, timeout=10)) for _ in range(connections)
        ]
        try:
            started, used_s = time.monotonic(), time.process_time()
            for connection in opened:
                selector.register(connection.sock, selectors.EVENT_READ, connection)
                _send(connection, head)
            while (now := time.monotonic()) < started + seconds:
                ready = selector.select(_STALL_S)
                if not ready:
                    raise Broken(f"no byte came for {_STALL_S:g} s")
                for key, _ in ready:
                    if _take(key.data, buffer):
                        _send(key.data, head)
            wall_s, used_s = now - started, time.process_time() - used_s
        finally:
            for connection in opened:
                connection.sock.close()
    latencies_ms = [1e3 * s for connection in opened for s in connection.latencies_s]
    if len(latencies_ms) < 2:
        raise Broken("not a single answer came")
    hundredths = quantiles(latencies_ms, n=100)
    return Load(
        requests=len(latencies_ms),
        seconds=wall_s,
        bytes=sum(connection.received for connection in opened),
        p50_ms=hundredths[49],
        busy=used_s / wall_s,
        p99_ms=hundredths[98],
    )


def _send(connection: _Connection, head: bytes) -> None:
    connection.sent_at = time.monotonic()
    connection.sock.sendall(head)


def _take(connection: _Connection, buffer: bytearray) -> bool:
    """Take what has arrived. Whether that is the end of an answer."""
    if connection.missing is None:
        # A head arrives in one piece on loopback; what comes with it is little.
        start = connection.sock.recv(4096)
        head, end, body = start.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if not end or length is None or not head.startswith(b"HTTP/1.1 200 "):
            raise Broken(f"not an answer of 200 with a length: {head[:200]!r}")
        connection.missing = int(length[1]) - len(body)
        connection.received += len(start)
    else:
        size = min(len(buffer), connection.missing)
        count = connection.sock.recv_into(buffer, size, _DROP)
        if not count:
            raise Broken("an answer broke off")
        connection.missing -= count
        connection.received += count
    if connection.missing:
        return False
    connection.missing = None
    connection.latencies_s.append(time.monotonic() - connection.sent_at)
    return True
