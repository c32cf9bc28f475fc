"""Writes to a SQLite database: all that comes while a commit is under way shares the next one.

A commit costs a wait for the disk, whatever is in it. So a busy store commits as often as the disk
allows, and not once per job.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from asyncproxy.errors import StoreUnavailable
from asyncproxy.stores.sqlite_file import translate

__all__ = ["Step", "Writer"]

T = TypeVar("T")

Step = Callable[[sqlite3.Connection], T]

# Steps that share a commit at the most: those that wait for it must not wait for long.
_MOST_STEPS = 1024


class Writer:
    """One thread and one connection. Steps run in the order in which they were handed in."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._waiting: queue.SimpleQueue[tuple[Step[Any], asyncio.Future[Any]] | None]
        self._waiting = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._closed = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write for the length of a ``with``. What was handed in is written when it ends."""
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._work, name="asyncproxy-sqlite", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed = True
            self._waiting.put(None)
            await asyncio.to_thread(thread.join)

    def do(self, step: Step[T]) -> asyncio.Future[T]:
        """Run ``step`` in a transaction; its result, once that is on disk.

        The future fails with :class:`~asyncproxy.errors.StoreFull` or ``StoreUnavailable``, and then
        the step has changed nothing. Cancelling the future does not stop the step.
        """
        done: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            done.set_exception(StoreUnavailable("The store is closed."))
        else:
            self._waiting.put((step, done))
        return done

    def _work(self) -> None:
        more = True
        while more:
            batch = [self._waiting.get()]
            while len(batch) < _MOST_STEPS and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            more = batch[-1] is not None
            steps = [item for item in batch if item is not None]
            if steps:
                outcomes = self._commit([step for step, _ in steps])
                futures = [done for _, done in steps]
                self._loop.call_soon_threadsafe(_tell, futures, outcomes)

    def _commit(self, steps: list[Step[Any]]) -> list[Any]:
        """The result of each step, or the exception that it met."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            results = [step(connection) for step in steps]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001  it is the caller's, who waits in another thread
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the next BEGIN says it, if that is so
                    connection.execute("ROLLBACK")
            if len(steps) > 1:
                # Each on its own: a step that cannot be done must not undo the others.
                return [outcome for step in steps for outcome in self._commit([step])]
            return [_ours(error)]
        return results


def _ours(error: Exception) -> Exception:
    if not isinstance(error, sqlite3.Error):
        return error
    ours = translate(error)
    ours.__cause__ = error
    return ours


def _tell(futures: list[asyncio.Future[Any]], outcomes: list[Any]) -> None:
    for done, outcome in zip(futures, outcomes, strict=True):
        if done.done():
            continue
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)
