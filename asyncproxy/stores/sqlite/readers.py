"""Reads a SQLite database off the event loop, in a few threads with a connection each."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final, TypeVar

from asyncproxy.stores.sqlite.file import translate

__all__ = ["Readers"]

COUNT: Final = 2

T = TypeVar("T")


class Readers:
    """Runs reads. ``connect`` opens a connection for the length of a ``with``."""

    def __init__(self, connect: Callable[[], AbstractContextManager[sqlite3.Connection]]) -> None:
        self._connect = connect
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the threads and connections for the length of a ``with``."""
        with ExitStack() as stack:
            for _ in range(COUNT):
                self._idle.put(stack.enter_context(self._connect()))
            self._threads = stack.enter_context(
                ThreadPoolExecutor(COUNT, thread_name_prefix="asyncproxy-sqlite-read")
            )
            yield

    async def do(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``read`` in a thread. Raises :class:`StoreUnavailable` if the disk cannot be read."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._read, read)

    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._idle.get()
        try:
            return read(connection)
        except sqlite3.Error as error:
            raise translate(error) from error
        finally:
            self._idle.put(connection)
