"""Real gateways that go away, with the default ``retry``: ``python -m tests.chaos.outages restart --away 60``.

Prints what became of the jobs, the calls per minute while the gateway was away, and the calls in flight
after it came back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from tests.chaos.lab import Proxy, free_port

__all__ = ["main"]

_BAR = "#" * 64


class MortalGateway:
    """A gateway process that can be killed, suspended and started again."""

    def __init__(self, log: Path, *options: str) -> None:
        self.port = free_port()
        self.deaths = 0
        self._log = log
        self._options = options
        self._process: asyncio.subprocess.Process

    async def start(self) -> None:
        """Start, and wait until it listens."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.mortal_gateway"),
            *("--port", str(self.port), "--log", str(self._log), *self._options),
        )
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return

    async def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        await self._process.wait()

    def suspend(self) -> None:
        """Let connections and calls hang."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self._process.send_signal(signal.SIGCONT)

    async def keep_alive(self, pause_s: float) -> None:
        """Start it again whenever it dies, until this is cancelled."""
        while True:
            await self._process.wait()
            self.deaths += 1
            await asyncio.sleep(pause_s)
            await self.start()

    def calls(self) -> list[tuple[float, float, int, str]]:
        """When its calls began and ended, their statuses and texts."""
        if not self._log.exists():
            return []
        return [tuple(json.loads(line)) for line in self._log.read_text("utf-8").splitlines()]


@asynccontextmanager
async def nginx(folder: Path, port: int, read_timeout: str) -> AsyncIterator[tuple[int, Path]]:
    """An nginx in front of a port: its own port, and its access log."""
    own, log = free_port(), folder / "nginx-access.log"
    config = folder / "nginx.conf"
    config.write_text(
        f"""daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;
events {{ worker_connections 512; }}
http {{
  log_format calls '$msec $status $request_time'; access_log {log} calls;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{ listen 127.0.0.1:{own};
    location / {{ proxy_pass http://127.0.0.1:{port}; proxy_read_timeout {read_timeout}; }} }}
}}""",
        encoding="utf-8",
    )
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    process = await asyncio.create_subprocess_exec(program, "-p", str(folder), "-c", str(config))
    try:
        yield own, log
    finally:
        process.terminate()
        await process.wait()


async def _run(options: argparse.Namespace, folder: Path) -> int:
    log = folder / "calls.log"
    gateway_options = ["--delay", str(options.delay)]
    if options.scenario == "rate":
        gateway_options += ["--rate", str(options.rate), "--period", str(options.period)]
        gateway_options += ["--window"] * options.window + ["--retry-after"] * options.retry_after
    gateway = MortalGateway(log, *gateway_options)
    async with AsyncExitStack() as stack:
        await gateway.start()
        stack.push_async_callback(gateway.kill)
        port, front_log = gateway.port, None
        if options.nginx or options.scenario == "hang":
            front = nginx(folder, gateway.port, options.read_timeout)
            port, front_log = await stack.enter_async_context(front)
        config = folder / "config.json"
        upstream: dict[str, Any] = {"base_url": f"http://127.0.0.1:{port}/v1"}
        if options.concurrency:
            upstream["concurrency"] = options.concurrency
        store = options.store if "://" in options.store else f"sqlite://{folder}/jobs.db"
        sections = {
            "upstreams": [upstream],
            "store": {"url": store},
            "jobs": {"max_pending": 50_000, "max_pending_per_credential": 50_000},
        }
        config.write_text(json.dumps(sections), encoding="utf-8")
        proxy = Proxy(config, folder / "proxy.log")
        await proxy.start()
        stack.push_async_callback(proxy.kill)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        without_s = 0.0
        if options.scenario in ("restart", "hang"):
            began = time.time()
            await _ended(session, proxy, await _submit(session, proxy, options.jobs, "before"))
            without_s = time.time() - began
            print(f"{options.jobs} jobs without an outage: {without_s:.1f} s")
        scenario = _SCENARIOS[options.scenario]
        failed: int = await scenario(options, gateway, proxy, session, without_s)
        if front_log is not None:
            statuses = Counter(line.split()[1] for line in front_log.read_text().splitlines())
            print(f"nginx answered: {dict(statuses)}")
    text = (folder / "proxy.log").read_text(encoding="utf-8")
    print("the proxy's log, without the lines of jobs that completed:")
    kept = [line for line in text.splitlines() if "completed" not in line]
    print("\n".join(kept[:40]))
    held = [line for line in text.splitlines() if "completed" in line and "held" in line]
    print("\n".join(held[-2:]))
    return failed


async def _outage(
    options: argparse.Namespace,
    gateway: MortalGateway,
    proxy: Proxy,
    session: aiohttp.ClientSession,
    without_s: float,
) -> int:
    jobs = await _submit(session, proxy, options.jobs, "during")
    await asyncio.sleep(options.delay)
    hangs = options.scenario == "hang"
    if hangs:
        gateway.suspend()
    else:
        await gateway.kill()
    await asyncio.sleep(options.away)
    if hangs:
        gateway.resume()
    else:
        await gateway.start()
    back = time.time()
    failed = await _ended(session, proxy, jobs)
    after_s = time.time() - back
    print(f"away for {options.away:g} s: {failed} of {len(jobs)} failed")
    print(f"the last one is done {after_s:.1f} s after the return ({after_s / without_s:.2f} times)")
    _plot(gateway.calls(), back)
    return failed


async def _poison(
    options: argparse.Namespace,
    gateway: MortalGateway,
    proxy: Proxy,
    session: aiohttp.ClientSession,
    without_s: float,
) -> int:
    keeping = asyncio.create_task(gateway.keep_alive(options.away))
    half = options.jobs // 2
    good = await _submit(session, proxy, half, "good")
    poison = await _submit(session, proxy, 1, "poison")
    good += await _submit(session, proxy, options.jobs - half, "good")
    failed = await _ended(session, proxy, good)
    bad = await _ended(session, proxy, poison)
    keeping.cancel()
    print(f"{failed} of {len(good)} good jobs failed, {bad} of 1 poisonous; {gateway.deaths} deaths")
    return failed + (1 - bad)


async def _rate(
    options: argparse.Namespace,
    gateway: MortalGateway,
    proxy: Proxy,
    session: aiohttp.ClientSession,
    without_s: float,
) -> int:
    began = time.time()
    failed = await _ended(session, proxy, await _submit(session, proxy, options.jobs, "rated"))
    calls = gateway.calls()
    late = calls[len(calls) // 2 :]
    refused, late_refused = (sum(call[2] == 429 for call in some) for some in (calls, late))
    print(f"{failed} of {options.jobs} failed in {time.time() - began:.1f} s")
    print(f"refused: {refused} of {len(calls)} calls, {late_refused} of the last {len(late)}")
    return failed


Scenario = Callable[..., Any]
_SCENARIOS: dict[str, Scenario] = {
    "restart": _outage,
    "hang": _outage,
    "poison": _poison,
    "rate": _rate,
}


async def _submit(session: aiohttp.ClientSession, proxy: Proxy, count: int, text: str) -> list[str]:
    found = []
    for number in range(count):
        body = {"model": "m", "input": f"{text} {number}"}
        url = f"{proxy.url}/v1/async/embeddings"
        headers = {"Authorization": "Bearer sk-outages"}
        async with session.post(url, json=body, headers=headers) as response:
            assert response.status == 202, await response.text()
            found.append((await response.json())["id"])
    return found


async def _ended(session: aiohttp.ClientSession, proxy: Proxy, jobs: list[str]) -> int:
    """See all jobs to their ends. How many have failed."""
    failed = 0
    for job in jobs:
        url = f"{proxy.url}/v1/async/embeddings/{job}?wait=10"
        status = 202
        while status == 202:
            async with session.get(url, headers={"Authorization": "Bearer sk-outages"}) as response:
                status, envelope = response.status, await response.json()
        if envelope["status"] != "completed":
            failed += 1
            print(f"{job}: {json.dumps(envelope)[:300]}")
    return failed


def _plot(calls: list[tuple[float, float, int, str]], back: float) -> None:
    noticed = min((began for began, _, _, _ in calls if began > back), default=back)
    print(
        f"the first call comes {noticed - back:.1f} s after the return. Calls in flight, each 100 ms:"
    )
    for tenth in range(50):
        at = noticed + tenth / 10
        count = sum(began < at + 0.1 and ended > at for began, ended, _, _ in calls)
        print(f"{tenth / 10:4.1f} s {count:4} {_BAR[:count]}")


def main() -> int:
    """Run one scenario. Returns 1 if a job failed that should not have."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.outages", description=__doc__)
    parser.add_argument("scenario", choices=list(_SCENARIOS))
    parser.add_argument("--jobs", type=int, default=200, help="(200)")
    parser.add_argument("--away", type=float, default=60.0, help="seconds (60)")
    parser.add_argument("--delay", type=float, default=0.5, help="seconds that a call takes (0.5)")
    parser.add_argument("--concurrency", type=int, default=0, help="of the upstream (its default)")
    parser.add_argument("--nginx", action="store_true", help="in front of the gateway")
    parser.add_argument("--read-timeout", default="2s", help="of nginx (2s)")
    parser.add_argument("--rate", type=int, default=30, help="calls in a period (30)")
    parser.add_argument("--period", type=float, default=60.0, help="its seconds (60)")
    parser.add_argument("--window", action="store_true", help="a fixed window in place of a bucket")
    parser.add_argument("--retry-after", action="store_true", help="the gateway says when")
    parser.add_argument("--store", default="memory://", help="its URL, or sqlite (memory://)")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="outages-") as folder:
        return int(bool(asyncio.run(_run(options, Path(folder)))))


if __name__ == "__main__":
    sys.exit(main())
