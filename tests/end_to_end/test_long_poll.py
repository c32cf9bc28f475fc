"""Long poll: the wire contract, section 3."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import JSON, Client, Start
from tests.end_to_end.test_process import serving
from tests.gateway import Gateway, Received, answer, hang


class Gate:
    """A behaviour that answers once it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def __call__(self, request: Received, writer: asyncio.StreamWriter) -> None:
        await self.opened.wait()
        await answer({"ok": 1})(request, writer)


@pytest.fixture
def gate(gateway: Gateway) -> Gate:
    gateway.behaviour = Gate()
    return gateway.behaviour


@pytest.mark.parametrize(
    ("suffix", "query", "headers"),
    [
        ("", "?wait=30", {}),
        ("", "", {"Prefer": "wait=30"}),
        ("", "?wait=30.0", {"Prefer": "wait=0"}),
        ("/content", "?wait=30", {}),
    ],
)
async def test_a_poll_waits_for_the_end(
    proxy: Client, gate: Gate, suffix: str, query: str, headers: dict[str, str]
) -> None:
    path = await proxy.submit()
    poll = asyncio.ensure_future(proxy.get(path + suffix + query, headers=headers))
    await proxy.until_waiting(1)
    gate.opened.set()
    done = await poll
    assert done.status == 200
    if not suffix:
        assert done.json()["result"] == {"ok": 1}
        assert done.headers["Preference-Applied"] == "wait=30"
    assert proxy.waiting == 0


async def test_the_time_is_up(proxy: Client, gate: Gate) -> None:
    path = await proxy.submit()
    poll = await proxy.get(path + "?wait=0.05")
    assert poll.status == 202
    assert set(poll.json()) == {"id", "status", "created_at"}
    assert int(poll.headers["Retry-After"]) >= 1
    assert proxy.waiting == 0


@pytest.mark.one_store
async def test_the_wait_is_capped(start: Start, gate: Gate) -> None:
    proxy = await start(jobs={"max_wait": "50ms"})
    poll = await proxy.get(await proxy.submit() + "?wait=3600")
    assert (poll.status, poll.headers["Preference-Applied"]) == (202, "wait=0.05")


@pytest.mark.one_store
@pytest.mark.parametrize("rubbish", ["", "soon", "-1", "1e9", "NaN", "0x1", "9" * 40])
async def test_rubbish_is_as_if_absent(proxy: Client, gate: Gate, rubbish: str) -> None:
    path = await proxy.submit()
    for kwargs in (
        {"path": f"{path}?wait={rubbish}"},
        {"path": path, "headers": {"Prefer": f"wait={rubbish}"}},
    ):
        poll = await proxy.get(**kwargs)
        assert poll.status == 202
        assert "Preference-Applied" not in poll.headers


async def test_a_wait_for_what_is_done_is_no_wait(proxy: Client) -> None:
    path = await proxy.submit()
    await proxy.outcome(path)
    assert (await proxy.get(path + "?wait=60")).status == 200


async def test_a_failure_wakes_too(proxy: Client, gateway: Gateway) -> None:
    gate = asyncio.Event()

    async def refuse(request: Received, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await answer({"error": {"message": "no"}}, status=400)(request, writer)

    gateway.behaviour = refuse
    poll = asyncio.ensure_future(proxy.get(await proxy.submit() + "?wait=60"))
    await proxy.until_waiting(1)
    gate.set()
    assert (await poll).json()["status"] == "failed"


async def test_a_delete_is_404_for_those_who_wait(proxy: Client, gate: Gate) -> None:
    path = await proxy.submit()
    polls = [asyncio.ensure_future(proxy.get(path + "?wait=60")) for _ in range(3)]
    await proxy.until_waiting(3)
    assert (await proxy.request("DELETE", path)).status == 204
    for poll in polls:
        assert (await poll).code == "job_not_found"


async def test_another_client_does_not_wait(proxy: Client, gate: Gate) -> None:
    path = await proxy.submit(headers={"x-api-key": "sk-alice"})
    assert (await proxy.get(path + "?wait=60", headers={"x-api-key": "sk-bob"})).status == 404


async def test_a_client_that_leaves_is_forgotten(proxy: Client, gate: Gate) -> None:
    path = await proxy.submit()
    _, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    writer.write(f"GET {path}?wait=60 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await proxy.until_waiting(1)
    writer.transport.abort()
    await proxy.until_waiting(0)


async def test_hundreds_wait_at_once(proxy: Client, gate: Gate) -> None:
    path = await proxy.submit()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def poll() -> Any:
            async with session.get(f"{proxy.url}{path}?wait=60") as response:
                return response.status, await response.json()

        polls = [asyncio.ensure_future(poll()) for _ in range(400)]
        try:
            await proxy.until_waiting(len(polls))
            assert (await proxy.get("/-/healthy")).status == 200
            gate.opened.set()
            answers = await asyncio.gather(*polls)
        finally:  # a failure is told once, and not by each of them
            for task in polls:
                task.cancel()
            await asyncio.gather(*polls, return_exceptions=True)
    assert {status for status, _ in answers} == {200}
    assert len({str(body) for _, body in answers}) == 1
    assert proxy.waiting == 0


async def test_at_shutdown_they_hear_what_is_true(gateway: Gateway, tmp_path: Path) -> None:
    gateway.behaviour = hang
    async with (
        serving(gateway, tmp_path, "shutdown_grace: 300ms\n") as process,
        aiohttp.ClientSession() as session,
    ):
        url = process.url + "/v1/async/embeddings"
        async with session.post(url, data=b'{"model":"m","input":"x"}', headers=JSON) as response:
            job = await response.json()
        await gateway.until(lambda: gateway.busy == 1)

        async def poll() -> int:
            async with session.get(f"{url}/{job['id']}?wait=60") as response:
                assert (await response.json())["status"] == "processing"
                return response.status

        polls = [asyncio.ensure_future(poll()) for _ in range(5)]
        await asyncio.sleep(0.2)  # the requests are on their way; either way the answer is the same
        process.process.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*polls) == [202] * 5
        assert (await process.end())[0] == 0
