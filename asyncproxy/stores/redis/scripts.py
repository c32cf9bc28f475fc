"""The Lua scripts that change jobs in Redis. Each script is one atomic step."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, Final

from redis.exceptions import NoScriptError

from asyncproxy.stores.redis.schema import SCHEMA

__all__ = ["Scripts"]

Call = Callable[..., Awaitable[Any]]

_NAMES: Final = (
    "claim", "create", "delete", "finish", "join", "orphans", "overdue", "pause", "release", "renew",
    "retire", "tick", "usage", "wait", "wake",
)  # fmt: skip


class Scripts:
    """The scripts of the package. Redis finds a script by the hash of its text."""

    def __init__(self) -> None:
        folder = files("asyncproxy.stores.redis").joinpath("lua")
        common = folder.joinpath("common.lua").read_text(encoding="utf-8")
        self._texts: dict[str, str] = {}
        self._hashes: dict[str, str] = {}
        for name in _NAMES:
            # A Redis without free memory refuses new jobs. All other steps go on: a job that cannot be
            # claimed or finished would never give its memory back.
            flags = "" if name == "create" else " flags=allow-oom"
            own = folder.joinpath(f"{name}.lua").read_text(encoding="utf-8")
            self._texts[name] = text = f"#!lua{flags}\nlocal SCHEMA = {SCHEMA}\n{common}\n{own}"
            self._hashes[name] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def load(self, call: Call) -> None:
        """Load all scripts into a server."""
        for text in self._texts.values():
            await call("SCRIPT", "LOAD", text)

    async def run(self, call: Call, name: str, *args: bytes | str | int, size: int = 0) -> Any:
        """Run a script, and return its reply. Sends the text if the server has lost the script."""
        try:
            return await call("EVALSHA", self._hashes[name], 1, *args, size=size)
        except NoScriptError:
            return await call("EVAL", self._texts[name], 1, *args, size=size)
