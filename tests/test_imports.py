"""The imports of the package, read from its files, against what docs/architecture.md says of them."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncproxy"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    """``stores.memory`` for ``asyncproxy/stores/memory.py``; the package itself is ``__init__``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layout() -> dict[str, str]:
    """The modules that the page names, each with what it says of them."""
    block = re.search(r"^## Layout\n+```\nasyncproxy/\n(.*?)^```", PAGE, re.S | re.M)
    assert block is not None
    named = {}
    for line in re.sub(r"\n {10,}", " ", block[1]).splitlines():  # a line may go on in the next
        match = re.fullmatch(r"  (\S+)\s+(.*)", line)
        assert match is not None, line
        if match[1].endswith("/"):
            for file in re.findall(r"(\w+)\.py", match[2]):
                named[f"{match[1][:-1]}.{file}"] = match[2]
        elif match[1].endswith(".py"):  # and not a file of data
            named[match[1].removesuffix(".py")] = match[2]
    return named


def layers() -> list[list[str]]:
    """The chain of the page, lowest first: ``[["errors"], ["pure modules"], ["stores", …], …]``."""
    chain = re.search(r"^Imports point down only: (.*?)\. Only ", PAGE, re.S | re.M)
    assert chain is not None
    parts = re.sub(r"\([^)]*\)", "", " ".join(chain[1].split())).split("←")
    return [[name.strip() for name in part.split(",")] for part in parts]


LAYOUT = layout()
PURE = {name for name, says in LAYOUT.items() if says.endswith("(pure)")}


def imported(path: Path) -> set[str]:
    """Everything that a file imports, anywhere in it, with its dots: ``asyncio``, ``asyncproxy.jobs``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are written in full"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("asyncproxy.") in FILES}
            # `from asyncproxy import jobs` is of the module, `from asyncproxy import setup` of the root.
            found |= modules if modules == names else {node.module, *modules}
    return found


def ours(name: str) -> set[str]:
    """The modules of the package that one of them imports; the root is ``__init__``."""
    found = set()
    for module in imported(FILES[name]):
        if module.partition(".")[0] == "asyncproxy":
            inner = module.partition(".")[2] or "__init__"
            found.add(inner if inner in FILES else f"{inner}.__init__")
    return found


IMPORTS = {name: ours(name) for name in FILES}


def below(name: str) -> set[str]:
    """What a module imports, and what that imports, to the ground."""
    reached: set[str] = set()
    waiting = {name}
    while waiting:
        waiting = {inner for module in waiting for inner in IMPORTS[module]} - reached
        reached |= waiting
    return reached


def group_of(name: str) -> str:
    """What the chain calls a module."""
    return "pure modules" if name in PURE else name.partition(".")[0]


RANKS = {group: rank for rank, groups in enumerate(layers()) for group in groups}


def test_the_page_is_read_as_it_is_meant() -> None:
    assert layers() == [
        ["errors"],
        ["pure modules"],
        ["stores", "upstream"],
        ["metrics"],
        ["dispatcher"],
        ["service"],
        ["api", "by_header", "relay", "passthrough", "admin"],
        ["app"],
        ["cli"],
    ]
    assert {"errors", "jobs", "envelope", "routing", "fair_queue"} <= PURE | {"errors"}
    assert {group_of(name) for name in FILES} | {"pure modules"} >= set(RANKS)


def test_imports_are_read_as_they_are_meant() -> None:
    assert {"dispatcher", "errors", "jobs", "credentials", "stores.base"} <= IMPORTS["service"]
    assert "demo" in IMPORTS["cli"], "an import inside a function counts"
    assert {"app", "config", "version"} == IMPORTS["__init__"]


def test_every_module_is_in_the_layout_and_the_layout_names_no_other() -> None:
    modules = {name for name in FILES if not name.endswith(".__init__")}
    assert modules == set(LAYOUT)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_down_only(name: str) -> None:
    """Also by a detour through the modules that the chain does not name."""
    group = group_of(name)
    if group not in RANKS:
        return
    for other in below(name):
        theirs = group_of(other)
        if theirs in RANKS and theirs != group:
            assert RANKS[theirs] < RANKS[group], f"{name} imports {other}, in the end"


def test_no_module_imports_itself_by_a_detour() -> None:
    TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_import_only_each_other_and_errors(name: str) -> None:
    assert IMPORTS[name] <= PURE | {"errors"}


def test_errors_imports_nothing_of_ours() -> None:
    assert IMPORTS["errors"] == set()


@pytest.mark.parametrize("name", sorted(PURE | {"errors"}))
def test_pure_modules_know_no_network_no_loop_and_no_log(name: str) -> None:
    roots = {module.partition(".")[0] for module in imported(FILES[name])}
    assert not roots & {"aiohttp", "asyncio", "logging", "socket", "ssl", "threading", "uvloop"}
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node for node in ast.walk(tree) if isinstance(node, waiting)]


def test_only_a_few_know_the_configuration() -> None:
    """And the root, which hands out ``load_config``."""
    assert {name for name in FILES if "config" in IMPORTS[name]} == {
        "__init__",
        "app",
        "cli",
        "demo",
        "reload",
        "settings",
    }


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_imports_the_package_root(name: str) -> None:
    assert "__init__" not in IMPORTS[name]


def test_only_the_command_line_stands_above_the_application() -> None:
    assert {name for name in FILES if "app" in IMPORTS[name]} == {"cli", "reload", "__init__"}
    assert {name for name in FILES if "cli" in IMPORTS[name]} == {"__main__"}
    assert {name for name in FILES if "demo" in IMPORTS[name]} == {"cli"}
