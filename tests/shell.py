"""Runs what users paste into a shell, with this Python first on the path, and other programs."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["program", "shell"]


def program(*names: str) -> str:
    """The path of the first of these. Without one the test is skipped on a laptop, and fails where CI is set."""
    for name in names:
        if found := shutil.which(name):
            return found
    message = f"no {' or '.join(names)} in PATH"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


async def shell(command: str) -> str:
    """The output of a command that has to succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        command,
        env={**os.environ, "PATH": path},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
