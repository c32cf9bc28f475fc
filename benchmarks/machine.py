"""The machine that is measured on: its cores, the tools on it, and how to describe it in a report."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cores", "cores", "describe", "on_core", "package_version", "tool"]

# Where Debian puts the daemons; not on the PATH of an ordinary user.
_MORE_PATHS = ":/usr/sbin:/usr/local/sbin"


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core does what. None: wherever the system puts it."""

    server: int | None = None
    load: int | None = None
    upstream: int | None = None

    def __str__(self) -> str:
        if self.server is None:
            return "not pinned: fewer than two cores, or no way to pin"
        return f"server on {self.server}, load on {self.load}, upstream on {self.upstream}"


def cores() -> Cores:
    """One core for the server under test, others for the load and the upstream."""
    if sys.platform != "linux":
        return Cores()
    free = sorted(os.sched_getaffinity(0))
    if len(free) < 2:
        return Cores()
    return Cores(server=free[0], load=free[1], upstream=free[2] if len(free) > 2 else free[1])


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Start children on ``core`` inside the ``with``: they and their threads inherit it."""
    if sys.platform != "linux" or core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@functools.cache
def tool(name: str) -> str:
    """The path of a program whose Debian package has its name. Installs it if we are root.

    Exits with the package to install if there is no other way.
    """
    found = _which(name)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {name}", file=sys.stderr)
        command = ["apt-get", "install", "-y", "--no-install-recommends", name]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=120)
        found = _which(name)
    if found is None:
        raise SystemExit(f"benchmarks: {name} is missing; install it: apt-get install {name}")
    return found


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + _MORE_PATHS)


def describe() -> dict[str, str]:
    """What somebody needs to know to compare the numbers with their own."""
    load_1m = f"{os.getloadavg()[0]:.2f}"
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, {_memory()}, load {load_1m} at the start",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": ", ".join(
            f"{name} {package_version(name)}" for name in ("aiohttp", "uvloop", "msgspec", "multidict")
        ),
        "tools": f"{_first_line([tool('wrk'), '-v'])}, {_first_line([tool('nginx'), '-v'])}",
        "commit": _commit(),
    }


def package_version(name: str) -> str:
    """The version of an installed package, or ``none``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1024**3:.0f} GiB"
    except (ValueError, OSError):
        return "memory unknown"


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    line = (done.stdout + done.stderr).strip().partition("\n")[0]
    return line.partition(" [")[0].removeprefix("nginx version: ")


def _commit() -> str:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=here, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../asyncproxy")
    except FileNotFoundError:
        return "unknown"
    return f"{commit or 'unknown'}{' and changes' if changed else ''}"
