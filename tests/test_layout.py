"""The order of the folders: each imports only from those before it. Read from the imports of every file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncproxy"

ORDER = (
    "core", "wire", "loop", "stores", "observe", "upstream", "dispatch", "service", "web", "config", "app", "cli",
)  # fmt: skip

# Folders of pure code: no loop, no network, no log, no clock of its own.
PURE = ("core", "wire")

# The modules that decide in the folders that also act.
PURE_MODULES = (
    "dispatch/rate_limits.py",
    "dispatch/retry.py",
    "stores/expiring_results.py",
    "stores/fair_queue.py",
    "upstream/model_routes.py",
    "upstream/target.py",
)

MAX_LINES = 400


def room_of(path: Path) -> str:
    """``stores`` for ``asyncproxy/stores/redis/store.py``, ``service`` for ``asyncproxy/service.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: ``asyncio``, ``asyncproxy.core.jobs``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports from."""
    parts = [name.split(".") for name in modules(path)]
    return {part[1] for part in parts if part[0] == "asyncproxy" and len(part) > 1} - {"version"}


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted({room_of(path) for path in FILES} - {"__init__", "__main__", "version"})


def test_the_page_has_the_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " → ".join((*ORDER[:-2], ", ".join(ORDER[-2:]))) in page


def test_every_room_is_in_the_order() -> None:
    assert set(ROOMS) == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_from_those_before_it(room: str) -> None:
    allowed = {*ORDER[: ORDER.index(room) + 1]}
    for path in FILES:
        if room_of(path) == room:
            assert rooms(path) <= allowed, path


def test_pure_code_knows_no_network_no_loop_and_no_log() -> None:
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        if room_of(path) in PURE or name in PURE_MODULES:
            roots = {module.partition(".")[0] for module in modules(path)}
            assert not roots & {
                "aiohttp",
                "asyncio",
                "logging",
                "socket",
                "ssl",
                "threading",
                "time",
            }, name


def test_the_service_knows_no_http_library() -> None:
    for room in ("service", "dispatch", "stores", "observe"):
        for path in FILES:
            if room_of(path) == room:
                assert not {module.partition(".")[0] for module in modules(path)} & {"aiohttp"}, path


@pytest.mark.parametrize("room", [room for room in ORDER if (PACKAGE / room).is_dir()])
def test_a_room_says_what_it_is_for(room: str) -> None:
    page = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert page
    assert "Begin" in page, "where to begin reading"


def test_no_file_is_long() -> None:
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, path
