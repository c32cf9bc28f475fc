"""Load: wrk on a core of its own, and single requests to prepare and to check."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.errors import Broken
from benchmarks.machine import on_core, tool

__all__ = ["Load", "Reply", "Request", "Wrk", "ask"]

# It is told when to end, and long before this.
_LONGEST_S: Final = 120

_END_S: Final = 15

# What wrk measured, on a line of its own. ``fastest_us`` are the latencies that 1 to 500 per mille of
# the requests did not exceed. Above them wrk's histogram has more than there was: it adds latencies of
# requests that a client would have liked to send while it waited for a slow answer.
_REPORT = """
done = function(summary, latency, requests)
  local e, fastest, seen = summary.errors, {}, 0
  for i = 1, #latency do
    local us, count = latency(i)
    seen = seen + count
    while #fastest + 1 <= 1000 * seen / summary.requests do
      table.insert(fastest, string.format("%d", us))
    end
    if #fastest >= 500 then break end
  end
  io.write(string.format(
    '\\nREPORT {"requests":%d,"bytes":%d,"broken":%d,"refused":%d,' ..
    '"cpu_s":%f,"fastest_us":[%s]}\\n',
    summary.requests, summary.bytes, e.connect + e.read + e.write + e.timeout, e.status,
    os.clock(), table.concat(fastest, ",")))
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
    """What a load came to. All of its answers were below 400 and none was broken.

    ``busy`` is the part of its core that the generator used: near 1.0, it was the limit, and not the
    server. ``p99_ms`` is not known of one that stood still now and then.
    """

    requests: int
    seconds: float
    bytes: int
    p50_ms: float
    busy: float
    p99_ms: float | None = None

    @classmethod
    def of(cls, report: Mapping[str, Any], *, seconds: float, held_up: int) -> Load:
        """From the report of wrk, which ran for ``seconds``.

        ``held_up`` requests were under way while it stood still. They are the slowest, and the
        median is that of the others.
        """
        others = max(0.0, 1 - held_up / report["requests"])
        return cls(
            requests=report["requests"],
            seconds=seconds,
            bytes=report["bytes"],
            p50_ms=report["fastest_us"][max(0, round(500 * others) - 1)] / 1e3,
            busy=report["cpu_s"] / seconds,
        )

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds

    @property
    def bytes_per_answer(self) -> float:
        """Bytes on the wire per answer, its head included."""
        return self.bytes / max(1, self.requests)


class Wrk:
    """A wrk that sends ``request`` over ``connections`` from now on."""

    def __init__(
        self, url: str, request: Request, *, connections: int, core: int | None, folder: Path
    ) -> None:
        script = folder / f"{time.monotonic_ns()}.lua"
        script.write_text(_script(request), encoding="utf-8")
        command = [tool("wrk"), "-t1", f"-c{connections}", f"-d{_LONGEST_S}s", "--timeout", "10s"]
        command += ["-s", str(script), url + request.path]
        with on_core(core):
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )

    def end(self) -> dict[str, Any]:
        """End it; its report. Raises :class:`Broken` if there was any error."""
        self.process.send_signal(signal.SIGINT)
        try:
            output, _ = self.process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            raise Broken("wrk does not end") from None
        found = [line for line in output.splitlines() if line.startswith("REPORT ")]
        if not found:
            raise Broken(f"wrk has no report: {output.strip()[-300:]}")
        report: dict[str, Any] = json.loads(found[0].removeprefix("REPORT "))
        if report["broken"] or report["refused"] or not report["requests"]:
            raise Broken(
                f"of {report['requests']} answers {report['refused']} were errors; "
                f"{report['broken']} connections or requests broke"
            )
        return report

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


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
