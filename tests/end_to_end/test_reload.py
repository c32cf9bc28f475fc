"""Another configuration while everything goes on: by a reload of the parts, and by SIGHUP."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from asyncproxy.config.load import load_config
from asyncproxy.config.model import StoreConfig
from tests import gateway as gateways
from tests.conftest import EMBED, Client, Start
from tests.end_to_end.test_process import Process, serving, started
from tests.gateway import Gateway, Received, embeddings, hang

KEY = {"x-api-key": "sk-reloading"}


@pytest.fixture
async def other() -> AsyncIterator[Gateway]:
    async with gateways.running() as running:
        yield running


def gated(opened: asyncio.Event) -> gateways.Behaviour:
    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        await opened.wait()
        await embeddings(request, writer)

    return behave


def upstream(name: str, gateway: Gateway, **more: Any) -> dict[str, Any]:
    retry = {"attempts": 3, "backoff": "1ms", "max_backoff": "2ms"}
    return {"name": name, "base_url": f"{gateway.url}/v1", "retry": retry, **more}


async def reconfigure(proxy: Client, *upstreams: dict[str, Any], **sections: Any) -> list[str]:
    config = load_config({"upstreams": list(upstreams), "shutdown_grace": "0s", **sections})
    return await proxy.parts.reconfigure(config)


@pytest.mark.one_store
async def test_new_requests_go_where_the_new_configuration_says(
    start: Start, gateway: Gateway, other: Gateway
) -> None:
    proxy = await start(upstreams=[upstream("one", gateway)])
    await reconfigure(proxy, upstream("one", gateway, models=["a"]), upstream("two", other))
    await proxy.outcome(await proxy.submit({**EMBED, "model": "a"}))
    await proxy.outcome(await proxy.submit({**EMBED, "model": "b"}))
    await proxy.post("/v1/embeddings", {**EMBED, "model": "b"})
    assert [r.json()["model"] for r in gateway.received] == ["a"]
    assert [r.json()["model"] for r in other.received] == ["b", "b"]
    # Where the lines of the log say that an upstream is.
    assert proxy.parts.log.base_urls == {"one": f"{gateway.url}/v1", "two": f"{other.url}/v1"}


async def test_a_call_in_flight_ends_where_it_is_and_its_connections_close_then(
    start: Start, gateway: Gateway, other: Gateway
) -> None:
    opened = asyncio.Event()
    gateway.behaviour = gated(opened)
    proxy = await start(upstreams=[upstream("one", gateway)])
    path = await proxy.submit()
    passing = asyncio.ensure_future(proxy.post("/v1/embeddings"))
    await gateway.until(lambda: gateway.busy == 2)
    await reconfigure(proxy, upstream("two", other))
    assert proxy.parts.dispatcher.calls == {"one": 1, "two": 0}
    await proxy.outcome(await proxy.submit())
    assert (len(gateway.received), len(other.received)) == (2, 1)
    opened.set()
    assert (await proxy.outcome(path))["status"] == "completed"
    assert (await passing).status == 200
    await gateway.until(lambda: gateway.open_connections == 0)
    assert len(gateway.received) == 2
    assert proxy.parts.dispatcher.calls == {"two": 0}


async def test_the_same_name_with_another_address_is_another_upstream(
    start: Start, gateway: Gateway, other: Gateway
) -> None:
    opened = asyncio.Event()
    gateway.behaviour = gated(opened)
    proxy = await start(upstreams=[upstream("one", gateway)])
    path = await proxy.submit()
    await gateway.until(lambda: gateway.busy == 1)
    await reconfigure(proxy, upstream("one", other))
    await proxy.outcome(await proxy.submit())
    assert len(other.received) == 1
    opened.set()
    assert (await proxy.outcome(path))["status"] == "completed"
    assert len(gateway.received) == 1


@pytest.mark.one_store
async def test_an_upstream_that_stays_keeps_its_connections(
    start: Start, gateway: Gateway, other: Gateway
) -> None:
    proxy = await start(upstreams=[upstream("one", gateway)])
    await proxy.post("/v1/embeddings")
    before = proxy.parts.upstreams["one"]
    await reconfigure(proxy, upstream("two", other), upstream("one", gateway, concurrency=3))
    assert proxy.parts.upstreams["one"] is before
    assert gateway.open_connections == 1


async def test_waiting_jobs_of_an_upstream_that_is_gone_find_another(
    start: Start, gateway: Gateway, other: Gateway
) -> None:
    gateway.behaviour = hang
    # The lease: a store that others share gives them some of them to serve the upstream.
    one = upstream("one", gateway, concurrency=1)
    proxy = await start(upstreams=[one], store={"lease": "1s"})
    flying = await proxy.submit()
    await gateway.until(lambda: gateway.busy == 1)
    waiting = [await proxy.submit() for _ in range(3)]
    await reconfigure(proxy, upstream("two", other))
    for path in waiting:
        assert (await proxy.outcome(path))["status"] == "completed"
    assert (len(gateway.received), len(other.received)) == (1, 3)
    assert (await proxy.get(flying)).json()["status"] == "processing"


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
async def test_concurrency_grows_and_shrinks(
    start: Start, gateway: Gateway, before: int, after: int
) -> None:
    opened = asyncio.Event()
    gateway.behaviour = gated(opened)
    proxy = await start(upstreams=[upstream("one", gateway, concurrency=before)])
    paths = [await proxy.submit() for _ in range(6)]
    await gateway.until(lambda: gateway.busy == before)
    await reconfigure(proxy, upstream("one", gateway, concurrency=after))
    if after > before:
        await gateway.until(lambda: gateway.busy == after)
    gateway.busiest = gateway.busy
    opened.set()
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"
    assert gateway.busiest == max(before, after)
    opened.clear()
    gateway.busiest = 0
    paths = [await proxy.submit() for _ in range(6)]
    await gateway.until(lambda: gateway.busy == after)
    opened.set()
    for path in paths:
        await proxy.outcome(path)
    assert gateway.busiest == after
    assert len(gateway.received) == 12


async def test_limits_and_lifetimes_change(start: Start, gateway: Gateway) -> None:
    gateway.behaviour = hang
    proxy = await start(jobs={"max_pending": 1})
    await proxy.submit()
    assert (await proxy.post("/v1/async/embeddings")).code == "overloaded"
    jobs = {"max_pending_per_credential": 2, "max_request_bytes": 100, "max_wait": "1ms"}
    await reconfigure(proxy, upstream("gateway", gateway), jobs=jobs)
    path = await proxy.submit()
    assert (await proxy.post("/v1/async/embeddings")).code == "too_many_jobs"
    assert (await proxy.post("/v1/async/rerank", {"model": "m" * 200})).code == "request_too_large"
    waited = await proxy.get(path + "?wait=60")
    assert waited.headers["Preference-Applied"] == "wait=0.001"
    await reconfigure(proxy, upstream("gateway", gateway), store={"max_bytes": 1})
    assert (await proxy.post("/v1/async/embeddings")).code in ("store_full", "request_too_large")


async def test_deadlines_and_ttls_change(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    one = upstream("gateway", gateway, concurrency=1)
    await reconfigure(proxy, one, jobs={"result_ttl": "7s", "deadline": "100ms"})
    done = await proxy.outcome(await proxy.submit())
    assert done["error"]["error"]["code"] == "deadline_exceeded"
    seconds = {key: float(done[key][17:-1]) for key in ("expires_at", "completed_at")}
    assert round(seconds["expires_at"] - seconds["completed_at"]) % 60 == 7


@pytest.mark.one_store
async def test_the_relay_holds_as_it_is_told_now(proxy: Client, gateway: Gateway) -> None:
    gateway.behaviour = hang
    jobs = {"relay_hold": "1ms", "relay_max_hops": 1}
    await reconfigure(proxy, upstream("gateway", gateway), jobs=jobs)
    hop = await proxy.post("/v1/relay/embeddings")
    assert hop.status == 303
    assert (await proxy.get(hop.location)).code == "still_running"


@pytest.mark.one_store
async def test_keys_change(start: Start, gateway: Gateway) -> None:
    proxy = await start(auth={"keys": ["sk-first"]})
    first, second = {"x-api-key": "sk-first"}, {"x-api-key": "sk-second"}
    path = await proxy.submit(headers=first)
    await proxy.outcome(path, headers=first)
    await reconfigure(proxy, upstream("gateway", gateway), auth={"keys": ["sk-second"]})
    assert (await proxy.get(path, headers=first)).code == "invalid_api_key"
    assert (await proxy.post("/v1/embeddings", headers=first)).code == "invalid_api_key"
    assert (await proxy.post("/v1/embeddings", headers=second)).status == 200
    await reconfigure(proxy, upstream("gateway", gateway), auth={"keys": []})
    assert (await proxy.get(path, headers=first)).status == 200


def store_in(store: StoreConfig) -> dict[str, Any]:
    """The section of a file that says what ``store`` is."""
    key = store.encryption_key
    return {**dict(store), "encryption_key": None if key is None else key.get_secret_value()}


async def test_what_needs_a_restart_is_named_and_stays(proxy: Client, gateway: Gateway) -> None:
    before = proxy.parts.config
    fixed = await reconfigure(
        proxy,
        upstream("gateway", gateway),
        listen="127.0.0.1:1",
        admin_listen="127.0.0.1:2",
        client_timeout="5s",
        jobs={"endpoints": ["ocr"], "max_pending": 5},
        store={**store_in(before.store), "prefix": "other", "max_bytes": 4096},
    )
    assert fixed == ["listen", "admin_listen", "client_timeout", "jobs.endpoints", "store.prefix"]
    config = proxy.parts.config
    assert (config.listen, config.admin_listen) == (before.listen, None)
    assert config.store == before.store.model_copy(update={"max_bytes": 4096})
    assert (config.jobs.max_pending, config.store.max_bytes) == (5, 4096)
    assert "embeddings" in config.jobs.endpoints


async def test_an_upstream_that_cannot_be_opened_changes_nothing(
    start: Start, gateway: Gateway, other: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose certificates went away after the file was checked."""
    proxy = await start(upstreams=[upstream("one", gateway)])
    before = proxy.parts.config

    def gone(_options: object) -> None:
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr("asyncproxy.upstream.client._tls", gone)
        with pytest.raises(FileNotFoundError):
            await reconfigure(proxy, upstream("two", other), jobs={"max_pending": 1})
    assert proxy.parts.config is before
    await proxy.outcome(await proxy.submit())
    assert (len(gateway.received), len(other.received)) == (1, 0)


# As a process.


class Reloading(Process):
    """A process whose file a test rewrites, and whose log it reads as it is written."""

    path: Path

    def __init__(self, process: Process, path: Path) -> None:
        super().__init__(process.process)
        self.url, self.path = process.url, path
        self.lines: list[str] = []

    async def reload(self, text: str, until: str) -> str:
        """Write the file, send SIGHUP, and wait for a line of the log. That line."""
        await asyncio.to_thread(self.path.write_text, text)
        self.process.send_signal(signal.SIGHUP)
        return await self.logged(until)

    async def logged(self, part: str) -> str:
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            while line := (await self.process.stderr.readline()).decode():
                self.lines.append(line)
                if part in line:
                    return line
        raise AssertionError(f"{part!r} is not in {self.lines}")


@asynccontextmanager
async def reloading(gateway: Gateway, tmp_path: Path, config: str = "") -> AsyncIterator[Reloading]:
    async with serving(gateway, tmp_path, config) as process:
        found = Reloading(process, tmp_path / "config.yaml")
        await found.logged("jobs and results are kept in memory: a restart loses them")
        found.lines.clear()
        yield found


def file(gateway: Gateway, name: str = "gateway", more: str = "") -> str:
    return f"listen: 127.0.0.1:0\nupstreams:\n  - name: {name}\n    base_url: {gateway.url}/v1\n{more}"


async def test_a_bad_file_is_reported_and_the_old_one_stays(gateway: Gateway, tmp_path: Path) -> None:
    async with reloading(gateway, tmp_path) as process, aiohttp.ClientSession() as session:
        bad = "upstreams:\n  - base_url: nowhere\njobs: {max_pending: none}\n"
        line = await process.reload(bad, "jobs.max_pending")
        assert " error " in process.lines[0]
        assert "the configuration stays as it was: upstreams[0].base_url" in process.lines[0]
        assert " error " in line
        async with session.post(process.url + "/v1/embeddings", json=EMBED) as response:
            assert response.status == 200
        async with session.get(process.url + "/-/metrics") as response:
            assert 'config_reloads_total{outcome="refused"} 1.0' in await response.text()
        await process.reload(file(gateway), "the configuration was read again")
        async with session.get(process.url + "/-/metrics") as response:
            assert 'config_reloads_total{outcome="succeeded"} 1.0' in await response.text()


async def test_the_log_changes_and_what_needs_a_restart_is_said(
    gateway: Gateway, tmp_path: Path
) -> None:
    async with reloading(gateway, tmp_path) as process:
        more = "log: {format: json}\nclient_timeout: 5s\njobs: {endpoints: [ocr]}\n"
        line = await process.reload(file(gateway, more=more), "only a restart")
        assert '"level": "warning"' in line
        assert "only a restart changes client_timeout, jobs.endpoints: it stays as it was" in line


async def test_without_a_file_there_is_nothing_to_reload(gateway: Gateway) -> None:
    arguments = ("serve", "--upstream", f"{gateway.url}/v1", "--listen", "127.0.0.1:0")
    async with started(*arguments) as process:
        await process.line()
        process.process.send_signal(signal.SIGHUP)
        reloading = Reloading(process, Path("none"))
        assert " warning " in await reloading.logged("there is no file to read again")
        process.process.send_signal(signal.SIGTERM)
        assert (await process.end())[0] == 0


async def test_a_reload_under_load_loses_nothing(
    gateway: Gateway, other: Gateway, tmp_path: Path
) -> None:
    """Upstreams come and go under jobs, requests and a stream that stays open all the time."""
    go_on = asyncio.Event()

    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        if request.target == "/v1/stream":
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            writer.write(head + b"data: 1\n\n")
            await go_on.wait()
            writer.write(b"data: 2\n\n")
            writer.close()
        elif request.json()["input"].startswith("slow"):
            await asyncio.sleep(0.02)  # so that each reload finds calls in flight
            await embeddings(request, writer)
        else:
            await embeddings(request, writer)

    gateway.behaviour = other.behaviour = behave
    stop = asyncio.Event()
    ended: list[str] = []

    async def submit_and_poll(session: aiohttp.ClientSession, url: str, number: int) -> None:
        while not stop.is_set():
            body = {"model": "m", "input": f"{'slow' if number % 2 else 'fast'} {number}"}
            async with session.post(url + "/v1/async/embeddings", json=body) as response:
                assert response.status == 202
                path = response.headers["Location"]
            while True:
                async with session.get(f"{url}{path}?wait=10") as response:
                    assert response.status in (200, 202), await response.text()
                    job = await response.json()
                if response.status == 200:
                    break
            ended.append(job["status"])
            async with session.post(url + "/v1/embeddings", json=body) as response:
                assert response.status == 200
                assert (await response.json())["data"]

    config = "    concurrency: 4\n"
    async with (
        reloading(gateway, tmp_path, config) as process,
        aiohttp.ClientSession(headers=KEY, connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        stream = await session.get(process.url + "/v1/stream")
        assert await stream.content.readline() == b"data: 1\n"
        load = [
            asyncio.ensure_future(submit_and_poll(session, process.url, number)) for number in range(16)
        ]
        for number in range(6):
            count = len(ended)
            into, name = (other, "two") if number % 2 == 0 else (gateway, "one")
            more = f"    concurrency: {1 + number}\njobs: {{max_pending: {100 + number}}}\n"
            await process.reload(file(into, name, more), "the configuration was read again")
            await until(lambda count=count: len(ended) >= count + 20, load)  # type: ignore[misc]
        stop.set()
        await asyncio.gather(*load)
        go_on.set()
        assert await stream.content.read() == b"\ndata: 2\n\n"
        process.process.send_signal(signal.SIGTERM)
        code, _, err = await process.end()
    assert code == 0
    assert set(ended) == {"completed"}
    assert "0 unfinished jobs are lost" in err
    assert gateway.received
    assert other.received
    assert "Traceback" not in err + "".join(process.lines)


async def until(condition: Callable[[], bool], load: Sequence[asyncio.Future[None]]) -> None:
    """Wait until something holds, while the load goes on."""
    async with asyncio.timeout(60):
        while not condition():
            for task in load:
                if task.done():
                    task.result()
            await asyncio.sleep(0.01)


async def test_a_lane_that_was_limited_is_free_at_another_gateway(
    start: Start, gateway: Gateway, other: Gateway
) -> None:
    gateway.behaviour = gateways.answer(b"", status=429)
    proxy = await start(upstreams=[upstream("one", gateway, concurrency=2)])
    paths = [await proxy.submit() for _ in range(5)]
    await gateway.until(lambda: len(gateway.received) >= 6)
    await reconfigure(proxy, upstream("one", other, concurrency=2))
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"


async def test_a_lane_that_was_limited_is_free_when_its_upstream_returns_to_the_configuration(
    start: Start, gateway: Gateway, other: Gateway
) -> None:
    gateway.behaviour = gateways.answer(b"", status=429)
    one = upstream("one", gateway, models=["m"])
    proxy = await start(upstreams=[one, upstream("two", other)])
    paths = [await proxy.submit() for _ in range(5)]
    await gateway.until(lambda: len(gateway.received) >= 6)
    await reconfigure(proxy, upstream("two", other))
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"
    gateway.behaviour = embeddings
    await reconfigure(proxy, one, upstream("two", other))
    paths = [await proxy.submit() for _ in range(5)]
    for path in paths:
        assert (await proxy.outcome(path))["status"] == "completed"
