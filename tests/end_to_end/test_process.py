"""The command line as a process: one line, signals, exit codes, the log."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from asyncproxy.cli.main import main
from asyncproxy.version import __version__
from tests.conftest import EMBED
from tests.gateway import Gateway, Received, embeddings, hang, raw

SECRET = "sk-very-secret"


class Process:
    """A running ``asyncproxy``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode().rstrip("\n")

    async def end(self) -> tuple[int, str, str]:
        """The exit code, the rest of stdout, and stderr."""
        async with asyncio.timeout(60):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def started(*arguments: str, env: dict[str, str] | None = None) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "asyncproxy",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    async with started(*arguments, env=env) as process:
        return await process.end()


@asynccontextmanager
async def serving(gateway: Gateway, tmp_path: Path, config: str = "") -> AsyncIterator[Process]:
    path = tmp_path / "config.yaml"
    path.write_text(f"listen: 127.0.0.1:0\nupstreams:\n  - base_url: {gateway.url}/v1\n{config}")
    async with started("serve", "--config", str(path)) as process:
        line = await process.line()
        if "format: json" in config:
            said = json.loads(line)
            assert said.keys() == {"time", "level", "event", "url"}
            assert f" listens on {said['url']}, in front of gateway" in said["event"]
            line = said["event"]
        assert line.startswith(f"asyncproxy {__version__} listens on http://127.0.0.1:"), line
        process.url = line.split(" listens on ")[1].split(",")[0]
        yield process


async def post(session: aiohttp.ClientSession, url: str, body: Any = EMBED) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {SECRET}"}
    async with session.post(url, json=body, headers=headers) as response:
        return response.status, await response.json()


async def get(session: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with session.get(url, headers={"Authorization": f"Bearer {SECRET}"}) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_0(
    gateway: Gateway, tmp_path: Path, number: signal.Signals
) -> None:
    async with serving(gateway, tmp_path) as process, aiohttp.ClientSession() as session:
        assert (await get(session, process.url + "/-/ready"))[0] == 200
        process.process.send_signal(number)
        code, out, err = await process.end()
    assert (code, out) == (0, "")
    assert "Traceback" not in err


async def test_no_file_is_needed(gateway: Gateway) -> None:
    async with started(
        "serve", "--upstream", f"{gateway.url}/v1", "--listen", "127.0.0.1:0"
    ) as process:
        assert "listens on http://127.0.0.1:" in await process.line()


async def test_jobs_in_flight_get_their_grace(gateway: Gateway, tmp_path: Path) -> None:
    """Invariant 8: no new jobs, results can still be fetched, what was in flight ends, the rest does not."""
    go_on = asyncio.Event()

    async def gated(request: Received, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await embeddings(request, writer)

    gateway.behaviour = gated
    config = "    concurrency: 1\nshutdown_grace: 20s\n"
    async with serving(gateway, tmp_path, config) as process, aiohttp.ClientSession() as session:
        submit = process.url + "/v1/async/embeddings"
        _, flying = await post(session, submit)
        await gateway.until(lambda: gateway.busy == 1)
        _, waiting = await post(session, submit)
        process.process.send_signal(signal.SIGTERM)
        while (ready := await get(session, process.url + "/-/ready"))[0] == 200:
            await asyncio.sleep(0.01)
        assert (ready[0], ready[1]["reason"]) == (503, "shutting down")
        assert (await get(session, process.url + "/-/healthy"))[0] == 200
        status, refused = await post(session, submit)
        assert (status, refused["error"]["code"]) == (503, "shutting_down")
        assert (await get(session, f"{submit}/{waiting['id']}"))[1]["status"] == "pending"
        # A poll that is being answered when the last job ends is answered.
        passing = asyncio.ensure_future(post(session, process.url + "/v1/embeddings"))
        await gateway.until(lambda: gateway.busy == 2)
        go_on.set()
        assert (await passing)[0] == 200
        code, _, err = await process.end()
    assert code == 0
    assert f"job={flying['id']}" in err
    assert waiting["id"] not in err
    assert "1 unfinished jobs are lost, 1 results dropped" in err


async def test_a_request_that_passes_through_gets_the_grace_too(
    gateway: Gateway, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    async def gated(request: Received, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await embeddings(request, writer)

    gateway.behaviour = gated
    async with serving(gateway, tmp_path) as process, aiohttp.ClientSession() as session:
        passing = asyncio.ensure_future(post(session, process.url + "/v1/embeddings"))
        await gateway.until(lambda: gateway.busy == 1)
        process.process.send_signal(signal.SIGTERM)
        while (await get(session, process.url + "/-/ready"))[0] == 200:
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(1.5, go_on.set)  # what is cut off is cut off after 1 s
        assert (await passing)[0] == 200
        assert (await process.end())[0] == 0


@pytest.mark.parametrize("hurry", [False, True])
async def test_the_grace_ends(gateway: Gateway, tmp_path: Path, hurry: bool) -> None:  # noqa: FBT001
    gateway.behaviour = hang
    grace = "1h" if hurry else "200ms"
    async with (
        serving(gateway, tmp_path, f"shutdown_grace: {grace}\n") as process,
        aiohttp.ClientSession() as session,
    ):
        await post(session, process.url + "/v1/async/embeddings")
        passing = asyncio.ensure_future(post(session, process.url + "/v1/embeddings"))
        await gateway.until(lambda: gateway.busy == 2)
        process.process.send_signal(signal.SIGTERM)
        while (await get(session, process.url + "/-/ready"))[0] == 200:
            await asyncio.sleep(0.01)
        if hurry:
            process.process.send_signal(signal.SIGTERM)
        code, _, err = await process.end()
        with pytest.raises(aiohttp.ClientError):
            await passing
    assert code == 0
    assert "1 unfinished jobs are lost, 0 results dropped" in err
    assert "Traceback" not in err


async def test_the_port_is_taken(gateway: Gateway) -> None:
    address = gateway.url.removeprefix("http://")
    code, out, err = await run("serve", "--upstream", f"{gateway.url}/v1", "--listen", address)
    assert (code, out) == (1, "")
    assert err == f"asyncproxy: cannot listen on {address}: Address already in use\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        (),
        ("fly",),
        ("serve", "--upstream"),
        ("serve", "--upstream", "x", "--config", "y"),
        ("serve", "--upstream", "ftp://x"),
        ("serve", "--upstream", "http://x/v1", "--listen", "nowhere"),
        ("serve", "--config", "does-not-exist.yaml"),
        ("check", "--config", "does-not-exist.yaml"),
        ("check",),
        ("demo", "--delay", "-1"),
    ],
)
def test_wrong_use_is_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err


async def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "upstreams:\n  - base_url: ${NOWHERE}\n    headers: {Authorization: 5}\n  - timeout: {total: soon}\njobz: {}\n"
    )
    code, _, err = await run("check", "--config", str(path))
    assert code == 2
    lines = err.splitlines()
    assert all(line.startswith("asyncproxy: ") for line in lines)
    for part in (
        "upstreams[0].base_url",
        "NOWHERE",
        "upstreams[1].base_url",
        "upstreams[1].timeout.total",
        "jobz",
    ):
        assert any(part in line for line in lines), part


async def test_check_prints_the_effective_config_without_secrets(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "listen: 127.0.0.1:0\n"
        "upstreams:\n  - base_url: http://gateway/v1\n    headers: {Authorization: 'Bearer ${KEY}'}\n"
        f"auth: {{keys: ['{SECRET}']}}\n"
    )
    code, out, err = await run("check", "--config", str(path), env={"KEY": "sk-gateway"})
    assert (code, err) == (0, "")
    assert "sk-gateway" not in out
    assert SECRET not in out
    assert "max_pending: 10000" in out


async def test_a_key_that_everybody_uses_is_worth_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "listen: 127.0.0.1:0\n"
        "upstreams:\n  - base_url: http://gateway/v1\n    headers: {X-API-Key: sk-gateway}\n"
    )
    code, _, err = await run("check", "--config", str(path))
    assert code == 0
    assert "warning: the upstream 'gateway' gets a credential" in err
    assert "sk-gateway" not in err


async def test_version() -> None:
    assert await run("--version") == (0, f"asyncproxy {__version__}\n", "")


@pytest.mark.parametrize("style", ["text", "json"])
async def test_the_log_has_a_line_per_outcome_and_no_secret(
    gateway: Gateway, tmp_path: Path, style: str
) -> None:
    config = f"""\
    headers: {{X-Key: sk-gateway}}
    retry: {{attempts: 1}}
log: {{level: debug, format: {style}}}
"""
    model, text = "m\n2026 evil=1 \x1b[31m", "the text of a client"
    body = {"model": model, "input": text}
    async with serving(gateway, tmp_path, config) as process, aiohttp.ClientSession() as session:
        _, job = await post(session, process.url + "/v1/async/embeddings", body)
        path = f"{process.url}/v1/async/embeddings/{job['id']}"
        while (await get(session, path))[0] == 202:
            await asyncio.sleep(0.01)
        await post(session, process.url + "/v1/embeddings?api_key=" + SECRET, body)
        gateway.behaviour = raw(b"HTTP/1.1 what\r\nContent-Length: abc\r\n\r\n" + SECRET.encode())
        await post(session, process.url + "/v1/broken?api_key=" + SECRET, body)
        _, broken = await post(session, process.url + "/v1/async/rerank", body)
        while (await get(session, f"{process.url}/v1/async/rerank/{broken['id']}"))[0] == 202:
            await asyncio.sleep(0.01)
        process.process.send_signal(signal.SIGTERM)
        code, _, err = await process.end()
    assert code == 0
    assert err.count("upstream_unreachable") == 2
    assert f"the upstream gateway is at {gateway.url}/v1" in err
    for hidden in (SECRET, text, "sk-gateway", 'embedding":', "\x1b", "\n2026 evil"):
        assert hidden not in err
    lines = [line for line in err.splitlines() if job["id"] in line or "/v1/embeddings" in line]
    assert len(lines) == 2
    if style == "json":
        outcome, passed = (json.loads(line) for line in lines)
        assert outcome["event"] == "job completed"
        assert (outcome["job"], outcome["model"], outcome["status"]) == (job["id"], model, 200)
        assert (passed["event"], passed["path"], passed["status"]) == ("request", "/v1/embeddings", 200)
    else:
        assert " job completed job=" in lines[0]
        assert r'model="m\n2026 evil=1 \u001b[31m"' in lines[0]
        assert " request method=POST path=/v1/embeddings " in lines[1]
