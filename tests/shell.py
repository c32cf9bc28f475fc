"""Runs what users paste into a shell, with this Python first on the path."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

__all__ = ["shell"]


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
