"""The demo: a real model, an OpenAI-compatible gateway around it, and the proxy before both."""

from __future__ import annotations

import base64
import math
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest

from asyncproxy.cli.demo import MODEL, build_model_app
from tests.conftest import Client, Start
from tests.end_to_end.test_process import started
from tests.shell import shell

AiohttpServer = Callable[..., Any]


@pytest.fixture
async def proxy(start: Start, aiohttp_server: AiohttpServer) -> Client:
    server = await aiohttp_server(build_model_app())
    return await start(upstream={"base_url": f"http://127.0.0.1:{server.port}/v1"})


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


async def test_meaning_survives_and_the_paths_agree(proxy: Client) -> None:
    body = {"model": MODEL, "input": ["cat", "kitten", "revenue"]}
    done = await proxy.outcome(await proxy.submit(body))
    cat, kitten, revenue = (item["embedding"] for item in done["result"]["data"])
    assert cosine(cat, kitten) > 0.5
    assert cosine(cat, revenue) < 0.2
    assert (await proxy.post("/v1/embeddings", body)).json() == done["result"]
    assert len(cat) == 256


async def test_it_is_openai_compatible(proxy: Client) -> None:
    body: dict[str, Any] = {"model": MODEL, "input": "cat"}
    plain = (await proxy.post("/v1/embeddings", body)).json()
    packed = (await proxy.post("/v1/embeddings", {**body, "encoding_format": "base64"})).json()
    vector = struct.unpack("<256f", base64.b64decode(packed["data"][0]["embedding"]))
    assert vector == pytest.approx(plain["data"][0]["embedding"], abs=1e-7)
    assert plain["usage"]["prompt_tokens"] == plain["usage"]["total_tokens"] > 0
    short = (await proxy.post("/v1/embeddings", {**body, "dimensions": 64})).json()
    assert len(short["data"][0]["embedding"]) == 64
    assert math.hypot(*short["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)
    models = (await proxy.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == [MODEL]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": [1]}, 400, "input"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"dimensions": 100}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
    ],
)
async def test_its_errors_are_openais(
    proxy: Client, change: dict[str, Any], status: int, param: str
) -> None:
    answer = await proxy.post("/v1/embeddings", {"model": MODEL, "input": "x", **change})
    assert answer.status == status
    assert answer.json()["error"]["param"] == param


async def test_what_it_prints_works() -> None:
    """The commands, pasted as they are: submit, poll, and the openai client."""
    async with started("demo", "--listen", "127.0.0.1:0", "--delay", "0.2") as process:
        text = ""
        while "Ctrl-C" not in text:
            line = await process.line()
            text += line + "\n"
        assert sys.executable in text
        commands = text[text.index("ID=$(") : text.index("# Both")]
        poll = await shell(commands)
        assert poll.startswith("HTTP/1.1 202 Accepted")
        assert '"status":"pending"' in poll or '"status":"processing"' in poll
        client = await shell(re.findall(r"^\S+ - <<'EOF'.*?^EOF$", text, re.S | re.M)[0])
        assert re.search(r"cat ~ kitten: 0\.\d+   cat ~ revenue: -?0\.[01]", client), client
