"""``serve --workers``: several processes on one port, one supervisor."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from tests import redis_server
from tests.end_to_end.test_process import Process, post, run, started
from tests.gateway import Gateway

PATH = "/v1/async/embeddings"


def config_file(tmp_path: Path, gateway: Gateway, more: str = "") -> str:
    key = b64encode(b"k" * 32).decode()
    path = tmp_path / "config.yaml"
    path.write_text(f"""\
listen: 127.0.0.1:0
upstreams: [{{base_url: {gateway.url}/v1}}]
store: {{url: {redis_server.shared().url}, prefix: w-{secrets.token_hex(8)}, encryption_key: {key}}}
shutdown_grace: 5s
{more}""")
    return str(path)


@asynccontextmanager
async def serving(
    tmp_path: Path, gateway: Gateway, workers: int, more: str = ""
) -> AsyncIterator[Process]:
    config = config_file(tmp_path, gateway, more)
    async with started("serve", "--config", config, "--workers", str(workers)) as process:
        line = await process.line()
        assert f"in front of gateway with {workers} workers" in line, line
        process.url = line.split(" listens on ")[1].split(",")[0]
        yield process


def workers_of(process: Process) -> set[int]:
    """The processes that it has started and that run."""
    pid = process.process.pid
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in found if state_of(int(child)) not in ("Z", None)}


def state_of(pid: int) -> str | None:
    """A letter, as ps shows it. None: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_workers_are_one_api(tmp_path: Path, gateway: Gateway) -> None:
    async with serving(tmp_path, gateway, 3) as process:
        assert len(workers_of(process)) == 3
        for _ in range(20):  # a connection each: any worker gets it
            async with aiohttp.ClientSession() as session:
                status, job = await post(session, process.url + PATH)
            assert status == 202
            async with aiohttp.ClientSession() as session:
                headers = {"Authorization": "Bearer sk-very-secret"}
                url = f"{process.url}{PATH}/{job['id']}?wait=20"
                async with session.get(url, headers=headers) as response:
                    assert (response.status, (await response.json())["status"]) == (200, "completed")
        process.process.send_signal(signal.SIGTERM)
        code, _, err = await process.end()
    assert code == 0
    assert "Traceback" not in err
    assert err.count("stopped; unfinished jobs in the store: 0, results: 20") == 3


def two_free_ports() -> int:
    """A port that is free, and so is the one behind it."""
    while True:
        first = redis_server.free_port()
        with socket.socket() as second, suppress(OSError, OverflowError):
            second.bind(("127.0.0.1", first + 1))
            return first


async def test_each_worker_has_its_own_pages(tmp_path: Path, gateway: Gateway) -> None:
    port = two_free_ports()
    more = f"admin_listen: 127.0.0.1:{port}\n"
    async with serving(tmp_path, gateway, 2, more) as process, aiohttp.ClientSession() as session:
        for page in (port, port + 1):  # a worker has one of them
            async with session.get(f"http://127.0.0.1:{page}/-/metrics") as response:
                assert "asyncproxy_build_info" in await response.text()
        async with session.get(f"{process.url}/-/metrics") as response:
            assert response.status == 404


async def test_a_worker_that_dies_is_started_again(tmp_path: Path, gateway: Gateway) -> None:
    async with serving(tmp_path, gateway, 2) as process:
        before = workers_of(process)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(workers_of(process) - {victim}) == 2)
        assert workers_of(process) & before == before - {victim}
        process.process.send_signal(signal.SIGTERM)
        code, _, err = await process.end()
    assert code == 0
    assert "ended with SIGKILL" in err


async def test_workers_do_not_outlive_their_supervisor(tmp_path: Path, gateway: Gateway) -> None:
    async with serving(tmp_path, gateway, 2) as process:
        workers = workers_of(process)
        process.process.kill()
        await until(lambda: all(state_of(pid) in ("Z", None) for pid in workers))


async def test_workers_that_cannot_start_end_it_all(tmp_path: Path, gateway: Gateway) -> None:
    config = config_file(tmp_path, gateway)
    text = Path(config).read_text().replace(str(redis_server.shared().port), "1")
    Path(config).write_text(text)
    code, out, err = await run("serve", "--config", config, "--workers", "2")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if "without admin_listen" not in line]
    assert said
    assert all(line.startswith("asyncproxy: the store redis://") for line in said), err


async def test_a_port_that_is_taken(tmp_path: Path, gateway: Gateway) -> None:
    config = config_file(tmp_path, gateway)
    address = gateway.url.removeprefix("http://")
    code, out, err = await run("serve", "--config", config, "--workers", "2", "--listen", address)
    assert (code, out) == (1, "")
    assert err == f"asyncproxy: cannot listen on {address}: Address already in use\n"


@pytest.mark.parametrize("workers", ["2", "0", "x"])
async def test_wrong_use_is_2(workers: str) -> None:
    code, out, err = await run("serve", "--upstream", "http://127.0.0.1:1/v1", "--workers", workers)
    assert (code, out) == (2, "")
    assert "--workers" in err
    assert "Traceback" not in err
