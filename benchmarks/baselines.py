"""The bare aiohttp handlers that we are compared with: ``python -m benchmarks.baselines ROLE``.

Each does the least that answers at all. They run on the loop and with the server options of the proxy,
so that what is left between them and us is our own work.
"""

from __future__ import annotations

import argparse
import asyncio

import aiohttp
from aiohttp import web

from asyncproxy.cli.main import loop_factory
from asyncproxy.web.connection import connection_options

_JSON = "application/json"
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "host", "date", "server"})


def fixed(status: int, size_bytes: int) -> web.Application:
    """Answers a GET with ``size_bytes`` fixed bytes, a POST too once its body is read."""
    body = b"x" * size_bytes

    async def get(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, content_type=_JSON)

    async def post(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=status, body=body, content_type=_JSON)

    app = _app()
    app.router.add_get("/{path:.*}", get)
    app.router.add_post("/{path:.*}", post)
    return app


def call(upstream: str, size_bytes: int) -> web.Application:
    """Sends each request's body to ``upstream``, reads the answer, keeps nothing and answers 202."""
    fixed_body = b"x" * size_bytes

    async def post(request: web.Request) -> web.Response:
        body = await request.read()
        async with request.app[_SESSION].post(
            upstream + request.path, data=body, headers=_SENT
        ) as answer:
            await answer.read()
        return web.Response(status=202, body=fixed_body, content_type=_JSON)

    app = _app_with_client()
    app.router.add_post("/{path:.*}", post)
    return app


def stream(upstream: str) -> web.Application:
    """A minimal streaming proxy: the request's body is read, the answer's is streamed."""

    async def handle(request: web.Request) -> web.StreamResponse:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP]
        async with request.app[_SESSION].request(
            request.method, upstream + request.raw_path, headers=headers, data=await request.read()
        ) as answer:
            response = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    response.headers.add(name, value)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = _app_with_client()
    app.router.add_route("*", "/{path:.*}", handle)
    return app


_SENT = {"Content-Type": _JSON, "Authorization": "Bearer benchmark"}
_SESSION = web.AppKey("session", aiohttp.ClientSession)


def _app() -> web.Application:
    options = {**connection_options(client_timeout_s=60.0), "handler_cancellation": True}
    return web.Application(handler_args=options)


def _app_with_client() -> web.Application:
    async def session(app: web.Application) -> None:
        app[_SESSION] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(app: web.Application) -> None:
        await app[_SESSION].close()

    app = _app()
    app.on_startup.append(session)
    app.on_cleanup.append(close)
    return app


async def _serve(app: web.Application) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    host, port = runner.addresses[0][:2]
    print(f"http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines")
    parser.add_argument("role", choices=["fixed", "call", "stream"])
    parser.add_argument("--status", type=int, default=200)
    parser.add_argument("--size-bytes", type=int, default=100)
    parser.add_argument("--upstream", default="")
    chosen = parser.parse_args()
    if chosen.role == "fixed":
        app = fixed(chosen.status, chosen.size_bytes)
    elif chosen.role == "call":
        app = call(chosen.upstream, chosen.size_bytes)
    else:
        app = stream(chosen.upstream)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(app))


if __name__ == "__main__":
    main()
