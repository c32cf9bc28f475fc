"""Load at a steady pace: so many requests per second, however slowly they are answered.

Who waits for an answer before the next request asks least when the server is slowest. Here each request
leaves at its time, on a connection that is free or on a new one.
"""

from __future__ import annotations

import asyncio
import time
from statistics import quantiles
from urllib.parse import urlsplit

from benchmarks.errors import Broken
from benchmarks.load import Load, Request

__all__ = ["Pace", "paced"]

_PATIENCE_S = 20.0


class Pace:
    """One request, sent ``per_s`` times a second. All answers must have ``status``."""

    def __init__(self, url: str, request: Request, *, per_s: int, status: int) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        fields = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        self._bytes = (
            f"{request.method} {request.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{fields}"
            f"Content-Length: {len(request.body)}\r\n\r\n"
        ).encode() + request.body
        self._per_s = per_s
        self._status = b"HTTP/1.1 %d " % status
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._received = 0
        self.latencies_s: list[float] = []

    async def send(self, seconds: float) -> Load:
        """Send for so many seconds, and wait for all answers."""
        started, used_s = time.monotonic(), time.process_time()
        try:
            async with asyncio.timeout(seconds + _PATIENCE_S), asyncio.TaskGroup() as requests:
                for number in range(int(self._per_s * seconds)):
                    await asyncio.sleep(started + number / self._per_s - time.monotonic())
                    requests.create_task(self._ask())
        except TimeoutError:
            raise Broken(f"an answer did not come for {_PATIENCE_S:g} s") from None
        except ExceptionGroup as failed:
            raise Broken(f"a request failed: {failed.exceptions[0]!r}") from failed
        finally:
            for _, writer in self._free:
                writer.close()
        wall_s = time.monotonic() - started
        hundredths = quantiles((1e3 * s for s in self.latencies_s), n=100)
        return Load(
            requests=len(self.latencies_s),
            seconds=wall_s,
            bytes=self._received,
            p50_ms=hundredths[49],
            p99_ms=hundredths[98],
            busy=(time.process_time() - used_s) / wall_s,
        )

    async def _ask(self) -> None:
        reader, writer = (
            self._free.pop() if self._free else await asyncio.open_connection(*self._address)
        )
        sent_at = time.monotonic()
        writer.write(self._bytes)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(self._status):
            raise Broken(f"not an answer of {self._status.decode()}: {head[:200]!r}")
        _, found, rest = head.lower().partition(b"content-length: ")
        if not found:
            raise Broken(f"an answer without its length: {head[:200]!r}")
        body = await reader.readexactly(int(rest.partition(b"\r\n")[0]))
        self.latencies_s.append(time.monotonic() - sent_at)
        self._received += len(head) + len(body)
        self._free.append((reader, writer))


async def paced(measured: Pace, seconds: float, *, beside: Pace | None = None) -> Load:
    """Send ``measured`` for so many seconds, with ``beside`` as the load that it has to bear."""
    if beside is None:
        return await measured.send(seconds)
    bearing = asyncio.create_task(beside.send(seconds))
    try:
        load = await measured.send(seconds)
        await bearing
    finally:
        bearing.cancel()
        await asyncio.gather(bearing, return_exceptions=True)
    return load
