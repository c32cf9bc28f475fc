"""A gateway that can die, as a process: ``python -m tests.chaos.mortal_gateway --port 9000``.

A request whose text says ``poison`` ends the process. Each call is a line of the log: when it began and
ended (epoch seconds), its status, and its job.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path

from aiohttp import web

__all__ = ["Budget"]


class Budget:
    """Calls that may be made: ``rate`` in a period, as a bucket that fills or a window that ends."""

    def __init__(self, rate: int, period_s: float, *, window: bool, burst: int) -> None:
        self._rate, self._period_s, self._window = rate, period_s, window
        self._burst = rate if window else burst
        self._left = float(self._burst)
        self._at: float | None = None

    def wait_s(self, now: float) -> float:
        """Take one. Returns 0, or the seconds until there is one."""
        if self._at is None:
            self._at = now
        if self._window:
            if now >= self._at + self._period_s:
                self._at += (now - self._at) // self._period_s * self._period_s
                self._left = float(self._rate)
        else:
            per_s = self._rate / self._period_s
            self._left = min(float(self._burst), self._left + (now - self._at) * per_s)
            self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        if self._window:
            return self._at + self._period_s - now
        return (1 - self._left) * self._period_s / self._rate


def _app(options: argparse.Namespace) -> web.Application:
    budget = None
    if options.rate:
        budget = Budget(options.rate, options.period, window=options.window, burst=options.burst)
    log = Path(options.log).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115  until it dies

    async def embeddings(request: web.Request) -> web.Response:
        began = time.time()
        text = (await request.json())["input"]
        status = 200
        headers: dict[str, str] = {}
        if budget is not None and (wait_s := budget.wait_s(began)):
            status = 429
            if options.retry_after:
                headers["Retry-After"] = f"{wait_s:.2f}"
        else:
            if "poison" in text:
                log.write(json.dumps([began, time.time(), 0, text]) + "\n")
                os._exit(1)
            await asyncio.sleep(options.delay)
        log.write(json.dumps([began, time.time(), status, text]) + "\n")
        data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
        body: dict[str, object] = {"object": "list", "model": "m", "data": data}
        if status == 429:
            body = {"error": {"message": "Too fast."}}
        return web.json_response(body, status=status, headers=headers)

    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    return app


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that a call takes (0.2)")
    parser.add_argument("--rate", type=int, default=0, help="calls in a period (any number)")
    parser.add_argument("--period", type=float, default=60.0, help="its seconds (60)")
    parser.add_argument("--burst", type=int, default=1, help="of the bucket (1)")
    parser.add_argument("--window", action="store_true", help="a fixed window in place of a bucket")
    parser.add_argument("--retry-after", action="store_true", help="say when to come again")
    options = parser.parse_args()
    web.run_app(_app(options), host="127.0.0.1", port=options.port, print=None, access_log=None)


if __name__ == "__main__":
    _main()
