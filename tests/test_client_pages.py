"""The pages for clients: each snippet is run, and prints what stands below it.

Snippets of one page and language run one after the other in one session. A block without a language is
the output of the snippet above it, where … stands for anything. What is not installed here is only
read by its interpreter; ``make clients`` installs it, and says where (``CLIENTS_PYTHON``,
``CLIENTS_NODE``).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clients.cases import CLIENTS
from tests.clients.upstream import Upstream
from tests.conftest import Client, Start
from tests.gateway import Gateway
from tests.shell import program, shell

FOLDER = Path(__file__).parent.parent / "docs" / "clients"
PAGES = sorted(FOLDER.glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
MARK = "-- the end of a snippet --"
URL = "http://127.0.0.1:8080"


@dataclass
class Snippet:
    code: str
    output: str | None = None


def snippets(page: Path) -> dict[str, list[Snippet]]:
    """The snippets of a page, by language."""
    found: dict[str, list[Snippet]] = {}
    last: Snippet | None = None
    for language, text in FENCE.findall(page.read_text()):
        if language:
            last = Snippet(text)
            found.setdefault(language, []).append(last)
        else:
            assert last is not None, text
            assert last.output is None, text
            last.output = text
    return found


SESSIONS = [
    pytest.param(language, found, id=f"{page.stem}-{language}")
    for page in PAGES
    for language, found in snippets(page).items()
]


@pytest.fixture
async def slow(start: Start, gateway: Gateway) -> Client:
    """A proxy whose upstream takes longer than the relay holds."""
    gateway.behaviour = Upstream(0.3)
    return await start(
        upstream={"retry": {"attempts": 1}}, jobs={"relay_hold": "100ms", "result_ttl": "10m"}
    )


@pytest.mark.parametrize(("language", "found"), SESSIONS)
async def test_snippets_print_what_stands_below_them(
    language: str, found: list[Snippet], slow: Client, tmp_path: Path
) -> None:
    session = {"sh": sh, "python": python, "js": js}[language](found, slow.url, tmp_path)
    out = await shell(session.command)
    if not session.runs:
        return
    printed = out.split(MARK)
    assert len(printed) == len(found) + 1
    for snippet, text in zip(found, printed, strict=False):
        if snippet.output is not None:
            assert matches(snippet.output, text), f"{snippet.code}\nprinted:\n{text}"


def matches(expected: str, printed: str) -> bool:
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("…"))
    return re.fullmatch(pattern, printed.replace("\r", "").strip(), re.S) is not None


class Session(NamedTuple):
    """``runs``: the command runs the snippets, and not only reads them."""

    command: str
    runs: bool = True


def joined(found: list[Snippet], url: str, mark: str) -> str:
    return "\n".join(f"{snippet.code.replace(URL, url)}\n{mark}" for snippet in found)


def sh(found: list[Snippet], url: str, tmp_path: Path) -> Session:
    return Session(f"set -euo pipefail; cd {tmp_path}\n" + joined(found, url, f"echo '{MARK}'"))


def python(found: list[Snippet], url: str, tmp_path: Path) -> Session:
    script = tmp_path / "snippets.py"
    script.write_text(joined(found, url, f"print('{MARK}')"))
    if all(map(importlib.util.find_spec, imported(ast.parse(script.read_text())))):
        return Session(f"{sys.executable} {script}")
    if installed := os.environ.get("CLIENTS_PYTHON"):
        return Session(f"{installed} {script}")
    return Session(f"{sys.executable} -m py_compile {script}", runs=False)


def imported(tree: ast.AST) -> set[str]:
    """The packages that a script imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def js(found: list[Snippet], url: str, tmp_path: Path) -> Session:
    node = program("node")
    script = tmp_path / "snippets.mjs"
    script.write_text(joined(found, url, f"console.log('{MARK}');"))
    if installed := os.environ.get("CLIENTS_NODE"):
        (tmp_path / "node_modules").symlink_to(Path(installed) / "node_modules")
        return Session(f"{node} {script}")
    return Session(f"{node} --check {script}", runs=False)


def test_there_is_a_page_for_each_kind_of_client() -> None:
    kinds = {"curl", "openai-python", "openai-node", "langchain", "llamaindex", "bifrost"}
    assert {page.stem for page in PAGES} == kinds | {"README"}
    for page in PAGES:
        assert snippets(page), page


def test_both_tables_have_a_row_for_each_client_that_is_tried() -> None:
    rows = re.findall(r"^\| (.+?) \|.*\|$", (FOLDER / "README.md").read_text(), re.M)
    first = [re.sub(r"\[(.+?)\]\(.+?\)", r"\1", row).replace("`", "") for row in rows]
    for client in CLIENTS:
        assert first.count(client.name) == 2, client.name


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
