"""What users copy: the example configuration, its schema, and the README's commands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from asyncproxy.config.load import json_schema, load_config
from asyncproxy.config.model import Config
from tests.conftest import Start
from tests.end_to_end.test_process import started
from tests.gateway import Gateway
from tests.shell import shell

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def keys(node: Any, path: str = "") -> set[str]:
    if isinstance(node, dict):
        return {p for k, v in node.items() for p in keys(v, f"{path}.{k}") | {f"{path}.{k}"}}
    if isinstance(node, list):
        return {p for v in node for p in keys(v, f"{path}[]")}
    return set()


def test_the_example_is_the_defaults() -> None:
    path = ROOT / "config.example.yaml"
    minimal = {"upstreams": [{"base_url": "http://127.0.0.1:4000/v1"}]}
    assert load_config(path) == load_config(minimal)
    written = yaml.safe_load(path.read_text())
    assert keys(written) == keys(load_config(minimal).model_dump(mode="json"))


def test_each_key_of_the_example_is_explained() -> None:
    lines = (ROOT / "config.example.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*(- )?[a-z_]+: \S", line) and "#" not in line:
            above = lines[number - 1].strip()
            assert above.startswith("#"), f"line {number + 1}: {line}"


def test_the_schema_for_editors_is_current() -> None:
    assert (ROOT / "config.schema.json").read_text() == json_schema(), "run `make schema`"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, re.S | re.M)
    return [textwrap.dedent(block) for _, block in found]


def test_the_readmes_yaml_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GATEWAY_API_KEY", "PROXY_KEY"):
        monkeypatch.setenv(name, "x")
    found = blocks("yaml")
    assert found
    for block in found:
        assert isinstance(load_config(yaml.safe_load(block)), Config)


def test_the_readme_names_every_limit() -> None:
    for key in (
        "max_pending",
        "max_pending_per_credential",
        "max_request_bytes",
        "max_result_bytes",
        "max_bytes",
        "client_timeout",
        "deadline",
        "result_ttl",
        "max_result_ttl",
        "shutdown_grace",
        "concurrency",
    ):
        assert f"`{key}`" in README or f".{key}`" in README, key


async def test_the_readmes_commands_work(gateway: Gateway, start: Start, tmp_path: Path) -> None:
    """The configuration, then curl and the openai client, as they stand there."""
    (tmp_path / "config.yaml").write_text(
        blocks("yaml")[0].replace("http://127.0.0.1:4000", gateway.url)
    )
    async with started(
        "serve",
        "--config",
        str(tmp_path / "config.yaml"),
        "--listen",
        "127.0.0.1:0",
    ) as process:
        url = (await process.line()).split(" listens on ")[1].split(",")[0]
        (commands,) = blocks("sh")
        answer = await shell(commands.replace("http://127.0.0.1:8080", url))
        assert re.search(r"^HTTP/1.1 20[02] ", answer), answer
        python = next(b for b in blocks("python") if "OpenAI(" in b)
        script = tmp_path / "client.py"
        script.write_text(python.replace("http://127.0.0.1:8080", url))
        assert "CreateEmbeddingResponse" in await shell(f"python {script}")
    assert {request.header("Authorization") for request in gateway.received} == {"Bearer sk-mine"}
