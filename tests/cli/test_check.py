"""``asyncproxy check`` says no to whatever ``serve`` would say no to, in the same words."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from asyncproxy.cli.main import main
from asyncproxy.stores.sqlite.file import locked
from tests import redis_server
from tests.gateway import Gateway, answer

KEY = b64encode(b"k" * 32).decode()

Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """The exit code and the lines on stderr, for a configuration on a port that is free."""

    def run(*options: str, **sections: Any) -> tuple[int, list[str]]:
        upstream = {"base_url": "http://gateway/v1", **sections.pop("upstream", {})}
        config = {"listen": "127.0.0.1:0", "upstreams": [upstream], **sections}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        before = set(tmp_path.rglob("*"))
        code = main(["check", "--config", str(file), *options])
        out, err = capsys.readouterr()
        assert set(tmp_path.rglob("*")) == before, "nothing was made"
        assert ("listen:" in out) == (code != 2), "the configuration is shown if it can be read"
        return code, err.splitlines()

    return run


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def served(tmp_path: Path) -> Any:
    """Serve with the same file: the exit code, and stderr without the log."""

    async def run() -> tuple[int | None, list[str]]:
        command = [
            sys.executable,
            "-m",
            "asyncproxy",
            "serve",
            "--config",
            str(tmp_path / "config.yaml"),
        ]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, err = await process.communicate()
        lines = err.decode().splitlines()
        return process.returncode, [line for line in lines if line.startswith("asyncproxy: ")]

    return asyncio.run(run())


@pytest.mark.parametrize("key", ["listen", "admin_listen"])
def test_a_port_that_is_taken(check: Check, taken: str, tmp_path: Path, key: str) -> None:
    found = check(**{key: taken})
    assert found == (1, [f"asyncproxy: cannot listen on {taken}: Address already in use"])
    assert served(tmp_path) == found


def test_a_proxy_that_runs_has_its_own_port_and_files(check: Check, taken: str, tmp_path: Path) -> None:
    store = {"url": f"sqlite://{tmp_path}/jobs.db"}
    with locked(tmp_path / "jobs.db"):
        code, lines = check(listen=taken, store=store)
        assert (code, len(lines)) == (1, 2), "all of it at once"
        assert check("--reload", listen=taken, store=store) == (0, [])


def test_a_folder_that_is_missing(check: Check, tmp_path: Path) -> None:
    found = check(store={"url": f"sqlite://{tmp_path}/nowhere/jobs.db"})
    assert found[0] == 1
    assert found[1][0].startswith(
        f"asyncproxy: the folder {tmp_path}/nowhere of store.url does not exist"
    )
    assert served(tmp_path) == found


def test_a_new_database_is_fine_and_is_not_made(check: Check, tmp_path: Path) -> None:
    assert check(store={"url": f"sqlite://{tmp_path}/jobs.db"}) == (0, [])


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (b"no key", "does not hold 32 bytes in Base64"),
        (None, "is there, and its key file"),
        (b64encode(b"x" * 32), "was written with another encryption key"),
    ],
)
def test_the_key_file_of_a_database(
    check: Check, tmp_path: Path, contents: bytes | None, expected: str
) -> None:
    path = tmp_path / "jobs.db"
    make_database(path)
    key = path.with_name("jobs.db.key")
    assert check(store={"url": f"sqlite://{path}"}) == (0, [])
    key.unlink()
    if contents is not None:
        key.write_bytes(contents)
    found = check(store={"url": f"sqlite://{path}"})
    assert found[0] == 1
    assert expected in found[1][0]
    assert served(tmp_path) == found


def make_database(path: Path) -> None:
    from asyncproxy.stores.base import Limits
    from asyncproxy.stores.sqlite.store import SqliteStore

    async def make() -> None:
        async with SqliteStore(path, Limits(1, 1, 1)).opened(lambda _: None):
            pass

    asyncio.run(make())


def test_what_is_no_database(check: Check, tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"a text")
    found = check(store={"url": f"sqlite://{tmp_path}/jobs.db"})
    assert found == (1, [f"asyncproxy: {tmp_path}/jobs.db is no database of asyncproxy"])
    assert served(tmp_path) == found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(check: Check, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o500)
    code, lines = check(store={"url": f"sqlite://{tmp_path}/d/jobs.db"})
    assert code == 1
    assert "not writable" in lines[0]


@pytest.mark.parametrize(
    ("module", "url", "extra"),
    [
        ("cryptography.fernet", "sqlite://{}/jobs.db", "sqlite"),
        ("redis.asyncio.connection", "redis://127.0.0.1:1/0", "redis"),
    ],
)
def test_an_extra_that_is_missing(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, url: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("asyncproxy.stores.redis")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    code, lines = check(store={"url": url.format(tmp_path), "encryption_key": KEY})
    assert code == 1
    assert lines == [
        f"asyncproxy: this store needs a library that is missing: pip install 'asyncproxy[{extra}]'"
    ]


def test_without_connect_nothing_is_asked(check: Check) -> None:
    """`gateway` is no name here, and nobody listens on port 1."""
    assert check(store={"url": "redis://127.0.0.1:1/0", "encryption_key": KEY}) == (0, [])


def test_connect_asks_the_store_and_all_gateways(check: Check) -> None:
    code, lines = check(
        "--connect",
        upstream={"base_url": "http://127.0.0.1:1/v1"},
        store={"url": "redis://127.0.0.1:1/0", "encryption_key": KEY},
    )
    assert code == 1
    assert "the store redis://127.0.0.1:1/0 cannot be used: Error 111" in lines[0]
    assert "the upstream 'gateway' at http://127.0.0.1:1/v1 does not answer: " in lines[1]


@pytest.mark.parametrize(
    ("status", "hint"), [(200, ""), (401, "a key"), (404, "is the path"), (599, "")]
)
async def test_connect_says_what_a_gateway_answers(
    check: Check, gateway: Gateway, status: int, hint: str
) -> None:
    gateway.behaviour = answer({}, status=status)
    upstream = {"base_url": f"{gateway.url}/v1", "headers": {"Authorization": "Bearer sk-gateway"}}
    code, lines = await asyncio.to_thread(
        check, "--connect", upstream=upstream, auth={"keys": ["k" * 8]}
    )
    assert code == 0
    (line,) = lines
    assert f"at {gateway.url}/v1 answers /v1/models with {status}" in line
    assert hint in line
    assert gateway.received[0].target == "/v1/models"
    assert gateway.received[0].header("Authorization") == "Bearer sk-gateway"


async def test_connect_looks_at_a_redis_and_leaves_it_as_it_was(check: Check, gateway: Gateway) -> None:
    server = redis_server.shared()
    prefix = f"test-{secrets.token_hex(8)}"
    gateway.behaviour = answer({})
    upstream = {"base_url": f"{gateway.url}/v1"}

    async def found(key: str) -> tuple[int, list[str]]:
        store = {"url": server.url, "prefix": prefix, "encryption_key": key}
        return await asyncio.to_thread(check, "--connect", upstream=upstream, store=store)

    code, lines = await found(KEY)
    assert code == 0, lines
    assert any("appendonly" in line for line in lines), "what a node would warn of"
    assert not await keys(prefix)
    from asyncproxy.stores.base import Limits
    from asyncproxy.stores.redis.store import RedisStore

    node = RedisStore(
        server.url, Limits(1, 1, 1), keys=[b"k" * 32], seal_outcomes=False, prefix=prefix, lease_s=1
    )
    async with node.opened(lambda _: None):
        pass
    assert (await found(KEY))[0] == 0
    code, lines = await found(b64encode(b"x" * 32).decode())
    assert code == 1
    assert any("was written with another encryption key" in line for line in lines)


async def keys(prefix: str) -> list[Any]:
    from redis.asyncio import Redis

    async with Redis.from_url(redis_server.shared().url) as client:
        return list(await client.keys(f"*{prefix}*"))
