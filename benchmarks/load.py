"""Load: wrk on a core of its own, and single requests to prepare and to check."""

from __future__ import annotations

import http.client
import json
import resource
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.errors import Broken
from benchmarks.machine import on_core, tool

__all__ = ["Load", "Reply", "Request", "ask", "wrk"]

# What wrk measured, on a line of its own. Latencies in microseconds, as wrk counts them.
_REPORT = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nREPORT {"requests":%d,"duration_us":%d,"bytes":%d,"broken":%d,"refused":%d,' ..
    '"p50_us":%d,"p99_us":%d}\\n',
    summary.requests, summary.duration, summary.bytes,
    e.connect + e.read + e.write + e.timeout, e.status,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, sent again and again."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a single request."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Load:
    """What a run of wrk came to. All of its answers were below 400 and none was broken.

    ``busy`` is the part of its core that wrk used: near 1.0, it was the limit, and not the server.
    """

    requests: int
    seconds: float
    bytes: int
    p50_ms: float
    p99_ms: float
    busy: float

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds

    @property
    def bytes_per_answer(self) -> float:
        """Bytes on the wire per answer, its head included."""
        return self.bytes / max(1, self.requests)


def wrk(
    url: str, request: Request, *, connections: int, seconds: int, core: int | None, folder: Path
) -> Load:
    """Send ``request`` over ``connections`` for ``seconds``. Raises :class:`Broken` on any error."""
    script = folder / "load.lua"
    script.write_text(_script(request), encoding="utf-8")
    command = [tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
    command += ["-s", str(script), url + request.path]
    before_s = _children_cpu_s()
    with on_core(core):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=seconds + 20)
    finally:
        process.kill()
        process.wait()
    found = [line for line in output.splitlines() if line.startswith("REPORT ")]
    if not found:
        raise Broken(f"wrk has no report: {output.strip()[-300:]}")
    report: dict[str, Any] = json.loads(found[0].removeprefix("REPORT "))
    if report["broken"] or report["refused"] or not report["requests"]:
        raise Broken(
            f"of {report['requests']} answers {report['refused']} were errors; "
            f"{report['broken']} connections or requests broke"
        )
    wall_s = report["duration_us"] / 1e6
    return Load(
        requests=report["requests"],
        seconds=wall_s,
        bytes=report["bytes"],
        p50_ms=report["p50_us"] / 1e3,
        p99_ms=report["p99_us"] / 1e3,
        busy=(_children_cpu_s() - before_s) / wall_s,
    )


def _children_cpu_s() -> float:
    """Processor time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _script(request: Request) -> str:
    lines = [f"wrk.method = {_lua(request.method)}"]
    if request.body:
        lines.append(f"wrk.body = {_lua(request.body.decode())}")
    lines += [f"wrk.headers[{_lua(k)}] = {_lua(v)}" for k, v in request.headers.items()]
    return "\n".join(lines) + _REPORT


def _lua(text: str) -> str:
    """A Lua string. JSON's escapes are Lua's too, as long as the text is ASCII."""
    if not text.isascii():
        raise ValueError("only ASCII can be sent by wrk here")
    return json.dumps(text)


def ask(url: str, request: Request, *, times: int = 1) -> Reply:
    """Send ``request`` over one connection, ``times`` in a row. The last answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        for _ in range(times):
            connection.request(
                request.method, request.path, request.body or None, dict(request.headers)
            )
            response = connection.getresponse()
            reply = Reply(response.status, response.read())
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"{request.method} {request.path}: {error!r}") from error
    finally:
        connection.close()
    return reply
