"""What a figure is measured with: servers on their core, load on its own, and a meter between them."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import load, servers
from benchmarks.errors import Broken
from benchmarks.load import Load, Reply, Request
from benchmarks.machine import Cores, on_core
from benchmarks.pace import Pace, paced
from benchmarks.servers import Kept, Server
from benchmarks.sink import sink
from benchmarks.slices import Wanted, in_turns

__all__ = ["Lab", "Measurement", "Meter", "Sample"]

# Before each measurement: connections upstream, caches, and the interpreter's specialised code.
_WARM_UP_REQUESTS = 200

_DRAIN_S = 60.0

_GROWTH_S = 150.0

_POLLS_PER_S = 200

_LARGE_BYTES = 1_000_000

_LIVE = re.compile(r'^asyncproxy_jobs\{state="\w+"\} (\S+)$', re.MULTILINE)
_RESULTS = re.compile(r"^asyncproxy_store_results (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. ``value`` is in the unit of its figure, the rest says what to think of it.

    ``cpu_us`` is the server's processor time per request, which others on the machine disturb less than
    its throughput. ``busy`` is the part of its core that it used: well below 1.0, something else
    than the server was the limit; ``load_busy`` is that of wrk, which may be it. ``answer_bytes`` is
    the size of the body of each answer.
    """

    value: float
    answer_bytes: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_us: float | None = None
    busy: float | None = None
    load_busy: float | None = None


# It starts servers, says what load it wants for them, gets what that came to, and looks at them again.
Measurement = Generator[Wanted, Load, Sample]


@dataclass(slots=True)
class Meter:
    """Processor time that servers used inside :meth:`Lab.metered`."""

    cpu_s: float | None = None

    def cpu_us(self, requests: int) -> float | None:
        return None if self.cpu_s is None else self.cpu_s / requests * 1e6

    def busy(self, seconds: float) -> float | None:
        """The part of a core that they used in so many seconds."""
        return None if self.cpu_s is None else self.cpu_s / seconds


@dataclass(frozen=True)
class Lab:
    """Starts servers, loads them, and measures.

    ``seconds`` is how long each load lasts. ``interpreter`` runs the proxy, and ``around`` wraps each
    measurement of it: that is where a profiler comes in.
    """

    seconds: int
    cores: Cores
    folder: Path
    log_level: str = "warning"
    interpreter: Sequence[str] | None = None
    around: Callable[[Server], AbstractContextManager[None]] = field(default=lambda _: nullcontext())
    # By size and operation, median and p99 in µs: measured at once, for the figures of growth to share.
    grown: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def unpinned(self) -> Lab:
        """The same lab, with nothing on a core of its own."""
        return replace(self, cores=Cores())

    @contextmanager
    def proxy(self, upstream_url: str, **changes: Any) -> Iterator[Server]:
        """Our proxy. ``changes`` replaces sections of its configuration."""
        more = {} if self.interpreter is None else {"interpreter": self.interpreter}
        with servers.proxy(
            upstream_url,
            core=self.cores.server,
            folder=self.folder,
            log_level=self.log_level,
            changes=changes,
            **more,
        ) as server:
            yield server

    def baseline(self, role: str, **arguments: object) -> AbstractContextManager[Server]:
        """A bare handler; see :mod:`benchmarks.baselines`."""
        given = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
        return servers.baseline(role, *given, core=self.cores.server, folder=self.folder)

    def redis(self) -> AbstractContextManager[str]:
        """A Redis of its own, off the core of the servers."""
        return servers.redis(core=self.cores.upstream, folder=self.folder)

    def nginx(self, upstream_url: str) -> AbstractContextManager[Server]:
        """nginx as a reverse proxy, on the core of the servers."""
        return servers.nginx_proxy(upstream_url, core=self.cores.server, folder=self.folder)

    def round_robin(self, behind: Sequence[Server]) -> AbstractContextManager[Server]:
        """nginx before several servers, off their core."""
        urls = [server.url for server in behind]
        return servers.round_robin(urls, core=self.cores.upstream, folder=self.folder)

    def gateway(self, body: bytes) -> AbstractContextManager[Server]:
        """An upstream that answers ``body`` to everything, off the core of the servers."""
        return servers.nginx_files(body, core=self.cores.upstream, folder=self.folder)

    def kept(self, server: Server) -> Kept:
        """What is in the store of a proxy, as its metrics have it."""
        text = load.ask(server.url, Request("GET", "/-/metrics")).body.decode()
        live = sum(int(float(number)) for number in _LIVE.findall(text))
        results = _RESULTS.search(text)
        if results is None:
            raise Broken("the metrics do not say what is in the store")
        return Kept(live, int(float(results[1])))

    def ask(self, server: Server, request: Request, *, status: int, times: int = 1) -> Reply:
        """Send a request ``times`` in a row; the last answer, whose status must be ``status``."""
        reply = load.ask(server.url, request, times=times)
        server.submitted += times * (request.method == "POST")
        if reply.status != status:
            raise Broken(f"{request.method} {request.path}: {reply.status} in place of {status}")
        return reply

    def load(self, *wanted: Wanted, seconds: float | None = None) -> list[Load]:
        """Put loads on servers, in turns, for as long as the lab's loads last each."""
        found = in_turns(
            wanted, seconds=seconds or self.seconds, core=self.cores.load, folder=self.folder
        )
        for one, done in zip(wanted, found, strict=True):
            one.servers[0].submitted += done.requests * (one.request.method == "POST")
        return found

    def growth(self, operation: str, jobs: int) -> Sample:
        """What an operation takes with so many jobs in the store; see :mod:`benchmarks.growth`."""
        if not self.grown:
            interpreter = self.interpreter or (sys.executable,)
            with servers.grown(interpreter, core=self.cores.server, folder=self.folder) as server:
                with self.around(server):
                    output, _ = server.process.communicate(timeout=_GROWTH_S)
                try:
                    self.grown.update(json.loads(output))
                except ValueError:
                    said = server.log.read_text(encoding="utf-8", errors="replace").strip()
                    raise Broken(f"growth was not measured: {said[-500:]}") from None
        p50_us, p99_us = self.grown[str(jobs)][operation]
        return Sample(value=p50_us, p50_ms=p50_us / 1e3, p99_ms=p99_us / 1e3)

    def pace(
        self, server: Server, measured: Request, *, status: int, beside: Request | None, jobs_per_s: int
    ) -> Sample:
        """Latencies of a request that is sent at a steady pace while ``beside`` is submitted."""
        polls = Pace(server.url, measured, per_s=_POLLS_PER_S, status=status)
        jobs = None if beside is None else Pace(server.url, beside, per_s=jobs_per_s, status=202)
        with on_core(self.cores.load), self.metered(server) as meter:
            done = asyncio.run(paced(polls, self.seconds, beside=jobs))
        server.submitted += 0 if jobs is None else len(jobs.latencies_s)
        assert done.p99_ms is not None
        return Sample(
            value=1e3 * done.p99_ms,
            p50_ms=done.p50_ms,
            p99_ms=done.p99_ms,
            busy=meter.busy(self.seconds),
            load_busy=done.busy,
        )

    def sink(self, server: Server, request: Request, *, connections: int) -> Load:
        """As :meth:`load`, for large answers."""
        with on_core(self.cores.load):
            return sink(server.url, request, connections=connections, seconds=self.seconds)

    @contextmanager
    def metered(self, *servers: Server) -> Iterator[Meter]:
        """Measure what ``servers`` do inside the ``with``, all together. A profiler sees the first."""
        meter = Meter()
        with self.around(servers[0]):
            before = [server.cpu_s() for server in servers]
            yield meter
            after = [server.cpu_s() for server in servers]
        used = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
        if len(used) == len(servers):
            meter.cpu_s = sum(used)

    def throughput(
        self,
        server: Server,
        request: Request,
        *,
        status: int,
        connections: int = 64,
        behind: Sequence[Server] = (),
    ) -> Measurement:
        """Requests per second, all of them answered with ``status`` and as many bytes as the first.

        ``behind`` are the servers to be metered where ``server`` only spreads the requests among them.
        Large answers are taken by :func:`benchmarks.sink.sink`, not in turns: wrk would be the limit.
        """
        reply = self.ask(server, request, status=status, times=_WARM_UP_REQUESTS)
        with self.metered(*(behind or (server,))) as meter:
            if len(reply.body) < _LARGE_BYTES:
                done = yield Wanted((server, *behind), request, connections, len(reply.body))
            else:
                done = self.sink(server, request, connections=connections)
        if done.bytes_per_answer < len(reply.body):
            raise Broken(f"answers of {done.bytes_per_answer:.0f} bytes in place of {len(reply.body)}")
        if len(self.ask(server, request, status=status).body) != len(reply.body):
            raise Broken("the answer after the load is another one than before")
        return Sample(
            value=done.per_s,
            answer_bytes=len(reply.body),
            p50_ms=done.p50_ms,
            p99_ms=done.p99_ms,
            cpu_us=meter.cpu_us(done.requests),
            busy=meter.busy(done.seconds),
            load_busy=done.busy,
        )

    def finish_one(self, server: Server, submit: Request) -> Request:
        """Run one more job to its end; the request that polls it.

        The jobs of one credential go in their order: those before it are done by then too, but for
        a few that are in flight.
        """
        job: dict[str, str] = json.loads(self.ask(server, submit, status=202).body)
        poll = Request("GET", f"{submit.path}/{job['id']}", headers=submit.headers)
        end = time.monotonic() + _DRAIN_S
        while time.monotonic() < end:
            reply = load.ask(server.url, poll)
            if reply.status == 200:
                if b'"status":"completed"' not in reply.body[:200]:
                    raise Broken(f"the job did not complete: {reply.body[:300]!r}")
                return poll
            time.sleep(0.02)
        raise Broken("the jobs are not done in time")
